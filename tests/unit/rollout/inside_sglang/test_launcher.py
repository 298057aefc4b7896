"""What the launcher says of arguments that the installed SGLang server does not take."""

import importlib.util
import json
from pathlib import Path
from typing import Annotated

import pytest

from megatron_p2o.rollout.inside_sglang.launcher import ServerField, argument_problems, model_modules
from megatron_p2o.rollout.servers.server_arguments import PRIORITY_ARGUMENTS

FIELDS = {"dtype": ServerField(str), "max_running_requests": ServerField(int | None)}


def test_an_unknown_argument_is_named_with_its_nearest() -> None:
    found = argument_problems({"dtype": "auto", "max_runing_requests": 2}, FIELDS)
    assert found == [
        "sglang.max_runing_requests is not an argument of the installed SGLang server: "
        "did you mean sglang.max_running_requests?"
    ]


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        (ServerField(Annotated[int | None, "help"]), "many", "has the wrong type: Expected `int | null`, got `str`"),
        (ServerField(Annotated[int | None, "help"]), None, None),
        (ServerField(bool), "on", "has the wrong type: Expected `bool`, got `str`"),
        (ServerField(float), 1, None),
        (ServerField(str | None, {"triton", "fa3"}), "fa4", "must be one of fa3, triton"),
        (ServerField(str | None, {"triton", "fa3"}), "fa3", None),
        (ServerField(str | None, {"triton", "fa3"}), None, None),
        (ServerField(list[str], ["qkv", "mlp"]), ["mlp", "head"], "must be one of mlp, qkv"),
        (ServerField(set[str] | list[str]), ["a"], None),
    ],
)
def test_an_argument_of_another_type_or_choice_is_named(field: ServerField, value: object, rule: str | None) -> None:
    expected = [] if rule is None else [f"sglang.x={value} {rule}"]
    assert argument_problems({"x": value}, {"x": field}) == expected


def test_an_sglang_without_priorities_is_told_by_its_name_not_by_its_arguments() -> None:
    found = argument_problems({"dtype": "auto", **PRIORITY_ARGUMENTS}, FIELDS)
    assert len(found) == 1
    assert found[0].startswith("the installed SGLang cannot put training before evolution: install the version of")
    assert found[0].endswith(f"(it has no {', '.join(PRIORITY_ARGUMENTS)})")


def config_with(folder: Path, text: str) -> Path:
    (folder / "config.json").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("architecture", "module"),
    [
        ("Qwen3ForCausalLM", "qwen3"),
        ("Qwen3MoeForCausalLM", "qwen3_moe"),
        ("Qwen2ForCausalLM", "qwen2"),
        ("LlamaForCausalLM", "llama"),
    ],
)
def test_the_module_of_a_model_s_architecture_is_found_in_the_installed_sglang(
    architecture: str, module: str, tmp_path: Path
) -> None:
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.submodule_search_locations
    models = Path(spec.submodule_search_locations[0]) / "srt" / "models"
    model = config_with(tmp_path, json.dumps({"architectures": [architecture]}))
    assert module in model_modules(model, [models])
    assert len(model_modules(model, [models])) <= 2


@pytest.mark.parametrize(
    "text", ["", "{}", '{"architectures": []}', '{"architectures": null}', '{"architectures": ["NoSuchModel"]}']
)
def test_where_the_architecture_cannot_be_told_none_is_left_out(text: str, tmp_path: Path) -> None:
    (tmp_path / "some_model.py").write_text("class SomeModel:\n    pass\n")
    assert model_modules(config_with(tmp_path, text), [tmp_path]) == set()
    assert model_modules(tmp_path / "missing", [tmp_path]) == set()
