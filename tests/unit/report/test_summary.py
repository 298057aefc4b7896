"""The summary of finished runs says what their results.json say, for every arm and seed."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_p2o.report.summary import print_table, summarize, write_summary


def finished_run(root: Path, arm: str, seed: int, hard: float, **more: Any) -> Path:
    directory = root / f"{arm}-seed{seed}"
    directory.mkdir()
    results = {
        "arm": arm,
        "seed": seed,
        "evaluation": {
            "heldout_hard": {"accuracy": hard, "num_samples": 64},
            "heldout_easy": {"accuracy": 0.98, "num_samples": 64},
        },
        "num_rollouts_train": 2304,
        "num_rollouts_evolution": 0,
        "wall_s": 181.4,
        **more,
    }
    (directory / "results.json").write_text(json.dumps(results))
    return directory


def templated(hard: float) -> dict[str, Any]:
    return {"heldout_hard": {"accuracy": hard, "num_samples": 64}}


def test_every_seed_is_reported_and_arms_keep_the_order_they_were_named_in(tmp_path: Path) -> None:
    runs = [
        finished_run(tmp_path, "p2o_n6", 2, 0.75, templated_evaluation=templated(0.9), pass_at_n_plain=0.01),
        finished_run(tmp_path, "grpo_n6", 1, 0.0),
        finished_run(tmp_path, "p2o_n6", 1, 1.0, templated_evaluation=templated(0.8), pass_at_n_plain=0.02),
    ]
    summary = summarize(runs)
    assert [(row["arm"], row["seed"]) for row in summary["runs"]] == [("p2o_n6", 1), ("p2o_n6", 2), ("grpo_n6", 1)]
    assert summary["runs"][0] == {
        "arm": "p2o_n6",
        "seed": 1,
        "accuracy": {"heldout_hard": 1.0, "heldout_easy": 0.98},
        "template_accuracy": {"heldout_hard": 0.8},
        "pass_at_n_plain": 0.02,
        "num_rollouts_train": 2304,
        "num_rollouts_evolution": 0,
        **{"learning_tokens": None, "trained_tokens": None, "gpu_h": None, "compute": {}},
        "wall_s": 181.4,
        "evaluation": {
            "heldout_hard": {"accuracy": 1.0, "num_samples": 64},
            "heldout_easy": {"accuracy": 0.98, "num_samples": 64},
        },
    }
    assert summary["runs"][2]["template_accuracy"] == {} and summary["runs"][2]["pass_at_n_plain"] is None
    assert summary["arms"]["p2o_n6"]["seeds"] == [1, 2]
    assert summary["arms"]["p2o_n6"]["accuracy"]["heldout_hard"] == {"mean": 0.875, "lowest": 0.75, "highest": 1.0}
    spread = summary["arms"]["p2o_n6"]["template_accuracy"]["heldout_hard"]
    assert (spread["lowest"], spread["highest"]) == (0.8, 0.9) and spread["mean"] == pytest.approx(0.85)


def test_an_unfinished_run_is_named_not_left_out(tmp_path: Path) -> None:
    (tmp_path / "grpo_n6-seed3").mkdir()
    summary = summarize([finished_run(tmp_path, "grpo_n6", 1, 0.0), tmp_path / "grpo_n6-seed3"])
    assert summary["unfinished"] == ["grpo_n6-seed3"]
    stream = io.StringIO()
    print_table(summary, stream)
    assert "grpo_n6-seed3 has not finished" in stream.getvalue()


def test_the_written_file_holds_the_summary(tmp_path: Path) -> None:
    run = finished_run(tmp_path, "grpo_n6", 1, 0.0)
    summary = write_summary([run], tmp_path / "out" / "summary.json")
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary == summarize([run])


def test_a_run_without_evaluation_sets_has_no_accuracies(tmp_path: Path) -> None:
    summary = summarize([finished_run(tmp_path, "p2o", 1, 0.0, evaluation={})])
    assert summary["runs"][0]["accuracy"] == summary["arms"]["p2o"]["accuracy"] == {}


def test_every_set_has_a_column_whatever_it_is_called(tmp_path: Path) -> None:
    aime, math = {"aime24": {"accuracy": 0.59}}, {"math500": {"accuracy": 0.9}}
    runs = [
        finished_run(tmp_path, "p2o_qwen3_4b", 1, 0.0, evaluation=aime | math, templated_evaluation=aime),
        finished_run(tmp_path, "grpo", 1, 0.0, evaluation={"math500": {"accuracy": 0.5}, "amc": {"accuracy": 0.25}}),
    ]
    stream = io.StringIO()
    print_table(summarize(runs), stream)
    header, *rows = ([cell.strip() for cell in re.split(r"  +", line)] for line in stream.getvalue().splitlines())
    accuracies = ["aime24", "math500", "amc", "aime24, best template"]
    assert header == ["arm", "seed", *accuracies, "training rollouts", "evolution rollouts", "seconds"]
    assert rows[0] == ["p2o_qwen3_4b", "1", "0.590", "0.900", "-", "0.590", "2304", "0", "181"]
    assert rows[1] == ["grpo", "1", "-", "0.500", "0.250", "-", "2304", "0", "181"]


def test_hours_of_no_gpu_are_no_number(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path, "cpu", 1, 0.0, compute={"gpu_h": 0.0})]
    runs.append(finished_run(tmp_path, "gpu", 1, 0.0, compute={"gpu_h": 0.25}))
    stream = io.StringIO()
    print_table(summarize(runs), stream)
    header, *rows = ([cell.strip() for cell in re.split(r"  +", line)] for line in stream.getvalue().splitlines())
    assert [row[header.index("GPU hours")] for row in rows] == ["no GPU", "0.250"]


def test_the_table_outside_a_terminal_is_one_plain_line_per_run(tmp_path: Path) -> None:
    stream = io.StringIO()
    runs = [finished_run(tmp_path, "grpo_n6", 1, 0.015625), finished_run(tmp_path, "p2o_n6", 1, 0.96875)]
    print_table(summarize(runs), stream)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[1].split() == ["grpo_n6", "1", "0.016", "0.980", "2304", "0", "181"]
    assert "\x1b" not in stream.getvalue()


def test_results_that_are_damaged_or_nameless_cost_their_own_line(tmp_path: Path) -> None:
    run, other = finished_run(tmp_path, "p2o", 1, 0.5), finished_run(tmp_path, "grpo", 1, 0.5)
    (run / "results.json").write_text('{"arm": "p2o", ')
    summary = summarize([run, other])
    assert "p2o-seed1/results.json is not JSON" in summary["damaged"]["p2o-seed1"]
    assert [row["arm"] for row in summary["runs"]] == ["grpo"] and summary["unfinished"] == []
    (run / "results.json").write_text('{"arm": "p2o"}')
    assert "p2o-seed1/results.json must name arm and seed" in summarize([run, other])["damaged"]["p2o-seed1"]
    stream = io.StringIO()
    print_table(summarize([run, other]), stream)
    assert stream.getvalue().splitlines()[-1].startswith("p2o-seed1 is left out: ")
