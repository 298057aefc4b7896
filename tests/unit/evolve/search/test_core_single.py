"""Single-turn reflection: one rewrite for each hard problem, whole rounds in one process."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_p2o.evolve.process.conduct import journal_path, most_rollouts, planned_rollouts, salvage, split_of
from megatron_p2o.evolve.record.history import RoundHistory
from megatron_p2o.evolve.record.journal import encode_line, read_journal
from megatron_p2o.evolve.record.library import PublishedLibrary
from megatron_p2o.evolve.reflection.phrasebook import Phrasebook
from megatron_p2o.evolve.reflection.reflection import ReflectionRequest, ReflectionUnavailable
from megatron_p2o.evolve.search.publish import RoundStats
from megatron_p2o.evolve.search.round import RoundSpec
from megatron_p2o.evolve.trial import FreeScore, Trial, TrialFailed
from megatron_p2o.testing.evolution import KeyPhraseTask, make_problems, round_spec, whole_round
from megatron_p2o.tiny.problems import PHRASES
from megatron_p2o.types import Template

PROBLEMS = make_problems(12)
SPEC = round_spec(PROBLEMS, rules="single_turn", num_lineages=3, max_rollouts=1)


class Writer:
    """Reflection that writes a template for the problem it is shown, and remembers whom it was asked about."""

    def __init__(self, **texts: str) -> None:
        self.requests: list[ReflectionRequest] = []
        self.texts = texts

    async def propose(self, request: ReflectionRequest) -> str:
        self.requests.append(request)
        (example,) = request.examples
        await asyncio.sleep(0.001 * (len(PROBLEMS) - request.proposal))  # the last answers first
        return self.texts.get(example.problem.id.replace("-", "_"), f"For {example.problem.id}.")

    async def close(self) -> None: ...


def run_round(
    tmp_path: Path, task: Any, reflector: Any, spec: RoundSpec = SPEC, finish: asyncio.Event | None = None
) -> tuple[PublishedLibrary, RoundStats]:
    library, stats, _ = whole_round(spec, tmp_path, task, reflector, finish=finish)
    return library, stats


def test_each_hard_problem_is_asked_through_the_one_template_written_for_it(tmp_path: Path) -> None:
    task, writer = KeyPhraseTask(PROBLEMS), Writer()
    library, stats = run_round(tmp_path, task, writer)
    assert {key: [z.text for z in given] for key, given in library.assignments.items()} == {
        problem.id: [f"For {problem.id}."] * 4 + [""] * 2 for problem in PROBLEMS
    }
    assert [template.id for template in library.templates] == list(range(1, 13)), "whichever answer comes first"
    assert [template.lineage_problem_ids for template in library.templates] == [{p.id} for p in PROBLEMS]
    assert sorted(request.proposal for request in writer.requests) == list(range(12)), "one reflection each"
    assert {request.parent_text for request in writer.requests} == {""}
    assert {text for text, *_ in task.requests} == {""} and task.requests.total() == 12, "no template is tried"
    assert (stats.ended_by, stats.is_success, stats.num_rollouts, stats.num_templates) == (
        "all_reflected",
        True,
        12,
        12,
    )
    assert (stats.num_dev, stats.num_feedback, stats.coverage, stats.plain_coverage) == (0, 12, 0.0, None)
    assert planned_rollouts(SPEC) == 12, "evolution.max_rollouts is of a search"


@pytest.mark.parametrize(("plain_control", "most"), [(False, 100), (True, 200)])
def test_plain_control_asks_for_as_many_rollouts_again(plain_control: bool, most: int) -> None:
    spec = round_spec(PROBLEMS, max_rollouts=100, plain_control=plain_control)
    assert (planned_rollouts(spec), most_rollouts(spec)) == (100, most)


def test_responses_that_training_has_sampled_are_not_sampled_again(tmp_path: Path) -> None:
    seen = Trial(reward=0.0, response_text="seen", finish_reason="stop", num_tokens=4, weight_version=2)
    free = [FreeScore(template_text="", problem_id=problem.id, trial=seen) for problem in PROBLEMS]
    task, writer = KeyPhraseTask(PROBLEMS), Writer()
    _, stats = run_round(tmp_path, task, writer, replace(SPEC, free_scores=tuple(free)))
    assert not task.requests and stats.num_rollouts == stats.num_tokens == 0
    assert {request.examples[0].trial.response_text for request in writer.requests} == {"seen"}


def test_a_rewrite_that_tells_the_answer_is_refused_and_its_problem_asked_plainly(tmp_path: Path) -> None:
    library, stats = run_round(tmp_path, KeyPhraseTask(PROBLEMS), Writer(problem_3="It is 1003, 2003."))
    assert library.assigned(PROBLEMS[3]) == () and len(library.assignments) == 11
    assert stats.outcomes == {"accepted": 11, "refused: leaks an answer": 1}


def test_a_response_without_a_verdict_leaves_its_problem_plain(tmp_path: Path) -> None:
    class Losing(KeyPhraseTask):
        async def run_trial(self, template_text: str, problem_id: str, **how: Any) -> Any:
            if problem_id == "problem-5":
                raise TrialFailed("lost")
            return await super().run_trial(template_text, problem_id, **how)

    library, stats = run_round(tmp_path, Losing(PROBLEMS), Writer())
    assert "problem-5" not in library.assignments and stats.outcomes == {"accepted": 11, "trial failed": 1}


def test_equal_rewrites_are_one_template_and_earlier_libraries_are_not_gone_back_to(tmp_path: Path) -> None:
    warm = (Template(id=4, text="Warm.", parent=None),)
    task = KeyPhraseTask(PROBLEMS)
    library, _ = run_round(tmp_path, task, Phrasebook(PHRASES[:2], seed=1), replace(SPEC, warm_templates=warm))
    assert {template.text for template in library.templates} == set(PHRASES[:2]) and len(library.templates) == 2
    assert len(library.assignments) == 12 and "Warm." not in {text for text, *_ in task.requests}


def test_reflection_that_ends_its_answers_leaves_what_there_is(tmp_path: Path) -> None:
    class Ending(Writer):
        async def propose(self, request: ReflectionRequest) -> str:
            if len(self.requests) == 5:
                raise ReflectionUnavailable("gone")
            return await super().propose(request)

    library, stats = run_round(tmp_path, KeyPhraseTask(PROBLEMS), Ending())
    assert stats.ended_by == "reflection_unavailable" and not stats.is_success
    assert 0 < len(library.assignments) <= 5


def test_a_round_that_is_cut_off_or_killed_keeps_every_rewrite_and_asks_for_none_twice(tmp_path: Path) -> None:
    whole, _ = run_round(tmp_path / "whole", KeyPhraseTask(PROBLEMS), Writer())
    records, _ = read_journal(journal_path(tmp_path / "whole", 0))
    for cut in range(1, len(records)):
        folder = tmp_path / f"cut-{cut}"
        journal = journal_path(folder, 0)
        journal.parent.mkdir(parents=True)
        journal.write_bytes(b"".join(encode_line(record) for record in records[:cut]))
        known = RoundHistory(records[:cut], lambda _: None, SPEC.fingerprint())
        split = split_of(SPEC)
        assert split is not None
        saved, _ = salvage(SPEC, split, folder)
        assert len(saved.assignments) == len(known.reflections)
        writer = Writer()
        library, _ = run_round(folder, KeyPhraseTask(PROBLEMS), writer)
        assert library.assignments == whole.assignments
        assert len(writer.requests) == 12 - len(known.reflections)


def test_too_few_hard_problems_are_no_round() -> None:
    few = replace(SPEC, problems=SPEC.problems[:9])
    assert SPEC.settings.min_problems == 10 and split_of(few) is None


@pytest.mark.parametrize("num_plain", [0, 6])
def test_plain_rollouts_of_a_group_are_as_many_as_the_settings_say(num_plain: int, tmp_path: Path) -> None:
    settings = replace(SPEC.settings, assignment=replace(SPEC.settings.assignment, num_plain=num_plain))
    library, _ = run_round(tmp_path, KeyPhraseTask(PROBLEMS), Writer(), replace(SPEC, settings=settings))
    texts = [template.text for template in library.assigned(PROBLEMS[0])]
    assert texts == ["For problem-0."] * (6 - num_plain) + [""] * num_plain
