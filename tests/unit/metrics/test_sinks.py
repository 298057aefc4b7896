"""What sinks leave behind, also after a kill and a resume."""

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_p2o.config.tree import LoggingConfig
from megatron_p2o.metrics.console import ConsoleSink, TimeLeft
from megatron_p2o.metrics.jsonl import read_lines
from megatron_p2o.metrics.log import open_metrics_log
from megatron_p2o.metrics.rollouts import RolloutWriter
from megatron_p2o.metrics.sinks.record import JsonlSink, StepRecord
from megatron_p2o.metrics.values import Last, Mean
from megatron_p2o.testing.fakes import FakeRenderer, fake_token_ids
from megatron_p2o.types import (
    PLAIN,
    Completion,
    ContextShift,
    Grade,
    Group,
    Problem,
    Prompt,
    Rollout,
    Template,
    TokenShifts,
)

QUIET = LoggingConfig(console=False)


def record(step: int, **metrics: float) -> StepRecord:
    return StepRecord(step=step, epoch=0, time="2026-01-31T12:00:00+00:00", metrics=metrics)


def steps_in(path: Path) -> list[int]:
    return [line["step"] for line in read_lines(path)]


def test_a_line_is_readable_before_the_sink_is_closed(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write(record(1, loss=0.5))
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1,
        "epoch": 0,
        "time": "2026-01-31T12:00:00+00:00",
        "metrics": {"loss": 0.5},
    }
    sink.close()


def test_numbers_that_are_not_finite_become_null_and_the_line_stays_strict_json(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write(record(1, nan=float("nan"), infinite=float("inf"), finite=1.0))
    sink.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line["metrics"] == {"nan": None, "infinite": None, "finite": 1.0}


def test_a_resumed_run_writes_each_step_once_and_keeps_what_it_took_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    killed = JsonlSink(path)
    for step in (0, 1, 2, 3):
        killed.write(record(step))
    killed.close()
    with path.open("a") as file:
        file.write('{"step": 4, "epo')  # the kill came in the middle of a line

    resumed = JsonlSink(path, num_kept=3)
    resumed.write(record(3))
    resumed.close()

    assert steps_in(path) == [0, 1, 2, 3]
    discarded = (tmp_path / "metrics.jsonl.discarded").read_text().splitlines()
    assert [discarded[0][:10], discarded[1]] == ['{"step": 3', '{"step": 4, "epo']


def test_a_fresh_start_in_an_old_folder_begins_with_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):
        sink = JsonlSink(path)
        sink.write(record(0))
        sink.close()
    assert steps_in(path) == [0]


def test_reading_passes_over_a_line_that_is_being_written_and_names_a_broken_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    assert steps_in(path) == [1]
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    assert steps_in(path) == [1, 2]
    assert "metrics.jsonl:2 is damaged" in caplog.text
    assert steps_in(tmp_path / "missing.jsonl") == []


def test_the_log_reduces_before_it_writes(tmp_path: Path) -> None:
    with open_metrics_log(tmp_path, "run", QUIET, num_steps=3) as log:
        log.announce("rolling out")
        log.write(1, 0, {"rollout/reward_mean": Mean(3, 4), "rollout/reward_templated": Mean(0, 0)})
        log.write(2, 1, {"library/version": Last(7)})
    lines = list(read_lines(tmp_path / "metrics.jsonl"))
    assert [line["metrics"] for line in lines] == [{"rollout/reward_mean": 0.75}, {"library/version": 7.0}]
    assert [line["epoch"] for line in lines] == [0, 1]


@pytest.mark.parametrize(
    ("logging", "module", "message"),
    [
        (
            LoggingConfig(console=False, tensorboard=True),
            "tensorboard",
            "logging.tensorboard=true needs .*pip install tensorboard",
        ),
        (
            LoggingConfig(console=False, wandb_project="p2o"),
            "wandb",
            "logging.wandb_project=p2o needs .*pip install wandb",
        ),
    ],
)
def test_a_sink_whose_package_is_missing_says_what_to_install_and_moves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logging: LoggingConfig, module: str, message: str
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    monkeypatch.setitem(sys.modules, module, None)  # what an absent package looks like to `import`
    with pytest.raises(ValueError, match=message):
        open_metrics_log(tmp_path, "run", logging, num_steps=3)
    assert steps_in(tmp_path / "metrics.jsonl") == [1]


def test_optional_services_are_not_imported_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    open_metrics_log(tmp_path, "run", QUIET, num_steps=3).close()


def test_without_a_terminal_the_console_prints_one_plain_line_per_step() -> None:
    stream = io.StringIO()
    sink = ConsoleSink(20, stream)
    sink.announce("rolling out [1/2]")
    metrics = {"rollout/reward_mean": 0.25, "train/loss": -0.5, "eval/hard/avg": 0.125, "other/key": 1.0}
    sink.write(StepRecord(step=7, epoch=1, time="", metrics={**metrics, "train/non_finite_updates_count": 0.0}))
    sink.close()
    assert stream.getvalue() == (
        "rolling out [1/2]\nstep    7/20  epoch 1  eval/hard 0.125  reward 0.250  loss -0.5000\n"
    )


def test_without_a_terminal_the_row_of_a_step_tells_the_time_left() -> None:
    stream = io.StringIO()
    sink = ConsoleSink(20, stream)
    sink.write(record(19, **{"perf/step_s": 90.0}))
    sink.write(record(19, **{"eval/hard/avg": 0.5}))
    sink.write(record(20, **{"perf/step_s": 90.0}))
    sink.close()
    first, evaluation, last = stream.getvalue().splitlines()
    assert first.endswith("  about 1 min 30 s left")
    assert "left" not in evaluation and "left" not in last


def test_the_time_left_is_what_the_newest_steps_took_with_all_between_them() -> None:
    now = [1000.0]
    left = TimeLeft(100, lambda: now[0])
    assert left.after(record(11, **{"perf/step_s": 10.0})) == "about 14 min 50 s left"
    now[0] += 30.0  # a step of 10 s, and an evaluation before it
    assert left.after(record(12, **{"perf/step_s": 10.0})) == "about 29 min 20 s left"
    told = ""
    for step in range(13, 60):
        now[0] += 5.0
        told = left.after(record(step, **{"perf/step_s": 5.0}))
    assert told == "about 3 min 25 s left", "41 steps of 5 s: what was slow is long ago"
    assert left.after(record(60)) == ""


def test_on_a_terminal_rows_scroll_above_a_live_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    sink = ConsoleSink(20, stream)
    sink.announce("rolling out")
    sink.write(record(7, **{"rollout/reward_mean": 0.25}))
    sink.close()
    assert "reward 0.250" in stream.getvalue()
    assert "7/20" in stream.getvalue()
    assert "rolling out" in stream.getvalue()


def group_of(problem: Problem, templates: list[Template]) -> Group:
    rollouts = [
        Rollout(
            completion=Completion(
                prompt=Prompt(
                    problem=problem,
                    template=template,
                    sampling_ids=np.arange(5 + len(template.text), dtype=np.int32),
                    training_ids=np.arange(5, dtype=np.int32),
                ),
                token_ids=fake_token_ids("\x01é\n\u2028"[: 3 + index]),
                logprobs=np.zeros(3 + index, dtype=np.float32),
                finish_reason="stop",
                weight_versions=(4, 5),
            ),
            grade=Grade(reward=float(bool(template.text))),
        )
        for index, template in enumerate(templates)
    ]
    return Group(problem=problem, rollouts=tuple(rollouts), advantages=tuple(r.reward - 0.5 for r in rollouts))


def test_rollout_lines_say_what_was_asked_how_and_what_came_of_it(tmp_path: Path) -> None:
    problem = Problem(id="h1", question="2+2?", answer="4", level="hard")
    group = group_of(problem, [PLAIN, Template(id=9, text="<b>think</b>", parent=0)])
    shift = ContextShift(head_sum=3.0, head_tokens=2, rest_sum=1.0, rest_tokens=2)
    shifts = {("h1", 1): shift, ("h2", 0): replace(shift, head_sum=9.0)}
    path = RolloutWriter(tmp_path).write(12, [group], FakeRenderer(), shifts)
    assert path.name == "step-000012.jsonl"
    plain, templated = read_lines(path)
    assert plain["problem_id"] == "h1" and plain["question"] == "2+2?" and plain["answer"] == "4"
    assert (plain["template_id"], plain["is_templated"], plain["is_solved"], plain["reward"]) == (0, False, False, 0)
    assert (templated["template_id"], templated["is_templated"], templated["is_solved"]) == (9, True, True)
    assert (plain["template"], templated["template"]) == ("", "<b>think</b>")
    assert templated["advantage"] == 0.5
    assert templated["response"] == "\x01é\n\u2028"
    assert (templated["num_prompt_tokens"], templated["num_response_tokens"]) == (17, 4)
    assert templated["weight_versions"] == [4, 5]
    assert [templated[f"shift_{part}per_token"] for part in ("", "head_", "rest_")] == [1.0, 1.5, 0.5]
    assert [plain[f"shift_{part}per_token"] for part in ("", "head_", "rest_")] == [None] * 3


def test_the_first_tokens_of_a_templated_rollout_are_written_as_columns(tmp_path: Path) -> None:
    group = group_of(Problem(id="h1", question="2+2?", answer="4"), [PLAIN, Template(id=9, text="think", parent=0)])
    tokens = TokenShifts(
        shifts=np.array([0.00049, -2.5, np.nan], np.float32), kept=np.array([1, 0, np.nan], np.float32)
    )
    shift = ContextShift(head_sum=3.0, head_tokens=2, rest_sum=0.0, rest_tokens=0, tokens=tokens)
    plain, templated = read_lines(RolloutWriter(tmp_path).write(1, [group], FakeRenderer(), {("h1", 1): shift}))
    assert "tokens" not in plain
    assert templated["tokens"] == {
        "lengths": [1, 1, 1],
        "sampling_logprobs": [0, 0, 0],
        "shifts": [0.0, -2.5, None],
        "kept": [1, 0, None],
    }


def test_a_rollout_without_a_verdict_has_no_reward_in_the_file(tmp_path: Path) -> None:
    group = group_of(Problem(id="h1", question="2+2?", answer="4"), [PLAIN])
    (rollout,) = group.rollouts
    undecided = replace(group, rollouts=(replace(rollout, grade=Grade.undecided("crashed")),))
    (line,) = read_lines(RolloutWriter(tmp_path).write(1, [undecided], FakeRenderer(), {}))
    assert (line["is_solved"], line["reward"], line["reason"]) == (False, None, "crashed")


def test_a_resumed_run_moves_the_rollouts_of_later_steps_away(tmp_path: Path) -> None:
    group = group_of(Problem(id="h", question="?", answer="1"), [PLAIN])
    writer = RolloutWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write(step, [group], FakeRenderer(), {})
    RolloutWriter(tmp_path, keep_through_step=2)
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == ["step-000001.jsonl", "step-000002.jsonl"]
    assert (tmp_path / "discarded" / "step-000003.jsonl").exists()
