"""What is wrong with problems, prompts and packages is said before anything starts: dry run, doctor and start alike."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import yaml

from megatron_p2o.cli import BAD_INPUT, main
from megatron_p2o.config.tree import LoggingConfig
from megatron_p2o.metrics.sinks.registry import sink_problems
from megatron_p2o.run.inputs import (
    Inputs,
    check_hard_set,
    evolution_notice,
    missing_packages,
    notices,
    planned_work,
    unknown_tokens,
)
from megatron_p2o.testing.fakes import fake_config, fake_problem
from megatron_p2o.testing.tiny_model import write_tiny_qwen3
from megatron_p2o.tiny.model import build_tokenizer
from megatron_p2o.types import Problem, Template

NUM_PROBLEMS = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("tiny"), max_positions=200)


@pytest.fixture
def settings_file(tmp_path: Path, model: Path) -> Path:
    """Return settings that have nothing wrong: eight problems of a prompt of 54 tokens."""
    for name in ("train", "held"):
        rows = ({"id": f"{name}{number}", "question": f"{number}+1", "answer": "2"} for number in range(NUM_PROBLEMS))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "phrases.txt").write_text("Think.\n")
    sections: dict[str, Any] = {
        "run": {"name": "test", "directory": str(tmp_path)},
        "model": {"path": str(model), "dtype": "float32"},
        "data": {
            "train": str(tmp_path / "train.jsonl"),
            "evaluation": {"held": str(tmp_path / "held.jsonl")},
            "question_format": "{question}",
        },
        "schedule": {"problems_per_step": 3, "problems_per_update": 3, "epochs": 2},
        "rollout": {"max_new_tokens": 100},
        "hard": {"min_problems": 6},
        "evolution": {"reflection": {"backend": "phrasebook", "phrases": str(tmp_path / "phrases.txt")}},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def unaligned(line: str) -> str:
    """Return a line of the dry run's two columns as one."""
    return re.sub(r"^  (\S(?:\S| (?! ))*?) {2,}(?=\S)", r"\1: ", line).strip()


def said(settings_file: Path, capsys: pytest.CaptureFixture[str], **settings: object) -> str:
    """Return what the dry run prints; the doctor must find the same missing, or nothing."""
    overrides = [word for name, value in settings.items() for word in ("--set", f"{name.replace('__', '.')}={value}")]
    capsys.readouterr()
    status = main(["train", str(settings_file), "--dry-run", *overrides])
    printed = capsys.readouterr()
    assert main(["doctor", str(settings_file), "--strict", *overrides]) == (1 if status else 0)
    findings = capsys.readouterr().out
    if status == 0:
        return "\n".join(unaligned(line) for line in printed.out.splitlines())
    assert status == BAD_INPUT
    for line in printed.err.removeprefix("p2o: ").splitlines():
        assert line.strip() in findings or line.endswith(" problems:"), "doctor and dry run say the same"
    assert "MISSING" in findings
    return printed.err


def test_nothing_wrong_is_summed_up(settings_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    title, *lines = said(settings_file, capsys).splitlines()
    machine = lines[lines.index("machine:") :]
    assert title == "problems and plan:"
    assert machine[1].startswith("layout: tensor 1 x pipeline 1 x context 1 x data ")
    assert any(re.match(r"disk: .* GiB free in .*; 4 checkpoints of \d+\.\d MiB and at most", line) for line in machine)
    assert machine[-1] == "nothing is missing: the run can start"
    columns = "question `question`, gold answer `answer`, id `id` or a hash of the question"
    assert [lines.pop(0), lines.pop(0)] == [f"data.train: {columns}", f"data.evaluation.held: {columns}"]
    assert lines[0] == "train: 8 problems, 2 steps in each of 2 epochs"
    assert lines.pop(1) == "whole run: 4 steps, 72 training rollouts of at most 7,200 tokens in all"
    assert lines[1] == "evaluation.held: 8 problems"
    # <|im_start|>user\n…<|im_end|>\n<|im_start|>assistant\n of one token a character, but for the special tokens.
    num_tokens = len("*user\n0+1*\n*assistant\n")
    assert lines[2] == f"first prompt: {num_tokens} tokens"
    assert lines[3] == f"longest prompt: {num_tokens} tokens, no more than the 100 that rollout.max_new_tokens=100 " + (
        "leaves of the model's 200 positions"
    )


def test_the_reward_of_each_task_is_loaded_and_named(settings_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = settings_file.parent

    def with_reward(reward: str) -> str:
        other = f"{{name: other, file: {folder}/held.jsonl, grading: {{function: {reward}}}}}"
        return f"[{{name: math, file: {folder}/train.jsonl}}, {other}]"

    sets = {"data__evaluation__held__task": "other"}
    assert "rewards: math" in said(settings_file, capsys).splitlines()
    assert "rewards: math: math, other: exact" in said(settings_file, capsys, data__train=with_reward("exact"), **sets)
    told = said(settings_file, capsys, data__train=with_reward("no_such_reward"), **sets)
    assert "no_such_reward" in told


def test_the_mix_of_tasks_is_summed_up(settings_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = f"[{{name: math, file: {settings_file.parent}/train.jsonl, weight: 4}}, {settings_file.parent}/held.jsonl]"
    lines = said(settings_file, capsys, data__train=tasks).splitlines()
    assert "train: 16 problems, 3 steps in each of 2 epochs" in lines
    assert [line for line in lines if "an epoch asks" in line] == [
        "data.train.math: an epoch asks 8 of 8 problems",
        "data.train.held: an epoch asks 2 of 8 problems",
        "prompts of data.train.held do not evolve: an epoch asks 2 of its problems, fewer than hard.min_problems=6",
    ]


@pytest.mark.parametrize("name", ["train", "held"])
def test_a_problem_that_does_not_fit_beside_its_response_is_named(
    name: str, settings_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (settings_file.parent / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps({"id": "long", "question": "1+" * 50, "answer": "2"}) + "\n")
    assert "problem long asked plainly takes 119 tokens, more than the 100 that rollout.max_new_tokens=100 leaves" in (
        said(settings_file, capsys)
    )
    assert "longest prompt: 119 tokens" in said(settings_file, capsys, rollout__max_new_tokens=81)


def test_a_response_that_fills_the_context_is_refused(settings_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = "rollout.max_new_tokens=200 leaves no room for a prompt in the 200 positions"
    assert expected in said(settings_file, capsys, rollout__max_new_tokens=200)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"schedule.max_steps": 3},
            "3 steps, where schedule.max_steps=3 ends it, 72 training rollouts of at most 576 tokens in all",
        ),
        ({"schedule.max_steps": 4}, "4 steps, 96 training rollouts of at most 768 tokens in all"),
        (
            {"evolution.plain_rollouts": 5},
            "4 steps, 96 training rollouts of at most 768 tokens in all, and 5 further rollouts of hard problems an "
            "epoch",
        ),
        (
            {"rollout.group_size": 2, "schedule.max_steps": 9},
            "4 steps, 24 training rollouts of at most 192 tokens in all",
        ),
        (
            {"schedule.max_batches_per_step": 2},
            "at most 4 steps, at most 96 training rollouts of at most 768 tokens in all",
        ),
        (
            {"schedule.max_batches_per_step": 2, "schedule.max_steps": 1},
            "at most 1 steps, where schedule.max_steps=1 ends it, at most 48 training rollouts of at most 384 tokens "
            "in all",
        ),
    ],
)
def test_the_whole_run_is_counted_with_the_limit_of_its_steps(settings: dict[str, int], expected: str) -> None:
    schedule = {"schedule.problems_per_step": 3, "schedule.problems_per_update": 3, "schedule.epochs": 2}
    config = fake_config({"rollout.group_size": 8, **schedule, **settings})
    assert planned_work(config, num_steps_per_epoch=2) == f"whole run: {expected}"


def test_an_epoch_that_never_has_enough_hard_problems_is_refused(
    settings_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = "hard.min_problems=7 must be at most the 6 problems of data.train that an epoch asks"
    assert expected in said(settings_file, capsys, hard__min_problems=7)
    said(settings_file, capsys, hard__min_problems=7, evolution__enabled="false")


def test_hard_problems_are_counted_among_those_that_an_epoch_asks() -> None:
    config = fake_config({"hard.min_problems": 100, "schedule.problems_per_step": 64, "evolution.enabled": True})
    check_hard_set(config, {"train": 128})
    for num_problems in (64, 100, 127):
        with pytest.raises(ValueError, match=r"at most the 64 problems"):
            check_hard_set(config, {"train": num_problems})
    check_hard_set(config, {"train": 63})  # too few for a step, which is said elsewhere


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"schedule.epochs": 2}, None),
        ({"schedule.epochs": 1}, "schedule.epochs=1"),
        ({"schedule.epochs": 1, "evolution.enabled": False}, None),
        (
            {"schedule.epochs": 2, "schedule.max_steps": 10},
            "schedule.max_steps=10 ends the run in the first, of 10 steps",
        ),
        ({"schedule.epochs": 2, "schedule.max_steps": 11}, None),
    ],
)
def test_a_schedule_on_which_no_prompts_evolve_is_said(settings: dict[str, Any], said: str | None) -> None:
    notice = evolution_notice(fake_config({"evolution.enabled": True, **settings}), num_steps_per_epoch=10)
    assert (notice is None) == (said is None)
    assert said is None or said in (notice or "")


def test_a_warm_up_that_outlasts_the_run_is_said() -> None:
    def said_of(setting: str, value: float) -> list[str]:
        schedule = {"schedule.epochs": 2, "schedule.problems_per_step": 128, "schedule.problems_per_update": 64}
        settings = {**schedule, setting: value, "optimizer.lr": 1e-6}
        return notices(fake_config({"evolution.enabled": False, **settings}), num_steps_per_epoch=10)

    assert said_of("optimizer.warmup_steps", 39) == said_of("optimizer.warmup_share", 0.97) == []
    assert "optimizer.warmup_share=0.99" in said_of("optimizer.warmup_share", 0.99)[0]
    assert said_of("optimizer.warmup_steps", 79) == [
        "the learning rate never reaches optimizer.lr=1e-06, it ends at 5e-07: optimizer.warmup_steps=79 makes "
        "warm-up last for all 40 optimizer steps of the run"
    ]


@pytest.mark.parametrize(
    ("name", "value", "needed", "said"),
    [
        *(
            (f"objective.{name}", value, {"objective.context": "ratio_mask"}, "objective.context=ratio_mask")
            for name, value in (("ratio_low", 0.5), ("ratio_high", 2.0), ("ratio_form", "soft"))
        ),
        ("objective.distill_beta", 0.5, {"objective.context": "distill"}, "objective.context=distill"),
        ("objective.dual_clip", 5.0, {"objective.surrogate": "ppo"}, "objective.surrogate=ppo"),
        ("objective.kl_estimator", "k2", {"objective.kl_coefficient": 0.1}, "objective.kl_coefficient above 0"),
        ("objective.kl_as", "reward", {"objective.kl_coefficient": 0.1}, "objective.kl_coefficient above 0"),
    ],
)
def test_a_setting_without_effect_beside_the_others_is_said(
    name: str, value: object, needed: dict[str, Any], said: str
) -> None:
    others = {"objective.context": "importance", "objective.surrogate": "gspo", "evolution.enabled": False}
    found = [*notices(fake_config(others), 10), *notices(fake_config({**others, name: value, **needed}), 10)]
    assert found == []
    idle = notices(fake_config({**others, name: value}), 10)
    assert idle == [f"{name}={value} has no effect: it acts only with {said}"]


def test_a_tokenizer_of_another_model_is_refused(
    settings_file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    other = write_tiny_qwen3(tmp_path / "other", vocab_size=128)
    said(settings_file, capsys, model__path=other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["+"] = 130
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    expected = "has a tokenizer of another model: prompts hold token 130, and config.json says vocab_size=128"
    assert expected in said(settings_file, capsys, model__path=other)


def test_files_that_are_not_there_are_missing(settings_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (settings_file.parent / "held.jsonl").unlink()
    assert "data.evaluation.held=" in said(settings_file, capsys)


def test_packages_that_the_settings_need_are_missing(
    settings_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    needed = ("tensorboard", "wandb", "mlflow", "trackio", "pyarrow")
    for package in needed:
        monkeypatch.setitem(sys.modules, package, None)  # what an absent package looks like
    (tmp_path / "held.jsonl").write_bytes(b"PAR1....")
    sinks = ("tensorboard=true", "wandb_project=p2o", "mlflow_experiment=p2o", "trackio_project=p2o")
    settings = [word for sink in sinks for word in ("--set", f"logging.{sink}")]
    assert main(["train", str(settings_file), "--dry-run", *settings]) == 0, "settings for a cluster, on a laptop"
    printed = capsys.readouterr().out
    assert main(["doctor", str(settings_file), "--strict", *settings]) == 1
    told = capsys.readouterr().out
    for package in needed:
        assert f"pip install {package}" in printed and f"pip install {package}" in told
    overrides = ["--set", "logging.tensorboard=true"]
    assert main(["train", str(settings_file), *overrides]) == BAD_INPUT, "nothing is started"
    assert not (tmp_path / "test").exists()
    target = ["eval", str(settings_file), "--output", str(tmp_path / "out")]
    assert main(target) == BAD_INPUT
    assert "pip install pyarrow" in capsys.readouterr().err


def test_a_folder_named_like_a_package_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (sentence,) = sink_problems(LoggingConfig(wandb_project="p2o"))
    assert sentence.startswith("logging.wandb_project=p2o needs the package wandb")
    config = fake_config()
    assert missing_packages(replace(config, logging=LoggingConfig())) == []


def test_a_sink_of_ones_own_is_checked_by_the_dry_run(
    settings_file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    settings_file.write_text(settings_file.read_text() + "logging:\n  sinks:\n    gone.module:Sink: {}\n")
    assert main(["train", str(settings_file), "--dry-run"]) == BAD_INPUT
    assert "logging.sinks.gone.module:Sink cannot be imported" in capsys.readouterr().err
    assert not (tmp_path / "test").exists()


def test_a_reflector_of_ones_own_is_checked_by_the_dry_run(
    settings_file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code = tmp_path / "writer.py"
    code.write_text("def write(problem, response):\n    return ''\n")
    sections = yaml.safe_load(settings_file.read_text())
    sections["evolution"] = {"reflection": {"backend": f"{code}:write"}}
    settings_file.write_text(yaml.safe_dump(sections))
    assert main(["train", str(settings_file), "--dry-run"]) == BAD_INPUT
    told = capsys.readouterr().err
    assert f"evolution.reflection.backend={code}:write has the signature (problem, response)" in told
    assert "must be callable as (request)" in told
    sections["evolution"]["enabled"] = False
    settings_file.write_text(yaml.safe_dump(sections))
    assert main(["train", str(settings_file), "--dry-run"]) == 0


def test_a_reward_that_reads_a_column_that_is_not_there_is_told_of_by_the_dry_run(
    settings_file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code = tmp_path / "length.py"
    code.write_text("def reward(problem, response, finish_reason):\n    return problem.columns['minimun'] > 3\n")
    sections = yaml.safe_load(settings_file.read_text())
    sections["grading"] = {"function": f"{code}:reward"}
    settings_file.write_text(yaml.safe_dump(sections))
    assert main(["train", str(settings_file), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert f"{code}:reward leaves an empty response to problem train0 undecided: " in told
    assert "KeyError: 'minimun'" in told
    code.with_name("better.py").write_text("def reward(problem, response, finish_reason):\n    return 0.0\n")
    sections["grading"] = {"function": f"{tmp_path}/better.py:reward"}
    settings_file.write_text(yaml.safe_dump(sections))
    assert main(["train", str(settings_file), "--dry-run"]) == 0
    assert "undecided" not in capsys.readouterr().out


def test_a_tokenizer_that_does_not_know_the_questions_is_told() -> None:
    """The tiny policy of the examples knows its own words alone; byte-level tokenizers know every text."""
    tokenizer = build_tokenizer()

    def found(*questions: str, known: bool = False) -> list[str]:
        def render(problem: Problem, template: Template) -> Any:
            return SimpleNamespace(training_ids=np.array(tokenizer.encode(problem.question)))

        renderer = SimpleNamespace(tokenizer=SimpleNamespace(unk_token_id=None) if known else tokenizer, render=render)
        asked = [replace(fake_problem(number), question=question) for number, question in enumerate(questions)]
        return unknown_tokens(Inputs(renderer=cast(Any, renderer), train=asked, evaluation={"held": asked[:1]}))

    assert found("affine + : 31 30") == []
    (line,) = found("affine + : 31 30", "Let's think")
    assert line.startswith("unknown words: 1 of 3 prompts hold what the model's tokenizer does not know")
    assert found("Let's think", known=True) == []
