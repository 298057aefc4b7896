"""How the hard problems, the rollouts and the time of a round are divided among tasks, and put together again."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_p2o.evolve.process.by_task import all_together, budget_shares, problems_by_task, settings_by_task
from megatron_p2o.evolve.record.library import EMPTY_LIBRARY, PublishedLibrary, library_path, load_library, merged
from megatron_p2o.evolve.search.budget import automatic_budget
from megatron_p2o.evolve.search.publish import RoundStats
from megatron_p2o.evolve.search.round import RoundSettings
from megatron_p2o.testing.evolution import make_problems, round_spec
from megatron_p2o.types import PLAIN, Template

NO_TEXT: Mapping[str, str | None] = {"a": "Of a.", "b": None, "c": ""}


def settings_of(**evolution: int) -> RoundSettings:
    """Return settings with `hard.min_problems` 10."""
    return round_spec(make_problems(12), **evolution).settings


def test_problems_are_divided_by_task_in_the_order_of_the_settings() -> None:
    problems = [replace(problem, task="ab"[index % 2]) for index, problem in enumerate(make_problems(5))]
    by_task = problems_by_task(problems, ["b", "none", "a"])
    assert by_task == {"b": problems[1::2], "a": problems[::2]} and list(by_task) == ["b", "a"]
    assert problems_by_task(problems, ["whatever"]) == {"": problems}


def test_rollouts_and_time_are_divided_in_proportion_to_the_hard_problems() -> None:
    settings = settings_of(max_rollouts=1000, round_timeout_s=60)
    own = settings_by_task(settings, {"a": 60, "b": 20, "c": 9}, NO_TEXT)  # c has less than hard.min_problems
    assert [own[task].evolution.max_rollouts for task in "abc"] == [750, 250, 1]
    assert [own[task].evolution.round_timeout_s for task in "ab"] == [45, 15]
    assert [own[task].task_description for task in "abc"] == ["Of a.", None, ""]
    assert budget_shares(settings, {"a": 9, "b": 9}) == {"a": 0.0, "b": 0.0}


def test_the_automatic_budget_is_that_of_one_round_on_all_hard_problems() -> None:
    own = settings_by_task(settings_of(budget=6, dev_size=300), {"a": 30, "b": 30}, NO_TEXT)
    assert [own[task].evolution.max_rollouts for task in "ab"] == [automatic_budget(6, 30) // 2] * 2
    alone = settings_by_task(settings_of(budget=6), {"": 60}, {"": "All."})
    assert alone[""] == replace(settings_of(budget=6), task_description="All.")


def test_a_round_of_one_task_has_its_own_randomness_and_journal_and_a_single_one_what_it_had() -> None:
    spec = round_spec(make_problems(12))
    a, b = replace(spec, task="a"), replace(spec, task="b")
    assert len({each.fingerprint() for each in (spec, a, b)}) == 3
    assert len({each.rng("split").random() for each in (spec, a, b)}) == 3


def template(id: int, score: float, task: str, parent: int | None = 0) -> Template:
    return Template(id=id, text=f"{task}{id}", parent=parent, score=score, task=task)


def test_libraries_are_put_together_under_ids_of_their_own(tmp_path: Path) -> None:
    a1, a2, b1 = template(1, 0.2, "a"), template(2, 0.9, "a", parent=1), template(1, 0.5, "b")
    parts = {
        "a": PublishedLibrary(version=3, templates=(a2, a1), assignments={"p": (a1, a2, PLAIN)}),
        "c": PublishedLibrary(version=3),
        "b": PublishedLibrary(version=3, templates=(b1,), assignments={"q": (b1, PLAIN, PLAIN)}),
    }
    library = merged(parts, {"a": 7, "c": 0, "b": 4}, version=3)
    found = [(each.id, each.parent, each.text) for each in library.templates]
    assert found == [(2, 1, "a2"), (8, 0, "b1"), (1, 0, "a1")]
    assert [each.text for each in library.assignments["p"]] == ["a1", "a2", ""]
    assert [each.id for each in library.assignments["q"]] == [8, 0, 0]
    assert library.first_ids == {"a": 0, "c": 7, "b": 7}
    library.save(tmp_path)
    assert load_library(library_path(tmp_path, 3)) == library
    assert EMPTY_LIBRARY.first_ids == {}
    parts["a"].save(tmp_path, "a")
    assert load_library(library_path(tmp_path, 3, "a")) == parts["a"]
    assert library_path(tmp_path, 3, "a").parent != library_path(tmp_path, 3).parent


def stats(task: str, **fields: object) -> RoundStats:
    known = {"epoch": 2, "task": task, "library_version": 3, "ended_by": "budget", "num_hard": 40, "outcomes": {}}
    return RoundStats(**{**known, **fields})  # type: ignore[arg-type]


def test_the_numbers_of_several_rounds_are_those_of_all_together() -> None:
    a = stats("a", num_dev=30, coverage=0.5, best_score=0.4, num_rollouts=10, outcomes={"accepted": 2, "not better": 1})
    b = stats("b", num_dev=10, coverage=0.1, best_score=0.6, num_rollouts=5, outcomes={"accepted": 1})
    b = replace(b, ended_by="deadline")
    few = stats("c", ended_by="too_few_hard", num_hard=4)
    both = all_together([a, replace(b, plain_coverage=0.2), few])
    assert (both.num_rollouts, both.num_hard, both.best_score, both.ended_by) == (15, 84, 0.6, "deadline")
    assert both.coverage == pytest.approx((0.5 * 30 + 0.1 * 10) / 40) and both.plain_coverage == 0.2
    assert both.outcomes == {"accepted": 3, "not better": 1} and both.task == ""
    assert all_together([a, few]).ended_by == "budget"
    assert all_together([few]) is few
    assert all_together([few, few]).coverage == 0.0
