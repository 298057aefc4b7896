"""Damaged, foreign and hostile files given to every command: one message that names the file, and status 2."""

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_p2o.cli import BAD_INPUT, main
from megatron_p2o.terminal import printable
from megatron_p2o.testing.run_files import frozen_answers
from megatron_p2o.testing.tiny_model import write_tiny_qwen3

WEIGHTS, INDEX, SHARD = "model.safetensors", "model.safetensors.index.json", "model-00001-of-00001.safetensors"

PROBLEM = {"id": "one", "question": "1+1", "answer": "2"}

METRICS = {"step": 1, "epoch": 0, "time": "2026-01-31T12:00:00.000+00:00", "metrics": {"rollout/reward_mean": 0.5}}

Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def whole_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(tmp_path: Path, whole_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a model, a problem and settings that name both."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole_model, tmp_path / "model")
    (tmp_path / "problems.jsonl").write_text(json.dumps(PROBLEM) + "\n")
    sections = {
        "run": {"name": "first"},
        "model": {"path": "model", "dtype": "float32"},
        "data": {"train": "problems.jsonl"},
        "rollout": {"max_new_tokens": 16},
        "schedule": {"problems_per_step": 1, "problems_per_update": 1},
        "evolution": {"enabled": False},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(sections))
    return tmp_path


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return what a command says when it refuses its input."""
    assert main(arguments) == BAD_INPUT
    told = capsys.readouterr().err
    assert told.startswith("p2o: ") and told.endswith("\n")
    assert "Traceback" not in told and printable(told) == told
    return told


def dry_run(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    sets = [part for override in overrides for part in ("--set", override)]
    return refusal(capsys, "train", "run.yaml", "--dry-run", *sets)


def test_the_files_are_whole_before_they_are_damaged(folder: Path) -> None:
    assert main(["train", "run.yaml", "--dry-run"]) == 0


def cut(num_bytes: int) -> Change:
    def change(model: Path) -> None:
        weights = (model / WEIGHTS).read_bytes()
        (model / WEIGHTS).write_bytes(weights[:num_bytes])

    return change


def index_of(text: str) -> Change:
    def change(model: Path) -> None:
        (model / WEIGHTS).rename(model / SHARD)
        (model / INDEX).write_text(text)

    return change


def indexed_to(file: str) -> Change:
    def change(model: Path) -> None:
        with safe_open(model / WEIGHTS, framework="pt") as weights:
            weight_map = dict.fromkeys(weights.keys(), file)
        index_of(json.dumps({"weight_map": weight_map}))(model)

    return change


def whole_numbers(model: Path) -> None:
    save_file({name: tensor.char() for name, tensor in load_file(model / WEIGHTS).items()}, model / WEIGHTS)


def without_one(model: Path) -> None:
    """Leave a tensor out of the shard that the index promises to be there."""
    indexed_to(SHARD)(model)
    tensors = load_file(model / SHARD)
    del tensors["model.norm.weight"]
    save_file(tensors, model / SHARD)


def config_with(**settings: Any) -> Change:
    def change(model: Path) -> None:
        own = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(own | settings))

    return change


def wrote(name: str, content: str | bytes) -> Change:
    return lambda model: (model / name).write_bytes(content.encode() if isinstance(content, str) else content)


MODELS: dict[str, tuple[Change, str]] = {
    "no config": (lambda model: (model / "config.json").unlink(), "has no config.json"),
    "config no JSON": (wrote("config.json", "{"), "model/config.json is not JSON"),
    "config a list": (wrote("config.json", "[1]"), "model/config.json must hold a JSON object"),
    "config binary": (wrote("config.json", b"\xff\xfe\x00"), "model/config.json is not UTF-8"),
    "config deep": (wrote("config.json", "[" * 100_000), "model/config.json is nested too deeply"),
    "config of digits": (wrote("config.json", '{"a": ' + "9" * 5000 + "}"), "model/config.json is not JSON"),
    "no layers": (config_with(num_hidden_layers=None), "num_hidden_layers is None, must be a whole number"),
    "negative layers": (config_with(num_hidden_layers=-1), "num_hidden_layers is -1, must be a whole number"),
    "endless layers": (config_with(num_hidden_layers=10**12), "num_hidden_layers is 1000000000000, must be"),
    "no heads": (config_with(num_attention_heads=0), "num_attention_heads is 0, must be a whole number"),
    "size in text": (config_with(hidden_size="32"), "hidden_size is '32', must be a whole number"),
    "size a claim": (config_with(vocab_size=True), "vocab_size is True, must be a whole number"),
    "epsilon infinite": (config_with(rms_norm_eps=float("inf")), "rms_norm_eps is inf, must be a number"),
    "rope a list": (config_with(rope_parameters=[1]), "the rotary embedding is scaled ([1])"),
    "type a list": (config_with(model_type=["qwen3"]), "model_type is ['qwen3'], must be one of"),
    "no weights": (lambda model: (model / WEIGHTS).unlink(), f"has neither {WEIGHTS} nor {INDEX}"),
    "empty weights": (cut(0), f"model/{WEIGHTS} is not a complete safetensors file"),
    "truncated header": (cut(50), f"model/{WEIGHTS} is not a complete safetensors file"),
    "truncated data": (cut(-1000), f"model/{WEIGHTS} is not a complete safetensors file"),
    "weights of something else": (wrote(WEIGHTS, b"\xff" * 5000), f"model/{WEIGHTS} is not a complete"),
    "weights a pointer": (wrote(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"), "run `git lfs pull`"),
    "weights whole numbers": (whole_numbers, "25 not of floating point: lm_head.weight (I8)"),
    "index no JSON": (index_of("{"), f"model/{INDEX} is not JSON"),
    "index a list": (index_of("[]"), f"model/{INDEX} must hold a JSON object"),
    "index without map": (index_of("{}"), f"model/{INDEX} must map tensors to files beside it in weight_map"),
    "index of numbers": (index_of('{"weight_map": {"a": 1}}'), f"model/{INDEX} must map tensors to files"),
    "index leads out": (indexed_to("../../secret.safetensors"), f"model/{INDEX} must map tensors to files"),
    "shard missing": (indexed_to("model-00002-of-00002.safetensors"), "model-00002-of-00002.safetensors is missing"),
    "shard a folder": (indexed_to("."), f"model/{INDEX} must map tensors to files"),
    "tensor missing": (without_one, f"model/{SHARD} has no tensor model.norm.weight, as {INDEX} says"),
    "tokenizer no JSON": (wrote("tokenizer.json", "{"), "model.path=model holds no tokenizer"),
    "tokenizer binary": (wrote("tokenizer.json", b"\xff" * 1000), "model.path=model holds no tokenizer"),
    "generation no JSON": (wrote("generation_config.json", "{"), "model/generation_config.json is not JSON"),
    "generation a list": (wrote("generation_config.json", "[]"), "generation_config.json must hold a JSON object"),
    "end in text": (wrote("generation_config.json", '{"eos_token_id": ["a"]}'), "eos_token_id is ['a'], must be"),
    "template syntax": (wrote("chat_template.jinja", "{% for %}"), "has a chat template that fails"),
    "template undefined": (wrote("chat_template.jinja", "{{ messages[9].content.x }}"), "that fails"),
    "template division": (wrote("chat_template.jinja", "{{ 1 // 0 }}"), "has a chat template that fails"),
    "template huge": (wrote("chat_template.jinja", "{% for i in range(10**9) %}{% endfor %}"), "that fails"),
    "template endless": (wrote("chat_template.jinja", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"), "that fails"),
    "template escape": (wrote("chat_template.jinja", "{{ ''.__class__.__mro__ }}"), "has a chat template that fails"),
    "template commands": (
        wrote("chat_template.jinja", "{{ raise_exception('\x1b]52;c;aGk=\x07') }}"),
        r"has a chat template that fails on a user's message (\x1b]52;c;aGk=\x07)",
    ),
}  # fmt: skip
"""What is done to a model folder, and what is told."""


@pytest.mark.parametrize("case", MODELS)
def test_a_damaged_model_folder_is_named(folder: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    change, message = MODELS[case]
    change(folder / "model")
    assert message in dry_run(capsys)


DATA: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "holds no problem"),
    "gzip": (gzip.compress(json.dumps(PROBLEM).encode()), "is compressed with gzip: gunzip it"),
    "zip": (b"PK\x03\x04" + bytes(100), "is a zip archive: unpack it"),
    "UTF-16": (json.dumps(PROBLEM).encode("utf-16"), "is in UTF-16: convert it to UTF-8"),
    "binary": (b"\x93NUMPY\x01\x00\xff" * 500, "is not UTF-8"),
    "deep array": (b"[" * 100_000, "the JSON array is damaged"),
    "deep row": (b'{"question": ' + b"[" * 100_000 + b"\n", "is nested too deeply"),
    "parquet cut": (b"PAR1" + bytes(100), "is a damaged parquet file"),
    "commands": (b'{"question": "q", "answer": 1.5, "\\u001b]52;c;aGk=\\u0007": 1}\n' * 2, "answer=1.5 must be text"),
    "commands in ids": (b'{"id": "\\u001b]52;c;x\\u0007", "question": "q", "answer": "1"}\n' * 2, r"\x1b]52;c;x\x07"),
}  # fmt: skip


@pytest.mark.parametrize("case", DATA)
def test_a_file_that_holds_no_problems_is_named(folder: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    content, message = DATA[case]
    if case == "parquet cut":
        pytest.importorskip("pyarrow", reason="reading parquet needs pyarrow")
    (folder / "problems.jsonl").write_bytes(content)
    told = dry_run(capsys)
    assert message in told and "problems.jsonl" in told


def test_a_damaged_page_of_a_parquet_file_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pyarrow", reason="reading parquet needs pyarrow")
    from pyarrow import parquet, table

    rows = {"question": [f"{number}?" for number in range(1000)], "answer": ["1"] * 1000}
    parquet.write_table(table(rows), folder / "p.parquet", compression="snappy")
    whole = (folder / "p.parquet").read_bytes()
    (folder / "p.parquet").write_bytes(whole[:40] + b"\xff" * 360 + whole[400:])
    assert "p.parquet is a damaged parquet file" in dry_run(capsys, "data.train=p.parquet")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train=model"], "data.train=model must be an existing file"),
        (["data.train=/dev/zero"], "data.train=/dev/zero must be an existing file"),
        (["model.path=problems.jsonl"], "model.path=problems.jsonl must be an existing Hugging Face directory"),
        (["data.evaluation.math=gone.jsonl"], "data.evaluation.math=gone.jsonl must be an existing file"),
        (["run.name=../../first"], "run.name=../../first must name a folder below run.directory"),
        (["run=null"], "run=null must be a mapping"),
        (["run.seed=-1"], "run.seed=-1 must be at least 0"),
        (["optimizer.lr=.inf"], "optimizer.lr=inf must be a finite number"),
        (["grading.deadline_s=.nan"], "grading.deadline_s=nan must be a finite number"),
        ([r'run.name="\e]52;c;aGk=\a"'], "the text holds the control character U+001B"),
        (["sglang.tp_size=2"], "sglang.tp_size is decided by rollout.tensor_parallel"),
        (["sglang.port=1"], "sglang.port is decided by the program"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    assert message in dry_run(capsys, *overrides)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "must be a file of UTF-8 text"),
        (b"# only a comment\n", "holds no phrase"),
        (b"# held_out_wordings: 1/0\nthink.\n", "says 0 in a line that begins with #"),
    ],
)
def test_phrases_that_cannot_be_used_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    (folder / "phrases.txt").write_bytes(content)
    evolution = {"enabled": "true", "reflection.backend": "phrasebook", "reflection.phrases": "phrases.txt"}
    overrides = [f"evolution.{name}={value}" for name, value in evolution.items()]
    told = dry_run(capsys, *overrides, "hard.min_problems=1")
    assert f"evolution.reflection.phrases=phrases.txt {message}" in told


RUN_FOLDERS: dict[str, tuple[Change, str, str]] = {
    "under a file": (lambda root: None, "problems.jsonl", "problems.jsonl/first: Not a directory: a file stands where"),
    "a file": (lambda root: (root / "first").touch(), "runs", "written: runs/first is a file"),
    "a dangling link": (lambda root: (root / "first").symlink_to("/gone/x"), "runs", "runs/first: File exists"),
    "too long": (lambda root: None, "x" * 300, "File name too long: choose a shorter one"),
    **{
        f"{name} a folder": (
            lambda root, name=name: (root / "first" / name).mkdir(parents=True), "runs",
            f"runs/first/{name} is a folder where a file belongs: move it away",
        )
        for name in ("lock", "config.yaml", "metrics.jsonl", "hard_samples.jsonl", "history.jsonl", "stop")
    },
    **{
        f"{name} a file": (
            lambda root, name=name: ((root / "first").mkdir(), (root / "first" / name).touch()), "runs",
            f"runs/first/{name} is a file where a folder belongs: move it away",
        )
        for name in ("checkpoints", "engines", "rollouts", "evolution", "templates")
    },
    "word a folder": (
        lambda root: (root / "first/error-rank-0.txt").mkdir(parents=True), "runs", "error-rank-0.txt: Is a directory"
    ),
    "no folder of ours": (lambda root: None, "/proc/p2o", "/proc/p2o: No such file or directory: check the path"),
}  # fmt: skip
"""What is done below `runs`, the run's directory, and what is told when the run starts."""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "run.directory=/dev/null",
            "run.directory=/dev/null and run.name=first must name a folder that can be written",
        ),
        ("run.directory=problems.jsonl", "run.directory=problems.jsonl and run.name=first must name a folder"),
        (f"run.directory={'x' * 300}", "File name too long: choose a shorter one"),
        (f"run.name={'x' * 300}", "File name too long: choose a shorter one"),
        (f"run.name={'/'.join(['x' * 99] * 50)}", "File name too long: choose a shorter one"),
    ],
)
def test_a_run_folder_that_can_not_be_made_is_refused_by_the_dry_run(
    folder: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert message in dry_run(capsys, override)


@pytest.mark.parametrize(
    "override",
    [
        "grading.num_workers=100000",
        "rollout.num_engines=1000000",
        "parallel.tensor=100000",
        "evaluation.num_samples=1000000",
    ],
)
def test_an_absurd_count_is_refused_with_its_rule(
    folder: Path, capsys: pytest.CaptureFixture[str], override: str
) -> None:
    assert f"{override} must be at least 1 and at most " in dry_run(capsys, override)


@pytest.mark.parametrize("case", RUN_FOLDERS)
def test_a_run_folder_that_cannot_be_used_is_named(folder: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    change, directory, message = RUN_FOLDERS[case]
    (folder / "runs").mkdir()
    change(folder / "runs")
    assert message in refusal(capsys, "train", "run.yaml", "--set", f"run.directory={directory}")


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("run.yaml", "run.yaml: the file cannot be read (Permission denied)"),
        ("problems.jsonl", "problems.jsonl cannot be read (Permission denied)"),
        ("model/config.json", "model/config.json: Permission denied: check its owner and permissions"),
        (f"model/{WEIGHTS}", f"model/{WEIGHTS}: Permission denied: check its owner and permissions"),
        ("model/tokenizer.json", "model.path=model holds no tokenizer"),
    ],
)
def test_a_file_that_may_not_be_read_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    (folder / name).chmod(0)
    assert message in dry_run(capsys)


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_a_folder_that_may_not_be_written_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "runs").mkdir(mode=0o500)
    told = refusal(capsys, "train", "run.yaml")
    assert "runs/first: Permission denied: check its owner and permissions" in told


REPORTS: dict[str, tuple[str, str | bytes, str]] = {
    "results deep": ("results.json", "[" * 100_000, "results.json is nested too deeply"),
    "results binary": ("results.json", b"\xff\xfe", "results.json is not UTF-8"),
    "results without numbers": (
        "results.json",
        '{"evaluation": {"easy": {"accuracy": "x"}}}',
        "results.json holds no results of a run (_Re",
    ),
    "results a list": ("results.json", "[]", "results.json must hold a JSON object"),
    "library of another kind": ("templates/library-1.json", '{"version": "x"}', "library-1.json is no library"),
    "library of a number": ("templates/library-1.json", '{"version": 1, "templates": 3}', "library-1.json is no"),
    "settings no YAML": ("config.yaml", "{", "config.yaml cannot be read"),
    "settings deep": ("config.yaml", "[" * 5000, "config.yaml cannot be read (mappings and lists may be 32 deep"),
}


@pytest.mark.parametrize("case", REPORTS)
def test_a_damaged_file_of_a_run_costs_its_own_line_of_the_report(
    folder: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    name, content, message = REPORTS[case]
    run = folder / "runs" / "first"
    (run / "templates").mkdir(parents=True)
    (run / "metrics.jsonl").write_text(json.dumps(METRICS) + "\n")
    (run / name).write_bytes(content.encode() if isinstance(content, str) else content)
    assert main(["report", "runs/first"]) == 0
    told, answers = capsys.readouterr(), frozen_answers(run / "report.html")
    (line,) = told.err.splitlines()
    assert line == f"p2o: {answers['runs'][0]['damages'][0]}" and message in line
    (row,) = answers["report"]["overview"]["rows"]
    assert "50.0 %" in row["cells"], "the reward of metrics.jsonl is shown"
    if name == "results.json":
        assert f"first is left out: runs/first/{name}" in told.out and "results.json damaged" in row["cells"]


@pytest.mark.parametrize("output", ["problems.jsonl", "problems.jsonl/below", "/proc/p2o"])
def test_a_report_that_cannot_be_written_says_where(
    folder: Path, capsys: pytest.CaptureFixture[str], output: str
) -> None:
    run = folder / "runs" / "first"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text(json.dumps(METRICS) + "\n")
    assert f"{output}: " in refusal(capsys, "report", "runs/first", "--output", output)


@pytest.mark.parametrize(
    ("pointer", "message"),
    [
        ('{"step": 1}', "checkpoints/latest names no checkpoint beside it"),
        ("{", "checkpoints/latest is not JSON"),
        (b"\xff\0", "checkpoints/latest names no checkpoint beside it"),
        ("../../elsewhere", "checkpoints/latest names no checkpoint beside it"),
        ("step-000007", "checkpoints/step-000007 is no settings file, no checkpoint"),
    ],
)
def test_a_damaged_pointer_to_a_checkpoint_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], pointer: str | bytes, message: str
) -> None:
    latest = folder / "runs" / "first" / "checkpoints" / "latest"
    latest.parent.mkdir(parents=True)
    latest.write_bytes(pointer.encode() if isinstance(pointer, str) else pointer)
    assert message in refusal(capsys, "eval", str(latest), "--benchmark", "math=problems.jsonl")


@pytest.mark.parametrize("content", ['{"sets": {"math": 1}}', '{"sets": {"math": {}}}', "{}", b"\xff", "["])
def test_results_of_another_kind_are_not_compared(
    folder: Path, capsys: pytest.CaptureFixture[str], content: str | bytes
) -> None:
    (folder / "results.json").write_bytes(content.encode() if isinstance(content, str) else content)
    assert "results.json" in refusal(capsys, "eval", "--compare", ".", ".")


@pytest.mark.parametrize("change", [cut(50), config_with(hidden_size=0), index_of("{}")])
def test_the_doctor_finds_a_damaged_model(folder: Path, capsys: pytest.CaptureFixture[str], change: Change) -> None:
    change(folder / "model")
    assert main(["doctor", "run.yaml", "--strict"]) == 1
    found = [line for line in capsys.readouterr().out.splitlines() if "MISSING" in line and "model" in line]
    assert len(found) == 1


@pytest.mark.parametrize("machine", ["9" * 400 + "x80", "8x" + "9" * 400, "8x0", "8", "\x1b[31m"])
def test_no_machine_is_planned_that_cannot_be(folder: Path, capsys: pytest.CaptureFixture[str], machine: str) -> None:
    assert "--plan=" in refusal(capsys, "doctor", "run.yaml", "--plan", machine)
