"""`data.train` as settings files write it: one path, a list, or tasks by name."""

from pathlib import Path

import pytest

from megatron_p2o.config.read import ConfigError, dump_config, load_config
from megatron_p2o.config.tree import GradingConfig, TaskConfig, one_task

REQUIRED = "run: {name: first}\nmodel: {path: model}\ndata: {train: train.jsonl}\n"


def write(directory: Path, text: str, name: str = "run.yaml") -> Path:
    path = directory / name
    path.write_text(text)
    return path


CODE = TaskConfig(file="code.jsonl", weight=0.5, grading=GradingConfig(num_workers=7))


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("a.jsonl", one_task("a.jsonl")),
        ('""', one_task("")),
        ("[data/a.jsonl, b.c.parquet]", {"a": TaskConfig(file="data/a.jsonl"), "b_c": TaskConfig(file="b.c.parquet")}),
        (
            "[{file: a.jsonl, weight: 2}, {name: code, file: code.jsonl, weight: 0.5, grading: {num_workers: 7}}]",
            {"a": TaskConfig(file="a.jsonl", weight=2.0), "code": CODE},
        ),
        (
            "{math: a.jsonl, code: {file: code.jsonl, weight: 0.5, grading: {num_workers: 7}}}",
            {"math": TaskConfig(file="a.jsonl"), "code": CODE},
        ),
    ],
)
def test_tasks_are_a_path_a_list_or_a_mapping_by_name(
    tmp_path: Path, written: str, expected: dict[str, TaskConfig]
) -> None:
    text = REQUIRED.replace("train.jsonl", written)
    config = load_config(write(tmp_path, text))
    assert config.data.train == expected
    assert load_config(write(tmp_path, dump_config(config), "dumped.yaml")) == config
    assert load_config(write(tmp_path, REQUIRED), [f"data.train={written}"]).data.train == expected


def test_a_list_of_tasks_takes_the_place_of_another_and_a_mapping_adds_to_it(tmp_path: Path) -> None:
    write(tmp_path, REQUIRED.replace("train.jsonl", "[a.jsonl, {name: code, file: b.jsonl, weight: 3}]"), "base.yaml")
    base = write(tmp_path, "base: base.yaml\n")
    assert list(load_config(base, ["data.train=[c.jsonl]"]).data.train) == ["c"]
    assert load_config(base, ["data.train=c.jsonl"]).data.train == one_task("c.jsonl")
    changed = load_config(base, ["data.train.code.weight=1", "data.train.more=d.jsonl"]).data.train
    assert changed["code"] == TaskConfig(file="b.jsonl", weight=1.0) and list(changed) == ["a", "code", "more"]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("[a/x.jsonl, b/x.jsonl]", "data.train lists two records called x: give one of them another `name:`"),
        ("[{name: a}]", "data.train.a=(a mapping) must be a file, or a mapping: write `file:` below it"),
        ("[{name: a, weight: 1}]", "data.train.a.file is missing"),
        ("[{file: a.jsonl, weigth: 1}]", "data.train.a.weigth is not a setting: did you mean data.train.a.weight?"),
        ("[{file: a.jsonl, weight: 0}]", "data.train.a.weight=0.0 must be greater than 0"),
        ("[{file: a.jsonl, grading: 5}]", "data.train.a.grading=5 must be a mapping"),
        ("[{file: a.jsonl, grading: {num_workers: 0}}]", "data.train.a.grading.num_workers=0 must be at least 1"),
        ("[{file: a.jsonl, question_format: x}]", "data.train.a.question_format must contain {question}"),
        ("[{name: a.b, file: a.jsonl}]", "data.train.a.b must have a name of at most 64 letters"),
        ("[{name: train, file: a.jsonl}, b.jsonl]", "data.train.train must have a name"),
        (
            "a.jsonl, evaluation: {m: {file: m, task: b}}",
            "data.evaluation.m.task=b must name a task of data.train (train)",
        ),
        (
            "~",
            "data.train=~ must be a path, a list of paths or of records with `name:`, or a mapping of records by name",
        ),
        ("[]", "data.train is missing"),
    ],
)
def test_a_wrong_task_is_named_with_its_rule(tmp_path: Path, written: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, REQUIRED.replace("train.jsonl", written)))
    assert any(message in str(problem) for problem in error.value.problems), error.value.problems
