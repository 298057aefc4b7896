"""Settings files: what is read, what is refused, and that every problem is said at once with its place."""

import dataclasses
import math
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

import pytest
import yaml

from megatron_p2o.config.names import SYNONYMS
from megatron_p2o.config.read import ConfigError, dump_config, load_config, missing_paths
from megatron_p2o.config.source import annotation_at
from megatron_p2o.config.tree import REFERENCE_PRESET, Config, EvaluationSetConfig, one_task

REQUIRED = "run: {name: first}\nmodel: {path: model}\ndata: {train: train.jsonl}\n"


ALIAS_BOMB = b"a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (level, level, b", ".join([b"*a%d" % (level - 1)] * 10)) for level in range(1, 10)
)
"""A text of 10 lines; written out it holds ten thousand million values."""


def write(directory: Path, text: str, name: str = "run.yaml") -> Path:
    path = directory / name
    path.write_text(text)
    return path


def load(directory: Path, text: str, overrides: Sequence[str] = ()) -> Config:
    return load_config(write(directory, REQUIRED + text), overrides)


def problems(directory: Path, text: str, overrides: Sequence[str] = ()) -> list[str]:
    """Return the messages for a file of exactly this text, with the directory cut off."""
    path = write(directory, text)
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    return [str(problem).replace(f"{directory}/", "") for problem in error.value.problems]


def test_required_settings_alone_give_the_defaults(tmp_path: Path) -> None:
    config = load(tmp_path, "")
    assert (config.run.name, config.model.path, config.data.train) == ("first", "model", one_task("train.jsonl"))
    assert config.rollout.group_size == 6
    assert config.evolution.reflection.backend == "self"


def test_values_take_the_type_of_their_field(tmp_path: Path) -> None:
    text = """
optimizer: {lr: 1e-6, eps: 1, beta1: .5}
rollout: {max_total_tokens: 7}
schedule: {max_steps: null}
parallel: {distributed_optimizer: True}
evolution: {reflection: {temperature: 0, extra_body: {reasoning_effort: low, stop: ["</s>"]}}}
sglang: {mem-fraction-static: 0.5, on: [1, {two: 2}]}
megatron:
"""
    config = load(tmp_path, text)
    assert config.evolution.reflection.extra_body == {"reasoning_effort": "low", "stop": ["</s>"]}
    assert config.optimizer.lr == 1e-6
    assert config.optimizer.beta1 == 0.5
    assert isinstance(config.optimizer.eps, float)
    assert config.rollout.max_total_tokens == 7
    assert config.schedule.max_steps is None
    assert config.parallel.distributed_optimizer is True
    assert isinstance(config.evolution.reflection.temperature, float)
    assert config.sglang == {"mem-fraction-static": 0.5, "on": [1, {"two": 2}]}
    assert config.megatron == {}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("optimizer: {lr: fast}", "optimizer.lr=fast must be a number: write it like 0.5 or 1e-6"),
        ("optimizer: {lr: true}", "optimizer.lr=true must be a number: write it like 0.5 or 1e-6"),
        ("optimizer: {lr: .nan}", "optimizer.lr=nan must be a finite number"),
        ("optimizer: {lr: -.inf}", "optimizer.lr=-inf must be a finite number"),
        ("optimizer: {lr: [1]}", "optimizer.lr=(a list) must be a number: write it like 0.5 or 1e-6"),
        ("run: {seed: true}", "run.seed=true must be a whole number: write it in digits"),
        ("schedule: {epochs: 1.5}", "schedule.epochs=1.5 must be a whole number: write it in digits"),
        ("schedule: {epochs: 1e3}", "schedule.epochs=1e3 must be a whole number: write it in digits"),
        ("schedule: {epochs: '10'}", "schedule.epochs=10 must be a whole number: write it in digits"),
        ("schedule: {epochs: }", "schedule.epochs= is empty: give a value or delete the line"),
        ("logging: {console: 1}", "logging.console=1 must be true or false"),
        ("run: {directory: true}", "run.directory=true is no text in YAML: put it in quotes"),
        ("run: {directory: 2024}", "run.directory=2024 is no text in YAML: put it in quotes"),
        ("run: {directory: 1e3}", "run.directory=1e3 is no text in YAML: put it in quotes"),
        ("optimizer: {lr: '0.5'}", "optimizer.lr=0.5 must be a number: write it like 0.5 or 1e-6"),
        ("optimizer: {beta1: 0:30}", "optimizer.beta1=0:30 must be a number: write it like 0.5 or 1e-6"),
        ("schedule: {epochs: 1:30}", "schedule.epochs=1:30 must be a whole number: write it in digits"),
        ("schedule: {epochs: 0x10}", "schedule.epochs=0x10 must be a whole number: write it in digits"),
        ("schedule: {epochs: 1_000}", "schedule.epochs=1_000 must be a whole number: write it in digits"),
        ("schedule: {epochs: !!int 1:30}", "schedule.epochs=1:30 cannot be read (invalid literal for int()"),
        ("logging: {console: yes}", "logging.console=yes must be true or false"),
        ("logging: null", "logging=null must be a mapping: write its settings below it, indented"),
        ("data: {evaluation: ~}", "data.evaluation=~ must be a mapping: write its settings below it, indented"),
        ("rollout: {top_p: !!python/tuple [1]}", "rollout.top_p=(a list) cannot be read (could not determine a con"),
        ("data: {evaluation: {math: 5}}", "data.evaluation.math.file=5 is no text in YAML: put it in quotes"),
        (
            "data: {evaluation: {math: [a]}}",
            "data.evaluation.math=(a list) must be a file, or a mapping: write `file:`",
        ),
        (
            "data: {evaluation: {math: {}}}",
            "data.evaluation.math=(a mapping) must be a file, or a mapping: write `file:`",
        ),
        ("data: {evaluation: {math: }}", "data.evaluation.math= must be a file, or a mapping: write `file:` below it"),
        ("data: {evaluation: {math: {num_samples: 2}}}", "data.evaluation.math.file is missing: it has no default"),
        (
            "data: {evaluation: {math: {file: a, num_sample: 2}}}",
            "data.evaluation.math.num_sample is not a setting: did you mean data.evaluation.math.num_samples?",
        ),
        ("evaluation: {num_samples_of: {math: 2}}", "evaluation.num_samples_of is not a setting: write data.eval"),
        ("data: {evaluation: math.jsonl}", "data.evaluation=math.jsonl must be a mapping: write its settings below it"),
        ("optimizer: 3", "optimizer=3 must be a mapping: write its settings below it, indented"),
        ("run: {directory: !!python/name:os.system x}", "run.directory=x cannot be read"),
        ("model: {dtype: bfloat}", "model.dtype=bfloat must be one of float32, bfloat16: did you mean bfloat16?"),
        ("hard: {counted: off}", "must be one of plain, all: choose one"),
        ("hard: {counted: [plain]}", "hard.counted=(a list) must be one of plain, all"),
    ],
)
def test_value_of_the_wrong_type_is_named_with_its_line_and_remedy(tmp_path: Path, line: str, message: str) -> None:
    # The required settings stand in the base, so that the line under test may open any section.
    write(tmp_path, REQUIRED, "base.yaml")
    found = problems(tmp_path, f"base: base.yaml\n{line}\n")
    assert len(found) == 1
    assert found[0].startswith("run.yaml:2: ")
    assert message in found[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("rollout: {<<: {top_p: 0.5}}", "rollout.<<: YAML 1.2 has no merge: write the settings out, or share a file"),
        ("sglang: {a: {<<: {b: 1}}}", "sglang.a.<<: YAML 1.2 has no merge: write the settings out, or share a file"),
        ("sglang: {a: [{b: 1, b: 2}]}", "sglang.a.b is set twice (first on line 2): keep one"),
        ("rollout: {'<<': 1}", "rollout.<< is not a setting"),
        ("optimizer: {lrr: 1}", "optimizer.lrr is not a setting: did you mean optimizer.lr?"),
        ("scoring: {recompute: true}", "scoring is not a setting: write logprobs (its alarms: alarms)"),
        ("evolution: {evaluation_temperature: 1}", "temperature is not a setting: write evolution.trial_temperature"),
        ("evolution: {reflection: {task: x}}", "task is not a setting: write evolution.reflection.task_description"),
        ("hard: {forgotten_alarm: 1}", "hard.forgotten_alarm is not a setting: write alarms.forgotten"),
        ("grading: {undecided_alarm: 1}", "grading.undecided_alarm is not a setting: write alarms.undecided"),
        ("optimiser: {lr: 1}", "optimiser is not a setting: did you mean optimizer?"),
        ("group_size: 6", "group_size is not a setting: did you mean rollout.group_size?"),
        ("optimizer.lr: 1", "optimizer.lr is not a setting: nest it: write `lr:` indented below `optimizer:`"),
        ("evolution: {reflection: {api_key: sk-1}}", "did you mean evolution.reflection.api_key_env?"),
        ("1: 2", "1 is not a setting: known here are "),
        ("reward: {function: x}", "reward is not a setting: did you mean grading?"),
        ("learning_rate: 1e-6", "learning_rate is not a setting: did you mean optimizer.lr?"),
        ("trainer: {max_new_token: 5}", "trainer is not a setting: did you mean schedule?"),
        ("max_new_token: 5", "max_new_token is not a setting: did you mean rollout.max_new_tokens?"),
        ("rollout: {temp: 1.0}", "rollout.temp is not a setting: did you mean rollout.temperature?"),
        ("temperature: 1.0", "did you mean rollout.temperature or evolution.reflection.temperature or evaluation.tem"),
        ("rollout: {zzz: 1.0}", "rollout.zzz is not a setting: known here are rollout.group_size, rollout.temperature"),
    ],
)
def test_key_that_is_no_setting_is_answered_with_what_to_write(tmp_path: Path, line: str, message: str) -> None:
    write(tmp_path, REQUIRED, "base.yaml")
    found = problems(tmp_path, f"base: base.yaml\n{line}\n")
    assert len(found) == 1
    assert found[0].startswith("run.yaml:2: ")
    assert message in found[0]


def test_all_problems_are_listed_at_once_in_order_of_the_file(tmp_path: Path) -> None:
    text = """run: {name: true}
model: {pth: x}
optimizer:
  lr: 1e-6
  lr: 2e-6
  beta1: fast
schedule: {problems_per_step: 100, problems_per_update: 64}
"""
    assert problems(tmp_path, text, ["evaluation.tempearture=1"]) == [
        "--set: evaluation.tempearture is not a setting: did you mean evaluation.temperature?",
        "run.yaml: model.path is missing: it has no default, set it",
        "run.yaml: data.train is missing: it has no default, set it",
        "run.yaml:1: run.name=true is no text in YAML: put it in quotes",
        "run.yaml:2: model.pth is not a setting: did you mean model.path?",
        "run.yaml:5: optimizer.lr is set twice (first on line 4): keep one",
        "run.yaml:6: optimizer.beta1=fast must be a number: write it like 0.5 or 1e-6",
        "run.yaml:7: schedule.problems_per_update=64 must divide schedule.problems_per_step=100",
    ]


def test_cross_check_is_silent_about_a_setting_that_was_refused_already(tmp_path: Path) -> None:
    found = problems(tmp_path, REQUIRED + "schedule: {problems_per_step: many, problems_per_update: 48}")
    assert len(found) == 1 and "problems_per_step=many" in found[0]


def test_cross_check_names_the_places_of_both_settings(tmp_path: Path) -> None:
    found = problems(tmp_path, REQUIRED + "rollout: {group_size: 2}\n", ["assignment.num_plain=3"])
    assert found == ["run.yaml:4, --set: assignment.num_plain=3 must be at most rollout.group_size=2"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("schedule: {problems_per_update: 0}", "schedule.problems_per_update=0 must be at least 1"),
        ("grading: {deadline_s: 0}", "grading.deadline_s=0.0 must be greater than 0 and at most 2000000"),
        ("hard: {max_solved: -1}", "hard.max_solved=-1 must be at least 0"),
        ("rollout: {max_total_tokens: 0}", "rollout.max_total_tokens=0 must be at least 1"),
        ("evolution: {max_rollouts: 0}", "evolution.max_rollouts=0 must be at least 1"),
        ("evolution: {max_rollouts: -1}", "evolution.max_rollouts=-1 must be at least 1"),
        ("optimizer: {beta1: 2}", "optimizer.beta1=2.0 must be at least 0 and less than 1"),
        ("rollout: {top_p: 1.5}", "rollout.top_p=1.5 must be 1: SGLang reports log-probs as before the cut"),
        ("rollout: {top_p: 0.95}", "rollout.top_p=0.95 must be 1: SGLang reports log-probs as before the cut"),
        ("evaluation: {temperature: -1}", "evaluation.temperature=-1.0 must be at least 0"),
        (
            "grading: {memory_limit_mib: 64}",
            "grading.memory_limit_mib=64 must be at least 256 and at most 16777216: math-verify alone takes about 70",
        ),
    ],
)
def test_value_out_of_range_is_a_problem(tmp_path: Path, line: str, message: str) -> None:
    assert problems(tmp_path, REQUIRED + line) == [f"run.yaml:4: {message}"]


def test_base_is_read_first_relative_to_the_file_and_mappings_merge(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    write(tmp_path / "shared", REQUIRED + "optimizer: {lr: 1, eps: 2}\nsglang: {a: 1, b: 1}", "root.yaml")
    write(tmp_path / "shared", "base: root.yaml\noptimizer: {eps: 3, beta1: 0.5}", "middle.yaml")
    path = write(tmp_path, "base: shared/middle.yaml\noptimizer: {beta1: 0.25}\nsglang: {b: 2}\nrun: {name: last}")
    config = load_config(path)
    assert (config.optimizer.lr, config.optimizer.eps, config.optimizer.beta1) == (1, 3, 0.25)
    assert config.sglang == {"a": 1, "b": 2}
    assert config.run.name == "last"


def test_problem_in_a_base_is_reported_with_the_file_of_the_base(tmp_path: Path) -> None:
    write(tmp_path, REQUIRED + "optimizer: {lr: x}", "root.yaml")
    assert problems(tmp_path, "base: root.yaml\n")[0].startswith("root.yaml:4: optimizer.lr=x")


def test_base_that_is_missing_or_leads_in_a_circle_is_refused(tmp_path: Path) -> None:
    assert "run.yaml:1: base=gone.yaml must be an existing settings file" in problems(tmp_path, "base: gone.yaml")[0]
    write(tmp_path, "base: run.yaml", "other.yaml")
    assert "other.yaml:1: base=run.yaml leads back to a file" in problems(tmp_path, "base: other.yaml")[0]
    assert "run.yaml:1: base=5 must be the path" in problems(tmp_path, "base: 5")[0]


def test_overrides_win_and_are_typed_like_the_file(tmp_path: Path) -> None:
    overrides = [
        "optimizer.lr=2e-6",
        "schedule.max_steps=3",
        "logging.wandb_project=null",
        "run.name='7'",
        "data.question_format=a {question} = b",
        "data.evaluation.aime=aime.jsonl",
        "data.evaluation.aime.num_samples=32",
        "sglang={x: 1}",
        "sglang.y=true",
        "optimizer.lr=3e-6",
    ]
    config = load(tmp_path, "optimizer: {lr: 1}\n", overrides)
    assert config.optimizer.lr == 3e-6
    assert config.schedule.max_steps == 3
    assert config.logging.wandb_project is None
    assert config.run.name == "7"
    assert config.data.question_format == "a {question} = b"
    assert config.data.evaluation == {"aime": EvaluationSetConfig(file="aime.jsonl", num_samples=32)}
    assert config.sglang == {"x": 1, "y": True}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr", "optimizer.lr must have the form name=value"),
        ("optimizer.lr=x", "optimizer.lr=x must be a number"),
        ("optimizer.lrr=1", "optimizer.lrr is not a setting: did you mean optimizer.lr?"),
        ("scoring.recompute=true", "scoring.recompute is not a setting: write logprobs.recompute"),
        ("scoring.mismatch_alarm=1", "scoring.mismatch_alarm is not a setting: write alarms.mismatch"),
        ("optimizer.lr.x=1", "optimizer.lr.x is not a setting"),
        ("run.name=7", "run.name=7 is no text in YAML: put it in quotes"),
        ("run.name=", "run.name= is empty"),
        ("run.name=[", "run.name=[ must be a YAML value"),
        ("optimizer=1", "optimizer=1 must be a mapping"),
        ("optimizer=null", "optimizer=null must be a mapping: write its settings below it"),
        ("run=", "run= must be a mapping: write its settings below it"),
        ("optimizer={lr: 1, lr: 2}", "optimizer.lr is set twice"),
        ("rollout={<<: {top_p: 0.5}}", "rollout.<<: YAML 1.2 has no merge"),
        (
            "sglang.a=" + "[" * 5000,
            "sglang.a=" + "[" * 80 + "... must be a YAML value (mappings and lists may be 32 deep",
        ),
    ],
)
def test_override_problem_is_reported_as_set(tmp_path: Path, override: str, message: str) -> None:
    found = problems(tmp_path, REQUIRED, [override])
    assert len(found) == 1
    assert found[0].startswith(f"--set: {message}")


def test_reference_preset_sets_every_default_of_the_authors(tmp_path: Path) -> None:
    config = load(tmp_path, "preset: reference")
    assert {name: attrgetter(name)(config) for name in REFERENCE_PRESET} == dict(REFERENCE_PRESET)


def test_file_and_overrides_win_over_the_preset_in_either_order(tmp_path: Path) -> None:
    config = load(tmp_path, "assignment: {num_plain: 1}\npreset: reference", ["evolution.guard_leaks=true"])
    assert config.assignment.num_plain == 1
    assert config.evolution.guard_leaks is True
    assert config.evolution.warm_start is False
    assert load(tmp_path, "", ["preset=reference"]).assignment.num_plain == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"run: {name: [}", "run.yaml:1: YAML syntax"),
        (b"run:\n  name: x\n bad: y\n", "run.yaml:3: YAML syntax"),
        (b"run: {name: x}\n---\nrun: {name: y}\n", "run.yaml:2: YAML syntax"),
        (b"run: {name: x}\n# \xff\n", "run.yaml:2: the file must be UTF-8"),
        (b"a: b\n\nc: \x00", "run.yaml:3: YAML allows no character U+0000: remove it"),
        (b"- run\n", "run.yaml:1: the file must be a mapping of sections"),
        (b"just words", "run.yaml:1: the file must be a mapping of sections"),
        (b"a: &a {b: *a}", "run.yaml:1: *a is an alias of a value that contains it: write the value out"),
        (b"a: *b", "run.yaml:1: YAML syntax: found undefined alias 'b'"),
        (b"run:\n\tname: x", "run.yaml:2: YAML syntax: found character '\\t' that cannot start any token"),
        ("run: {name: x}".encode("utf-16"), "run.yaml:1: the file must be UTF-8: convert it"),
        (b'run: {name: "a\\0b"}', "run.yaml:1: the text holds the control character U+0000: remove it"),
        (b'run: {name: "\\e]52;c;"}', "run.yaml:1: the text holds the control character U+001B: remove it"),
        (b'sglang: {x: "\\ud800"}', "run.yaml:1: the text holds the control character U+D800: remove it"),
        (b"a: " + b"[" * 5000 + b"]" * 5000, "run.yaml:1: mappings and lists may be 32 deep: write it flatter"),
        (b"a: " + b"{b: " * 5000, "run.yaml:1: mappings and lists may be 32 deep: write it flatter"),
        (b"- " * 5000, "run.yaml:1: mappings and lists may be 32 deep: write it flatter"),
        (ALIAS_BOMB, "run.yaml:5: the file holds more than 100000 values, aliases written out: shorten it"),
        (b"#" * (2**20 + 1), "run.yaml: the file is larger than 1048576 bytes: give a settings file"),
    ],
)
def test_file_that_is_no_mapping_is_refused_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert message in str(error.value).replace(f"{tmp_path}/", "")


def test_missing_file_and_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the file cannot be read \(No such file or directory\)"):
        load_config(tmp_path / "gone.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path)


def test_empty_file_misses_exactly_the_required_settings(tmp_path: Path) -> None:
    assert [line.split()[1] for line in problems(tmp_path, "")] == ["run.name", "model.path", "data.train"]


def test_dump_reads_back_equal_whatever_the_settings_hold(tmp_path: Path) -> None:
    text = r"""
preset: reference
optimizer: {lr: 1e-6, eps: 1.0e-300}
data:
  question_format: "é: {question}\n\t\\boxed{{}} # no"
  evaluation: {"no": "yes.jsonl", "12": {file: "1e3", temperature: 0}}
assignment: {num_plain: 3}
sglang: {flag: true, list: [1, 2.5, null, "off"], nested: {a: {b: ""}}}
evolution: {reflection: {backend: openai, base_url: "https://host/v1", model: "null"}}
"""
    write(tmp_path, REQUIRED, "base.yaml")
    text = "base: base.yaml\n" + text.replace("data:\n", "data:\n  train: x.jsonl\n")
    config = load_config(write(tmp_path, text))
    assert config.data.evaluation == {
        "no": EvaluationSetConfig(file="yes.jsonl"),
        "12": EvaluationSetConfig(file="1e3", temperature=0.0),
    }
    assert load_config(write(tmp_path, dump_config(config), "dumped.yaml")) == config


@pytest.mark.parametrize(
    "text",
    [
        "0100",
        "1:30",
        "1e3",
        "1_000",
        "0x10",
        "no",
        "true",
        "~",
        "",
        "=",
        "<<",
        "2024-01-01",
        ".5",
        ".inf",
        "+1",
        "é\t\n",
    ],
)
def test_dump_quotes_text_that_looks_like_something_else(tmp_path: Path, text: str) -> None:
    config = dataclasses.replace(load(tmp_path, ""), sglang={"value": text, text: [text, {"deep": text}]})
    dumped = dump_config(config)
    assert load_config(write(tmp_path, dumped, "dumped.yaml")).sglang == config.sglang
    assert yaml.safe_load(dumped)["sglang"] == config.sglang, "a reader of YAML 1.1 sees the same"


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("0100", 100),
        ("+7", 7),
        ("1e-6", 1e-6),
        ("1.", 1.0),
        (".5E+2", 50.0),
        ("-.inf", -math.inf),
        ("yes", "yes"),
        ("on", "on"),
        ("2024-01-01", "2024-01-01"),
        ("1:30", "1:30"),
        ("0o17", "0o17"),
        ("e5", "e5"),
        (".", "."),
        ("~", None),
        ("", None),
        ("TRUE", True),
    ],
)
def test_plain_values_are_those_of_yaml_1_2(tmp_path: Path, written: str, value: object) -> None:
    found = load(tmp_path, f"sglang: {{value: {written}}}").sglang["value"]
    assert (type(found), found) == (type(value), value)


def test_byte_order_mark_comments_and_carriage_returns_are_no_settings(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(
        b"\xef\xbb\xbf# first\r\n" + REQUIRED.replace("\n", "\r\n").encode() + b"optimizer:\r\n  # lr: 1\r\n"
    )
    assert load_config(path) == load(tmp_path, "")


def test_dump_holds_every_setting(tmp_path: Path) -> None:
    config = load(tmp_path, "")
    assert yaml.safe_load(dump_config(config)) == dataclasses.asdict(config)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("sglang: {api_key: very-secret}", "sglang.api_key"),
        ("sglang: {admin-api-key: very-secret}", "sglang.admin-api-key"),
        ("megatron: {hf_token: very-secret}", "megatron.hf_token"),
        ("evolution: {reflection: {api_key_env: very-secret}}", "evolution.reflection.api_key_env"),
        ("evolution: {reflection: {base_url: 'https://me:very-secret@host/v1'}}", "evolution.reflection.base_url"),
        ("evolution: {reflection: {base_url: 'https://h/v1?api_key=very-secret'}}", "evolution.reflection.base_url"),
        (
            "evolution: {reflection: {extra_body: {auth: {api_key: very-secret}}}}",
            "evolution.reflection.extra_body.auth.api_key",
        ),
    ],
)
def test_credential_in_the_settings_is_refused_and_never_shown(tmp_path: Path, line: str, name: str) -> None:
    found = problems(tmp_path, REQUIRED + line)
    assert len(found) == 1
    assert found[0].startswith(f"run.yaml:4: {name} ")
    assert "secret" not in found[0]


def test_dump_refuses_a_credential_that_was_set_in_code(tmp_path: Path) -> None:
    config = dataclasses.replace(load(tmp_path, ""), sglang={"api_key": "very-secret"})
    with pytest.raises(ValueError, match=r"sglang\.api_key is a credential") as error:
        dump_config(config)
    assert "very-secret" not in str(error.value)


def test_missing_paths_names_each_absent_file_and_only_those(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "evolution: {reflection: {phrases: phrases.txt}}\n"
    config = load(tmp_path, text, ["data.evaluation.math=math.jsonl", "data.evaluation.aime=aime.jsonl"])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    named = [sentence.split("=")[0] for sentence in missing_paths(config)]
    everything = ["model.path", "data.train", "data.evaluation.math", "data.evaluation.aime"]
    assert sorted(named) == sorted([*everything, "evolution.reflection.phrases"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    for name in ("train.jsonl", "aime.jsonl", "phrases.txt"):
        (tmp_path / name).touch()
    assert [sentence.split("=")[0] for sentence in missing_paths(config)] == ["data.evaluation.math"]


def test_problems_found_elsewhere_can_be_raised_the_same_way() -> None:
    error = ConfigError(["data.train=x must be an existing file"])
    assert str(error) == "1 problem in the settings:\n  data.train=x must be an existing file"


def evaluation_of(tmp_path: Path, *overrides: str, text: str = "base: base.yaml\n") -> dict[str, str]:
    with_set = REQUIRED.replace("train.jsonl}", "train.jsonl, evaluation: {a: a.jsonl}}")
    write(tmp_path, with_set, "base.yaml")
    sets = load_config(write(tmp_path, text), overrides).data.evaluation
    return {name: given.file for name, given in sets.items()}


def test_an_empty_mapping_takes_away_what_lies_below_it(tmp_path: Path) -> None:
    assert evaluation_of(tmp_path) == {"a": "a.jsonl"}
    assert evaluation_of(tmp_path, "data.evaluation={b: b.jsonl}") == {"a": "a.jsonl", "b": "b.jsonl"}
    assert evaluation_of(tmp_path, "data.evaluation={}") == {}
    assert evaluation_of(tmp_path, "data={evaluation: {}}") == {}
    assert evaluation_of(tmp_path, "data.evaluation={}", "data.evaluation.b=b.jsonl") == {"b": "b.jsonl"}
    assert evaluation_of(tmp_path, "data.evaluation.b=b.jsonl", "data.evaluation={}") == {}
    assert evaluation_of(tmp_path, text="base: base.yaml\ndata: {evaluation: {}}\n") == {}


def test_an_override_that_sets_nothing_is_an_error(tmp_path: Path) -> None:
    assert problems(tmp_path, REQUIRED, ["optimizer={}"]) == [
        "--set: optimizer={} sets nothing: name a setting below it"
    ]


def test_every_synonym_leads_to_settings() -> None:
    for synonym, names in SYNONYMS.items():
        assert annotation_at((synonym,)) is None
        assert all(annotation_at(tuple(name.split("."))) is not None for name in names.split(" and "))


@pytest.mark.parametrize(("written", "expected"), [("heavy_4", 72), ("light", 6), ("45", 45)])
def test_a_budget_is_a_number_that_may_be_written_by_name(tmp_path: Path, written: str, expected: int) -> None:
    config = load(tmp_path, "", [f"evolution.budget={written}"])
    assert config.evolution.budget == expected
    assert "  budget: " + str(expected) in dump_config(config)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("heavy_5", "evolution.budget=heavy_5 must be a whole number or one of light, medium, heavy, heavy_2, heavy_3"),
        ("0", "evolution.budget=0 must be at least 1"),
        ("1.5", "evolution.budget=1.5 must be a whole number"),
    ],
)
def test_a_wrong_budget_is_refused(tmp_path: Path, written: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, "", [f"evolution.budget={written}"])
