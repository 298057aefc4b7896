"""The authors' lock-step rules, whole rounds in one process."""

import asyncio
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_p2o.evolve.process.conduct import conduct_round, journal_path, split_of
from megatron_p2o.evolve.record.history import RoundHistory
from megatron_p2o.evolve.record.journal import encode_line, read_journal
from megatron_p2o.evolve.record.library import PublishedLibrary, library_path, load_library
from megatron_p2o.evolve.reflection.phrasebook import Phrasebook
from megatron_p2o.evolve.reflection.reflection import ReflectionRefused, ReflectionRequest, ReflectionUnavailable
from megatron_p2o.evolve.reflection.reflectors import Reflector
from megatron_p2o.evolve.search.budget import automatic_budget
from megatron_p2o.evolve.search.publish import RoundStats
from megatron_p2o.evolve.search.round import RoundSpec
from megatron_p2o.evolve.trial import FreeScore, Rejection, Trial, TrialFailed, TrialRunner
from megatron_p2o.testing.evolution import KeyPhraseTask, make_problems, round_spec
from megatron_p2o.tiny.problems import PHRASES

PROBLEMS = make_problems(20)
"""10 score, 10 give feedback."""


class Climbing:
    """The longer the template, the higher the reward: each child of its parent is better. Counts what it is asked."""

    def __init__(self, reward_of: Callable[[str], float] = lambda text: len(text) / 1000) -> None:
        self.requests: Counter[tuple[str, str]] = Counter()
        self._reward_of = reward_of

    async def run_trial(
        self, template_text: str, problem_id: str, *, temperature: float, sample: int = 0
    ) -> Trial | Rejection:
        assert temperature == 0.0
        self.requests[template_text, problem_id] += 1
        await asyncio.sleep(0)
        return Trial(
            reward=self._reward_of(template_text),
            response_text="",
            finish_reason="stop",
            num_tokens=1,
            weight_version=1,
        )


class Appending:
    """Reflection that makes the parent longer by one letter."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.proposals: list[int] = []
        self._fails_at = fails_at

    async def propose(self, request: ReflectionRequest) -> str:
        self.proposals.append(request.proposal)
        if request.proposal == self._fails_at:
            raise ReflectionUnavailable("status 500")
        return request.parent_text + "z"

    async def close(self) -> None: ...


def reference_spec(**evolution: Any) -> RoundSpec:
    settings = {"rules": "reference", "guard_leaks": False, "warm_start": False, **evolution}
    return round_spec(PROBLEMS, **settings)


def run_round(
    spec: RoundSpec, run_dir: Path, runner: TrialRunner, reflector: Reflector, notices: list[str] | None = None
) -> tuple[PublishedLibrary, RoundStats, RoundHistory]:
    split = split_of(spec)
    assert split is not None
    notify = (notices if notices is not None else []).append
    stats = asyncio.run(conduct_round(spec, split, run_dir, runner, reflector, asyncio.Event(), notify))
    records, _ = read_journal(journal_path(run_dir, spec.epoch))
    history = RoundHistory(records, lambda _: None, spec.fingerprint())
    return load_library(library_path(run_dir, stats.library_version)), stats, history


# Accounting


def test_rejected_proposals_cost_one_minibatch_after_two_free_iterations(tmp_path: Path) -> None:
    # Never better: only the empty template is ever selected, one proposal and 3 rollouts per charged iteration.
    spec = reference_spec(max_rollouts=31)
    _, stats, _ = run_round(spec, tmp_path, Climbing(lambda _: 0.0), Appending())
    assert stats.outcomes == {"not better": 2 + 11}, "iterations 3 to 13; the 11th charged one overdraws 31"
    assert stats.num_rollouts == 10 + 13 * 6, "really sampled: the seed's trial and both minibatches"
    assert stats.ended_by == "budget"


def test_accepted_proposals_cost_a_development_evaluation_and_the_last_iteration_runs(tmp_path: Path) -> None:
    # Always better: each iteration selects the newest candidate alone and costs 3 + 10 from the third on.
    spec = reference_spec(max_rollouts=27)
    _, stats, history = run_round(spec, tmp_path, Climbing(), Appending())
    assert stats.outcomes == {"accepted": 2 + 3}, "27 - 13 - 13 = 1 is left for a fifth iteration"
    assert [history.picks[number].parent for number in range(5)] == [0, 1, 2, 3, 4]
    assert stats.num_rollouts == 10 + 5 * (6 + 10)


def test_budget_is_gepas_when_none_is_given(tmp_path: Path) -> None:
    _, stats, _ = run_round(reference_spec(budget=6), tmp_path, Climbing(lambda _: 0.0), Appending())
    budget = automatic_budget(6, 10)
    assert stats.outcomes == {"not better": 2 + math.ceil(budget / 3)}


# Selection, minibatches, acceptance


def test_all_lineages_advance_together_and_ties_at_zero_select_everybody(tmp_path: Path) -> None:
    split = split_of(reference_spec())
    assert split is not None

    class FeedbackOnly(Climbing):
        """Candidates improve on feedback problems and solve nothing on development problems."""

        async def run_trial(
            self, template_text: str, problem_id: str, *, temperature: float, sample: int = 0
        ) -> Trial | Rejection:
            self._reward_of = (lambda _: 0.0) if problem_id in split.dev else (lambda text: len(text) / 1000)
            return await super().run_trial(template_text, problem_id, temperature=temperature, sample=sample)

    spec = reference_spec(max_rollouts=1, num_lineages=3)
    library, _, history = run_round(spec, tmp_path, FeedbackOnly(), Appending())
    parents = [history.picks[number].parent for number in sorted(history.picks)]
    assert parents[:1] == [0], "iteration 1: the empty template alone"
    assert parents[1:3] == [0, 1], "iteration 2: everybody on a front"
    assert len(parents) == 6 and len(set(parents[3:])) == 3, "iteration 3: three of the four without replacement"
    assert library.templates == () and library.assignments == {}


def test_minibatches_reuse_nothing_until_too_few_are_unused_and_then_draw_from_all(tmp_path: Path) -> None:
    spec = reference_spec(max_rollouts=60)
    _, _, history = run_round(spec, tmp_path, Climbing(lambda _: 0.0), Appending())
    minibatches = [history.picks[number].minibatch for number in sorted(history.picks)]
    assert all(len(set(minibatch)) == 3 for minibatch in minibatches)
    first = [problem_id for minibatch in minibatches[:3] for problem_id in minibatch]
    assert len(set(first)) == 9
    later = Counter(problem_id for minibatch in minibatches[3:] for problem_id in minibatch)
    assert set(later) >= set(first), "9 of 10 are used: from here on all are drawn from, again and again"


def test_equal_reward_is_not_accepted(tmp_path: Path) -> None:
    library, stats, _ = run_round(reference_spec(max_rollouts=9), tmp_path, Climbing(lambda _: 1.0), Appending())
    assert set(stats.outcomes) == {"not better"} and stats.num_candidates == 1
    assert [template.text for template in library.templates] == [""], "the empty template may be the cover"
    assert all(z.text == "" for problem in PROBLEMS for z in library.assigned(problem))


def test_parents_are_measured_again_on_every_minibatch(tmp_path: Path) -> None:
    spec = reference_spec(max_rollouts=90)
    task = Climbing(lambda _: 0.0)
    free = Trial(reward=0.0, response_text="", finish_reason="stop", num_tokens=1, weight_version=1)
    scores = tuple(FreeScore(template_text="", problem_id=p.id, trial=free) for p in PROBLEMS)
    _, _, history = run_round(replace(spec, free_scores=scores), tmp_path, task, Appending())
    drawn = Counter(key for picked in history.picks.values() for key in picked.minibatch)
    split = split_of(spec)
    assert split is not None
    assert {key: task.requests["", key] for key in split.feedback} == {key: drawn[key] for key in split.feedback}
    assert {task.requests["", key] for key in split.dev} == {1}, "training rollouts count for nothing"


def test_random_choices_come_from_epoch_plus_number_of_hard_problems(tmp_path: Path) -> None:
    picks = []
    for name, epoch in (("a", 0), ("b", 0), ("c", 1)):
        spec = round_spec(PROBLEMS, epoch=epoch, rules="reference", max_rollouts=60)
        _, _, history = run_round(spec, tmp_path / name, Climbing(lambda _: 0.0), Appending())
        picks.append([history.picks[number].minibatch for number in sorted(history.picks)])
    assert picks[0] == picks[1] != picks[2]


# Refusals and ends


def test_empty_reflection_skips_the_lineage_and_duplicates_are_allowed(tmp_path: Path) -> None:
    class Sometimes:
        async def propose(self, request: ReflectionRequest) -> str:
            if request.proposal == 0:
                raise ReflectionRefused("empty")
            return "other" if request.parent_text == "same" else "same"

        async def close(self) -> None: ...

    rewards = iter(range(10_000))
    spec = reference_spec(max_rollouts=30)
    # Rewards rise with every rollout, so that each child beats its parent.
    _, _, history = run_round(spec, tmp_path, Climbing(lambda _: next(rewards) / 10_000), Sometimes())
    assert history.outcomes[0] == "refused: empty"
    texts = [history.reflections[proposal].text for proposal in sorted(history.candidate_of)]
    assert texts[:3] == ["same", "other", "same"] and set(texts) == {"same", "other"}


def test_unavailable_reflection_ends_the_round(tmp_path: Path) -> None:
    notices: list[str] = []
    spec = reference_spec(max_rollouts=1000)
    library, stats, _ = run_round(spec, tmp_path, Climbing(lambda t: min(1.0, len(t) / 3)), Appending(4), notices)
    assert stats.ended_by == "reflection_unavailable" and stats.outcomes["accepted"] == 3
    assert notices == ["evolution pauses until the next round: status 500"]
    assert library.templates != ()


def test_a_rollout_without_a_verdict_is_no_score(tmp_path: Path) -> None:
    split = split_of(reference_spec())
    assert split is not None
    lost_feedback, lost_dev = split.feedback[0], split.dev[0]

    class Losing(Climbing):
        """Has no verdict on one problem of each half; the empty template does better than any other."""

        async def run_trial(
            self, template_text: str, problem_id: str, *, temperature: float, sample: int = 0
        ) -> Trial | Rejection:
            if problem_id in (lost_feedback, lost_dev):
                raise TrialFailed("no engine")
            return await super().run_trial(template_text, problem_id, temperature=temperature, sample=sample)

    spec = reference_spec(max_rollouts=40)
    _, stats, history = run_round(spec, tmp_path, Losing(lambda text: 1.0 if text == "" else 0.5), Appending())
    assert set(stats.outcomes) == {"not better", "trial failed"}
    for proposal, picked in history.picks.items():
        assert (history.outcomes[proposal] == "trial failed") == (lost_feedback in picked.minibatch)
    lost = {key[1] for key, trial in history.trials.items() if trial.finish_reason == "abort"}
    assert lost == {lost_feedback, lost_dev}, "journalled: a resumed round decides as this one did"
    again = Climbing()
    _, resumed, _ = run_round(spec, tmp_path, again, Appending())
    assert resumed == stats and not again.requests


def test_without_any_verdict_a_round_ends(tmp_path: Path) -> None:
    class Lost:
        async def run_trial(
            self, template_text: str, problem_id: str, *, temperature: float, sample: int = 0
        ) -> Trial | Rejection:
            raise TrialFailed("no engine")

    library, stats, history = run_round(reference_spec(max_rollouts=9), tmp_path, Lost(), Appending())
    assert library.templates == () and (stats.ended_by, stats.best_score) == ("no_progress", 0.0)
    assert {trial.finish_reason for trial in history.trials.values()} == {"abort"}


# Resume


def test_round_cut_at_any_event_ends_as_if_it_had_not_been_cut(tmp_path: Path) -> None:
    spec = reference_spec(max_rollouts=100, num_lineages=4)

    def run(run_dir: Path) -> tuple[PublishedLibrary, RoundStats, KeyPhraseTask]:
        task = KeyPhraseTask(PROBLEMS, success_rates=(0.1, 0.5, 0.97))
        library, stats, _ = run_round(spec, run_dir, task, Phrasebook(PHRASES, 1))
        return library, stats, task

    library, stats, whole = run(tmp_path / "whole")
    assert stats.outcomes["accepted"] > 3 and stats.outcomes["not better"] > 3
    records, _ = read_journal(journal_path(tmp_path / "whole", 0))
    for cut in range(1, len(records) - 1, len(records) // 12):
        path = journal_path(tmp_path / str(cut), 0)
        path.parent.mkdir(parents=True)
        path.write_bytes(b"".join(map(encode_line, records[:cut])))
        num_kept = sum(record["event"] == "Scored" for record in records[:cut])
        resumed_library, resumed_stats, task = run(tmp_path / str(cut))
        assert (resumed_library, resumed_stats) == (library, stats)
        assert num_kept + task.requests.total() == whole.requests.total(), "nothing lost, nothing repeated"


@pytest.mark.parametrize("guard", [True, False])
def test_leak_guard_is_a_setting(tmp_path: Path, guard: bool) -> None:
    class Telling:
        async def propose(self, request: ReflectionRequest) -> str:
            return f"{request.parent_text} {request.examples[0].problem.answer}"

        async def close(self) -> None: ...

    spec = reference_spec(max_rollouts=9, guard_leaks=guard)
    _, stats, _ = run_round(spec, tmp_path, Climbing(), Telling())
    assert set(stats.outcomes) == ({"refused: leaks an answer"} if guard else {"accepted"})
