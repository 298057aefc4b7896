"""Evaluations whose rewards lie between 0 and 1 tell the mean reward beside the accuracy; others do not."""

import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from megatron_p2o.evaluation.benchmark import Subject, results_of
from megatron_p2o.evaluation.comparison import compare
from megatron_p2o.evaluation.outcome import Evaluation, GradedResponse, evaluation_of, evaluation_record
from megatron_p2o.evaluation.tables import print_comparison, print_results
from megatron_p2o.report.content import overview_of
from megatron_p2o.report.figures import by_source, training_figures
from megatron_p2o.report.summary import print_table, summarize
from megatron_p2o.testing.fakes import fake_config
from megatron_p2o.types import Grade, Problem
from megatron_p2o.view.runs import ViewedRun

Rewards = Sequence[Sequence[float | None]]
"""Of each problem's responses; None: undecided."""


def outcome_of(rewards: Rewards, solved_at: float = 0.75) -> Evaluation:
    problems = [Problem(id=f"p{number}", question="q", answer="a") for number in range(len(rewards))]
    responses = [
        GradedResponse(
            problem_id=problem.id,
            sample=sample,
            grade=Grade(reward=reward),
            solved_at=solved_at,
            finish_reason="stop",
            num_tokens=3,
            level="",
            source="",
            response="",
        )
        for problem, row in zip(problems, rewards, strict=True)
        for sample, reward in enumerate(row)
    ]
    return evaluation_of(responses, problems, len(rewards[0]), 0.6)


class DoneBenchmark:
    """Stands in for a `Benchmark` whose responses are there."""

    def __init__(self, name: str, rewards: Rewards) -> None:
        self.name = name
        self.problems = [Problem(id=f"p{number}", question="q", answer="a") for number in range(len(rewards))]
        self._rewards = rewards

    def outcome(self) -> Evaluation:
        return outcome_of(self._rewards)


def written(folder: Path, **sets: Rewards) -> Path:
    subject = Subject(path="m", weights_sha256="0", step=None)
    benchmarks: Any = [DoneBenchmark(name, rewards) for name, rewards in sets.items()]
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results_of(benchmarks, subject, fake_config())))
    return folder


PARTIAL = [[0.5, 1.0], [0.25, 0.25], [0.8, None]]
BETTER = [[1.0, 1.0], [0.5, 0.5], [0.8, 0.8]]
WHOLE = [[0.0, 1.0], [0.0, 0.0], [1.0, 1.0]]


def test_sums_of_rewards_are_kept_by_problem_where_the_correct_responses_do_not_tell_them() -> None:
    outcome = outcome_of(PARTIAL)
    assert outcome.has_partial_rewards
    assert outcome.reward_by_problem == {"p0": 1.5, "p1": 0.5, "p2": 0.8}
    assert outcome.correct_by_problem == {"p0": 1, "p1": 0, "p2": 1}
    assert evaluation_record(outcome)["has_partial_rewards"] is True
    whole = outcome_of(WHOLE)
    assert not whole.has_partial_rewards and whole.reward_by_problem == whole.correct_by_problem
    assert not {"has_partial_rewards", "reward_by_problem"} & evaluation_record(whole).keys()


def test_a_table_has_a_column_of_rewards_only_where_they_are_partial(tmp_path: Path) -> None:
    tables: list[list[str]] = []
    for name, rewards in (("partial", PARTIAL), ("whole", WHOLE)):
        results = json.loads((written(tmp_path / name, aime=rewards) / "results.json").read_text())
        printed = StringIO()
        print_results(results, printed)
        tables.append(printed.getvalue().splitlines())
    heading, row = (line.split() for line in tables[0][:2])
    assert heading[-4:] == ["reward", "tokens", "truncated", "undecided"]
    assert float(row[-4]) == pytest.approx((0.5 + 1 + 0.25 + 0.25 + 0.8) / 5, abs=5e-4), "over five verdicts"
    assert "reward" not in tables[1][0]


def test_mean_rewards_are_compared_in_pairs_of_problems(tmp_path: Path) -> None:
    first = written(tmp_path / "a", aime=PARTIAL, math=WHOLE)
    second = written(tmp_path / "b", aime=BETTER, math=WHOLE)
    sets = compare(first, second)["sets"]
    reward = sets["aime"]["reward"]
    assert reward["first"] == pytest.approx((0.75 + 0.25 + 0.8) / 3)
    assert reward["second"] == pytest.approx((1.0 + 0.5 + 0.8) / 3)
    assert reward["difference"] == pytest.approx(0.5 / 3)
    assert (reward["num_better"], reward["num_worse"], reward["test"]) == (2, 0, "sign permutation")
    assert reward["interval"]["low"] <= 0 <= reward["interval"]["high"], "two problems differ: p is 1/2"
    assert "reward" not in sets["math"]
    printed = StringIO()
    print_comparison(compare(first, second), printed)
    lines = printed.getvalue().splitlines()
    row = lines[lines.index("mean reward:") + 2].split()
    assert row[:5] == ["aime", "3", "0.600", "0.767", "+0.167"]


def test_a_policy_whose_rewards_happen_to_be_whole_is_compared_too(tmp_path: Path) -> None:
    first, second = written(tmp_path / "a", aime=WHOLE), written(tmp_path / "b", aime=BETTER)
    reward = compare(first, second)["sets"]["aime"]["reward"]
    assert reward["difference"] == pytest.approx((0.5 + 0.5 - 0.2) / 3)
    whole = compare(first, written(tmp_path / "c", aime=WHOLE))
    assert "reward" not in whole["sets"]["aime"]
    printed = StringIO()
    print_comparison(whole, printed)
    assert "mean reward" not in printed.getvalue()


def finished_run(root: Path, rewards: Rewards) -> Path:
    root.mkdir()
    outcome = outcome_of(rewards)
    record = evaluation_record(outcome)
    results = {"arm": "a", "seed": 1, "evaluation": {"own": record}, "templated_evaluation": {"own": record}}
    (root / "results.json").write_text(json.dumps(results))
    metrics = {f"eval/{name}/avg": 0.5 for name in ("own", "templated_own")}
    metrics |= {f"eval/{name}/reward_mean": 0.56 for name in ("own", "templated_own")}
    line = {"step": 1, "epoch": 0, "time": "2026-01-31T12:00:00+00:00", "metrics": metrics}
    (root / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return root


def test_the_report_tells_mean_rewards_only_where_they_are_partial(tmp_path: Path) -> None:
    partial, whole = finished_run(tmp_path / "partial", PARTIAL), finished_run(tmp_path / "whole", WHOLE)
    rows = summarize([partial, whole])["runs"]
    assert rows[0]["reward"] == rows[0]["template_reward"] == {"own": pytest.approx(0.56)}
    assert not {"reward", "template_reward"} & rows[1].keys()
    printed = StringIO()
    print_table(summarize([partial, whole]), printed)
    assert "own, mean reward, best template" in printed.getvalue()
    assert summarize([partial, whole])["arms"]["a"]["reward"]["own"]["mean"] == pytest.approx(0.56)
    assert "reward" not in json.dumps({**summarize([whole]), "runs": []})

    for directory, is_shown in ((partial, True), (whole, False)):
        runs = [ViewedRun(directory).reported()]
        titles = {chart.title for chart in training_figures(runs, {"a": 0})}
        assert ({"Mean reward of own", "Mean reward with template: own"} <= titles) is is_shown
        assert ("own, mean reward" in overview_of(runs, {"a": 0}).header) is is_shown
        table = by_source(runs)
        assert table is not None and ("Mean reward" in table.header) is is_shown
        assert {len(row) for row in table.rows} == {len(table.header)}
