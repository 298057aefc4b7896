"""One P2O step with fakes at every border; the training loop is in test_algorithm_train.py."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pytest

from megatron_p2o.algorithm import Parts, StepResult, TrainState, p2o_step
from megatron_p2o.rl.grouping import num_informative
from megatron_p2o.rl.hard_samples import HardSampleLedger, LedgerEntry
from megatron_p2o.testing.fakes import (
    UNDECIDED,
    CallLog,
    FakeEngines,
    FakeGrader,
    FakeLibrary,
    FakePolicy,
    FakeRenderer,
    FakeReply,
    fake_config,
    fake_logprobs,
    fake_problem,
    fake_token_ids,
)
from megatron_p2o.types import CORRECT, INCORRECT, PLAIN, Problem, Prompt, Template
from p2o_kernels.advantage.reference import group_advantages_reference

Context = Literal["sampling", "replace", "importance", "ratio_mask"]
HINT = Template(id=1, text="§ go on", parent=0)
"""Its first character occurs in no question."""
OTHER = Template(id=2, text="§ look again", parent=1)
PROBLEMS = [fake_problem(number) for number in range(4)]


def credits(rewards: list[float], anchor: float | None = None) -> tuple[float, ...]:
    return tuple(group_advantages_reference(rewards, [True] * len(rewards), "grpo", anchor))


def mixed_reply(prompt: Prompt, index: int) -> FakeReply:
    """Solve about a third of the rollouts, with responses of different lengths, by prompt and place alone."""
    draw = zlib.crc32(prompt.sampling_ids.tobytes() + bytes([index]))
    return FakeReply(text="yes") if draw % 3 == 0 else FakeReply(text="no" + "!" * (draw % 5))


def solved_by(places: Mapping[str, Sequence[int]], group_size: int = 4) -> Callable[[Prompt, int], FakeReply]:
    """Return a reply that solves only the given rollouts of the given problems."""
    return lambda prompt, index: FakeReply(
        text="yes" if index % group_size in places.get(prompt.problem.id, ()) else "no, sorry"
    )


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step that was run, with the fakes it was run on."""

    result: StepResult
    policy: FakePolicy
    engines: FakeEngines
    grader: FakeGrader
    journal: CallLog


def run_step(
    reply: Callable[[Prompt, int], FakeReply] = mixed_reply,
    settings: Mapping[str, Any] | None = None,
    templates: Mapping[str, Sequence[Template]] | None = None,
    *,
    step: int = 0,
    problems: Sequence[Problem] = PROBLEMS,
    following: Sequence[Sequence[Problem]] = (),
    ledger: HardSampleLedger | None = None,
) -> Step:
    """Run one step from a policy that has already moved `step` times."""
    journal = CallLog()
    policy, grader = FakePolicy(journal=journal, num_updates=step), FakeGrader()
    engines = FakeEngines(reply=reply, journal=journal, version=step, num_updates=step)
    parts = Parts(policy=policy, engines=engines, grader=grader, renderer=FakeRenderer(), solved_at=1.0, evolution=None)
    state = TrainState(library=FakeLibrary(assignments=templates or {}), step=step)
    result = p2o_step(problems, state, ledger or HardSampleLedger(), parts, fake_config(settings), iter(following))
    return Step(result=result, policy=policy, engines=engines, grader=grader, journal=journal)


TEMPLATED = {PROBLEMS[1].id: [HINT, OTHER, PLAIN, HINT], PROBLEMS[2].id: [HINT] * 4}


@pytest.mark.parametrize("context", ["replace", "importance", "ratio_mask"])
@pytest.mark.parametrize("recompute", [False, True])
def test_engine_sees_the_template_and_training_does_not(context: Context, recompute: bool) -> None:
    step = run_step(settings={"objective.context": context, "logprobs.recompute": recompute}, templates=TEMPLATED)
    asked = [chr(prompt.sampling_ids[0]) for prompt in step.engines.prompts]
    assert asked == ["q"] * 4 + ["§", "§", "q", "§"] + ["§"] * 4 + ["q"] * 4
    samples = [sample for call in step.policy.updates for sample in call.samples]
    questions = {tuple(fake_token_ids(problem.question)) for problem in PROBLEMS}
    assert {tuple(sample.context_ids) for sample in samples} <= questions
    assert any(sample.is_templated for sample in samples) and not all(sample.is_templated for sample in samples)


def test_each_response_is_trained_on_the_bare_prompt_of_its_own_problem() -> None:
    asked: dict[str, Prompt] = {}

    def numbered(prompt: Prompt, index: int) -> FakeReply:
        asked[f"reply {index}"] = prompt
        return FakeReply(text=f"reply {index}")

    step = run_step(numbered, {"objective.drop_zero_advantage": False}, TEMPLATED)
    samples = [sample for call in step.policy.updates for sample in call.samples]
    assert len(samples) == len(asked) == 16
    for sample in samples:
        prompt = asked["".join(chr(token) for token in sample.response_ids[:-1])]
        assert np.array_equal(sample.context_ids, fake_token_ids(prompt.problem.question))
        assert np.array_equal(sample.sampling_logprobs, fake_logprobs(prompt.sampling_ids, sample.response_ids))
        assert sample.is_templated == (prompt.template.text != "")


@pytest.mark.parametrize("recompute", [False, True])
def test_on_policy_distillation_asks_plainly_and_learns_what_the_templates_would_have_said(recompute: bool) -> None:
    settings = {"objective.context": "distill", "objective.distill_beta": 0.5, "logprobs.recompute": recompute}
    step = run_step(solved_by({}), settings, TEMPLATED)
    assert not any(prompt.is_templated for prompt in step.engines.prompts)
    # Two prefills, the rollouts' temperature not being 1, before the engines lend their memory.
    assert step.journal[:4] == ["generate", "score", "score", "release"]
    taught, plain = ([(prompt.problem.id, prompt.template.id) for prompt in each] for each in step.engines.scored)
    assert taught == [(PROBLEMS[1].id, 1), (PROBLEMS[1].id, 2), (PROBLEMS[1].id, 1), *[(PROBLEMS[2].id, 1)] * 4]
    assert plain == [(problem_id, 0) for problem_id, _ in taught]
    # Nothing is solved, every advantage is 0: what has a gradient is what a template taught.
    samples = [sample for call in step.policy.updates for sample in call.samples]
    assert [sample.key for sample in samples] == [
        *((PROBLEMS[1].id, place) for place in (0, 1, 3)),
        *((PROBLEMS[2].id, place) for place in range(4)),
    ]
    for sample, (problem_id, template_id) in zip(samples, taught, strict=True):
        question = next(problem.question for problem in PROBLEMS if problem.id == problem_id)
        template = {1: HINT, 2: OTHER}[template_id]
        contexts = fake_token_ids(f"{template.text}\n\n{question}"), fake_token_ids(question)
        with_template, without = (fake_logprobs(context, sample.response_ids) for context in contexts)
        assert sample.advantage == 0 and not sample.is_templated
        assert sample.advantage_offsets == pytest.approx(0.5 * (with_template - without) / 0.6, abs=1e-6)
    assert [problem.id for problem in step.result.hard] == [problem.id for problem in PROBLEMS]


def test_on_policy_distillation_without_templates_is_plain_grpo() -> None:
    distilled = run_step(settings={"objective.context": "distill"})
    plain = run_step(settings={"objective.context": "replace"})
    assert distilled.journal == plain.journal, "nothing is scored"
    assert repr(distilled.policy.updates) == repr(plain.policy.updates)


def test_without_distillation_training_sees_what_the_engine_saw() -> None:
    step = run_step(
        settings={"objective.context": "sampling", "objective.drop_zero_advantage": False}, templates=TEMPLATED
    )
    contexts = [tuple(sample.context_ids) for call in step.policy.updates for sample in call.samples]
    assert contexts == [tuple(prompt.sampling_ids) for prompt in step.engines.prompts]
    assert not any(sample.is_templated for call in step.policy.updates for sample in call.samples)


def test_rollouts_are_in_the_order_they_were_asked_whatever_finishes_first() -> None:
    step = run_step(templates=TEMPLATED)
    prompts = [rollout.completion.prompt for group in step.result.groups for rollout in group.rollouts]
    assert all(rolled is asked for rolled, asked in zip(prompts, step.engines.prompts, strict=True))
    assert [group.problem for group in step.result.groups] == PROBLEMS
    assert [prompt.template for prompt in prompts[4:8]] == [HINT, OTHER, PLAIN, HINT]


def test_rewards_are_the_grades_of_the_decoded_text() -> None:
    texts = {0: "yes", 1: "no", 2: "?", 3: "yes!"}
    step = run_step(lambda prompt, index: FakeReply(text=texts[index % 4]), problems=PROBLEMS[:2])
    for group in step.result.groups:
        assert [rollout.grade for rollout in group.rollouts] == [CORRECT, INCORRECT, UNDECIDED, INCORRECT]
        won, lost, other = credits([1, 0, 0])
        assert group.advantages == pytest.approx((won, lost, 0.0, other))
    assert sorted(step.grader.submitted) == sorted((p.id, text) for p in PROBLEMS[:2] for text in texts.values())


def test_zero_advantages_are_dropped_and_their_tokens_counted() -> None:
    reply = solved_by({PROBLEMS[0].id: [1]})
    step = run_step(reply)
    first, second = step.policy.updates
    num_failed, num_solved = len("no, sorry") + 1, len("yes") + 1
    assert len(first.samples) == 4 and len(second.samples) == 0
    assert first.num_loss_tokens == 7 * num_failed + num_solved
    assert second.num_loss_tokens == 8 * num_failed
    kept = run_step(reply, {"objective.drop_zero_advantage": False})
    assert [len(call.samples) for call in kept.policy.updates] == [8, 8]
    assert [call.num_loss_tokens for call in kept.policy.updates] == [first.num_loss_tokens, second.num_loss_tokens]
    assert all(sample.advantage == 0 for sample in kept.policy.updates[1].samples)


def test_old_log_probs_are_scored_before_any_update_and_the_engines_refreshed_last() -> None:
    step = run_step(settings={"schedule.problems_per_update": 1}, templates=TEMPLATED, step=3)
    assert step.journal == ["generate", "release", *["logprobs"] * 3, *["update"] * 4, "weights", "refresh"]
    assert step.policy.updates[0].old_logprobs is None
    for call, asked in zip(step.policy.updates[1:], step.policy.asked_logprobs, strict=True):
        assert call.samples == asked and call.old_logprobs is not None
        for sample, old in zip(call.samples, call.old_logprobs, strict=True):
            assert np.array_equal(old, fake_logprobs(sample.context_ids, sample.response_ids, num_updates=3))


@pytest.mark.parametrize("context", ["sampling", "replace", "importance", "ratio_mask"])
def test_one_update_per_step_needs_no_scoring(context: Context) -> None:
    step = run_step(settings={"schedule.problems_per_update": 4, "objective.context": context}, templates=TEMPLATED)
    assert step.journal == ["generate", "release", "update", "weights", "refresh"]
    assert step.policy.updates[0].old_logprobs is None


def test_true_importance_ratios_never_need_scoring() -> None:
    step = run_step(settings={"objective.context": "importance"}, templates=TEMPLATED)
    assert step.journal == ["generate", "release", "update", "update", "weights", "refresh"]
    assert [call.old_logprobs for call in step.policy.updates] == [None, None]


@pytest.mark.parametrize(("context", "num_scored"), [("sampling", 16), ("ratio_mask", 17)])
def test_recomputed_log_probs_are_not_computed_again_as_old_ones(context: Context, num_scored: int) -> None:
    """16 rollouts, of which one is templated, in the second of two updates."""
    settings = {"logprobs.recompute": True, "objective.context": context, "objective.drop_zero_advantage": False}
    templates = {PROBLEMS[3].id: (PLAIN, HINT, PLAIN, PLAIN)}
    step = run_step(settings=settings, templates=templates, step=2)
    assert sum(map(len, step.policy.asked_logprobs)) == num_scored
    first, second = step.policy.updates
    assert first.old_logprobs is None and second.old_logprobs is not None
    for sample, old in zip(second.samples, second.old_logprobs, strict=True):
        assert np.array_equal(old, fake_logprobs(sample.context_ids, sample.response_ids, num_updates=2))


@pytest.mark.parametrize("drop_failed", [False, True])
@pytest.mark.parametrize("num_updates", [1, 2])
def test_recomputed_log_probs_are_the_trainers_under_the_sampling_prompt(drop_failed: bool, num_updates: int) -> None:
    def mismatched(prompt: Prompt, index: int) -> FakeReply:
        finish = "abort" if index == 5 else "stop"
        reply = replace(mixed_reply(prompt, index), finish_reason=finish)
        return replace(reply, logprobs=np.full(len(reply.token_ids), -9.0, np.float32))

    settings = {
        "logprobs.recompute": True,
        "logprobs.importance_cap": 2.0,
        "objective.drop_failed_templated": drop_failed,
        "objective.drop_zero_advantage": False,
        "schedule.problems_per_update": 4 // num_updates,
    }
    step = run_step(mismatched, settings, TEMPLATED, step=5)
    assert step.journal[: 2 * num_updates + 1] == ["generate", "release", *["logprobs"] * (2 * num_updates - 1)]
    trained = [sample for call in step.policy.updates for sample in call.samples]
    sampled = [
        rollout.completion
        for group in step.result.groups
        for rollout in group.rollouts
        if rollout.completion.finish_reason != "abort"
        and not (drop_failed and rollout.completion.prompt.is_templated and rollout.reward == 0)
    ]
    assert len(trained) == len(sampled) < 16
    for sample, completion in zip(trained, sampled, strict=True):
        expected = fake_logprobs(completion.prompt.sampling_ids, completion.token_ids, num_updates=5)
        assert np.array_equal(sample.sampling_logprobs, expected)
        assert np.array_equal(sample.context_ids, completion.prompt.training_ids)
        assert np.array_equal(sample.response_ids, completion.token_ids)
    for call, report in zip(step.policy.updates, step.result.reports, strict=True):
        rows = [np.exp(sample.sampling_logprobs + 9.0) for sample in call.samples if sample.advantage != 0]
        assert report.tokens.weighted_tokens == sum(map(len, rows)) > 0
        assert report.tokens.capped_tokens == sum(int((row > 2.0).sum()) for row in rows)


@pytest.mark.parametrize("num_updates", [1, 2])
@pytest.mark.parametrize("templates", [{}, TEMPLATED], ids=["plain", "templated"])
def test_importance_weights_take_a_forward_pass_of_templated_rollouts_alone(
    num_updates: int, templates: Mapping[str, Sequence[Template]]
) -> None:
    def mismatched(prompt: Prompt, index: int) -> FakeReply:
        reply = mixed_reply(prompt, index)
        return replace(reply, logprobs=fake_logprobs(prompt.sampling_ids, reply.token_ids, 5) - np.float32(0.3))

    settings = {"logprobs.importance_cap": 1.2, "schedule.problems_per_update": 4 // num_updates}
    step = run_step(mismatched, settings, templates, step=5)
    asked = step.policy.asked_logprobs
    # Plain rollouts get their weight in the training pass; later updates need old log-probs in any case.
    weighed = asked[: len(asked) - (num_updates - 1)]
    of_templates = {tuple(prompt.sampling_ids) for prompt in step.engines.prompts if prompt.is_templated}
    assert bool(weighed) == bool(templates)
    assert {tuple(sample.context_ids) for call in weighed for sample in call} <= of_templates
    for call, report in zip(step.policy.updates, step.result.reports, strict=True):
        templated = [sample for sample in call.samples if sample.is_templated]
        for sample in call.samples:
            # Whatever the template, the weight is that of the mismatch alone: exp(0.3) = 1.35, truncated.
            assert sample.engine_logprobs is not None
            assert sample.loss_weights == (pytest.approx(1.2) if sample.is_templated else None)
        num_tokens = sum(len(sample.response_ids) for sample in templated)
        assert (report.tokens.weighted_tokens, report.tokens.capped_tokens) == (num_tokens, num_tokens)


def test_a_kl_term_in_the_loss_keeps_every_rollout_and_asks_the_initial_policy_once() -> None:
    agree = {"objective.kl_coefficient": 0.1, "objective.normalization": "sequence_mean"}
    step = run_step(solved_by({PROBLEMS[0].id: range(4)}), agree, step=2)
    assert step.journal.count("reference_logprobs") == 1
    assert step.journal.index("reference_logprobs") < step.journal.index("update")
    for call in step.policy.updates:
        assert len(call.samples) == 8, "groups whose rollouts all agree take part"
        for sample in call.samples:
            expected = fake_logprobs(sample.context_ids, sample.response_ids, 0)
            np.testing.assert_array_equal(sample.reference_logprobs, expected)
            share = call.num_loss_tokens / (8 * len(sample.response_ids))
            np.testing.assert_allclose(sample.loss_weights, share, rtol=1e-6)


def test_a_kl_term_in_the_reward_changes_the_credit_and_no_grade() -> None:
    settings = {"objective.kl_coefficient": 0.1, "objective.kl_as": "reward", "objective.kl_estimator": "k1"}
    plain, shaped = run_step(step=2), run_step(settings=settings, step=2)
    seen = [
        [
            (rollout.grade, advantage)
            for group in step.result.groups
            for rollout, advantage in zip(group.rollouts, group.advantages, strict=True)
        ]
        for step in (plain, shaped)
    ]
    assert seen[0] == seen[1]
    credit = [[sample.advantage for call in step.policy.updates for sample in call.samples] for step in (plain, shaped)]
    assert credit[0] != credit[1][: len(credit[0])]
    assert all(sample.reference_logprobs is None for call in shaped.policy.updates for sample in call.samples)
    assert shaped.result.reports[0].tokens.reference_tokens > 0 == shaped.result.reports[1].tokens.reference_tokens


@pytest.mark.parametrize("context", ["replace", "sampling", "ratio_mask"])
@pytest.mark.parametrize("recompute", [False, True])
def test_what_the_kl_term_in_the_reward_has_scored_is_not_scored_again_for_later_updates(
    context: Context, recompute: bool
) -> None:
    settings = {
        "objective.kl_coefficient": 0.1,
        "objective.kl_as": "reward",
        "objective.kl_estimator": "k1",
        "objective.context": context,
        "logprobs.recompute": recompute,
        "schedule.problems_per_update": 1,
    }
    step = run_step(settings=settings, templates=TEMPLATED, step=2)
    scored = [
        (id(sample.context_ids), id(sample.response_ids)) for asked in step.policy.asked_logprobs for sample in asked
    ]
    assert len(scored) == len(set(scored)) >= 16
    for call in step.policy.updates[1:]:
        assert call.old_logprobs is not None
        for sample, old in zip(call.samples, call.old_logprobs, strict=True):
            assert np.array_equal(old, fake_logprobs(sample.context_ids, sample.response_ids, num_updates=2))


def test_engines_serve_the_updated_weights_under_the_next_version() -> None:
    step = run_step(step=7)
    assert step.engines.refreshes == [8] and step.engines.version == 8
    assert step.engines.num_updates == step.policy.num_updates == 9
    assert {r.completion.weight_versions for group in step.result.groups for r in group.rollouts} == {(7,)}
    assert len(step.result.reports) == 2


def test_rollouts_are_sampled_as_configured() -> None:
    step = run_step(settings={"rollout.temperature": 0.7, "rollout.top_p": 0.9, "rollout.max_new_tokens": 5})
    (sampling,) = step.engines.samplings
    assert (sampling.temperature, sampling.top_p, sampling.max_new_tokens) == (0.7, 0.9, 5)


def test_a_rollout_that_was_given_up_on_is_not_trained_on_and_its_siblings_are_credited() -> None:
    def one_lost(prompt: Prompt, index: int) -> FakeReply:
        return (
            FakeReply(text="lost", finish_reason="abort")
            if index == 1
            else FakeReply(text="yes" if index == 0 else "no")
        )

    step = run_step(one_lost, {"schedule.problems_per_update": 1}, problems=PROBLEMS[:1])
    (group,) = step.result.groups
    won, lost_a, lost_b = credits([1, 0, 0])
    assert group.advantages == pytest.approx((won, 0.0, lost_a, lost_b))
    assert group.rollouts[1].grade.reward is None
    (call,) = step.policy.updates
    assert [sample.advantage for sample in call.samples] == pytest.approx([won, lost_a, lost_b])
    assert call.num_loss_tokens == len("yes") + 1 + 2 * (len("no") + 1)
    assert "lost" not in [text for _, text in step.grader.submitted]


def test_an_undecided_answer_is_no_wrong_answer() -> None:
    """As a failure beside five successes it would get an advantage of -2.04."""
    reply = {index: FakeReply(text="?" if index == 5 else "yes") for index in range(6)}
    step = run_step(lambda prompt, index: reply[index % 6], {"rollout.group_size": 6}, problems=PROBLEMS[:2])
    for group in step.result.groups:
        assert group.rollouts[5].grade == UNDECIDED and not group.rollouts[5].is_decided
        assert group.advantages == (0.0,) * 6
    assert num_informative(step.result.groups) == 0, "dynamic sampling asks further problems"
    (call,) = step.policy.updates
    assert call.samples == ()
    assert call.num_loss_tokens == 2 * 5 * (len("yes") + 1), "its tokens are no part of the denominator"


def test_an_undecided_answer_does_not_decide_what_is_hard() -> None:
    reply = {0: FakeReply(text="yes"), 1: FakeReply(text="yes"), 2: FakeReply(text="?"), 3: FakeReply(text="?")}
    assert run_step(lambda prompt, index: reply[index % 4]).result.hard == []
    assert run_step(lambda prompt, index: FakeReply(text="?")).result.hard == []


def test_a_step_that_trains_on_nothing_still_compares_engine_and_trainer() -> None:
    def off_by_a_quarter(prompt: Prompt, index: int) -> FakeReply:
        reply = FakeReply(text="no")
        truth = fake_logprobs(prompt.sampling_ids, reply.token_ids, num_updates=5)
        return replace(reply, logprobs=truth + np.float32(0.25))

    step = run_step(off_by_a_quarter, step=5)
    assert [call.samples for call in step.policy.updates] == [(), ()]
    tokens = step.result.reports[0].tokens
    assert tokens.mismatch_abs_sum == pytest.approx(0.25 * tokens.mismatch_tokens, rel=1e-5)
    assert tokens.mismatch_abs_max == pytest.approx(0.25, rel=1e-5)


def test_a_step_whose_rollouts_are_all_lost_moves_nothing_and_counts() -> None:
    step = run_step(lambda prompt, index: FakeReply(text="", finish_reason="abort"), templates=TEMPLATED)
    assert step.result.hard == []
    assert [(call.samples, call.num_loss_tokens) for call in step.policy.updates] == [((), 0), ((), 0)]
    assert step.engines.refreshes == [1] and step.engines.num_updates == 0


def test_problems_their_plain_rollouts_fail_are_hard() -> None:
    reply = solved_by({PROBLEMS[0].id: [0, 1], PROBLEMS[1].id: [0, 1, 3], PROBLEMS[2].id: [0], PROBLEMS[3].id: []})
    assert run_step(reply).result.hard == [PROBLEMS[2], PROBLEMS[3]]
    templated = {PROBLEMS[1].id: [HINT, HINT, PLAIN, HINT]}
    assert run_step(reply, templates=templated).result.hard == PROBLEMS[1:]
    assert run_step(reply, {"hard.counted": "all"}, templated).result.hard == PROBLEMS[2:]


def test_a_problem_with_further_plain_rollouts_has_a_larger_group_and_its_siblings_their_own() -> None:
    larger = {PROBLEMS[1].id: [PLAIN] * 7, PROBLEMS[2].id: [PLAIN] * 5}
    step = run_step(settings={"schedule.problems_per_update": 4}, templates=larger)
    assert [len(group.rollouts) for group in step.result.groups] == [4, 7, 5, 4]
    for problem, group in zip(PROBLEMS, step.result.groups, strict=True):
        assert {rollout.completion.prompt.problem.id for rollout in group.rollouts} == {problem.id}
        rewards = [rollout.reward for rollout in group.rollouts]
        assert group.advantages == pytest.approx(credits(rewards), abs=1e-6)
    assert any(any(group.advantages) for group in step.result.groups[1:3]), "a group that shows nothing proves nothing"
    (update,) = step.policy.updates
    tokens = [len(rollout.completion.token_ids) for group in step.result.groups for rollout in group.rollouts]
    assert len(tokens) == 20 and update.num_loss_tokens == sum(tokens)
    assert len(update.samples) == sum(advantage != 0 for group in step.result.groups for advantage in group.advantages)


def hinted_step(context: str, num_failed: int = 1, **hints: Sequence[str]) -> Step:
    """Run a step whose problems have failed plainly so many times; each has the hints given under its id."""
    problems = [replace(each, hints=tuple(hints.get(each.id.replace("-", "_"), ()))) for each in PROBLEMS]
    failed = [
        LedgerEntry(
            epoch=e, step=e, problem_id=p.id, plain_tries=4, plain_solved=0, templated_tries=0, templated_solved=0
        )
        for e in range(num_failed)
        for p in PROBLEMS[:2]
    ]
    settings = {
        **{"data.hints_field": "hints", "evolution.enabled": False},
        **{"objective.context": context, "assignment.num_plain": 1, "schedule.problems_per_update": 4},
    }
    return run_step(settings=settings, problems=problems, ledger=HardSampleLedger(failed))


@pytest.mark.parametrize("context", ["sampling", "replace", "importance", "ratio_mask"])
def test_a_hint_is_a_template_of_its_hard_problem_under_every_context(context: str) -> None:
    hints = {"problem_000": ["§ one", "§ two"], "problem_002": ["§ three"]}
    step = hinted_step(context, **hints)
    texts = [[rollout.completion.prompt.template.text for rollout in group.rollouts] for group in step.result.groups]
    assert texts == [["§ one"] * 3 + [""], *[[""] * 4] * 3], "the second has no hint, the third has not failed"
    (update,) = step.policy.updates
    of_hinted = [sample for sample in update.samples if sample.key[0] == PROBLEMS[0].id and sample.key[1] < 3]
    assert of_hinted and all(sample.is_templated == (context != "sampling") for sample in of_hinted)
    marks = [fake_token_ids("§")[0] in sample.context_ids for sample in update.samples]
    assert any(marks) == (context == "sampling")
    assert fake_token_ids("§")[0] in step.engines.prompts[0].sampling_ids
    again = hinted_step(context, 2, **hints).result.groups[0].rollouts[0]
    assert again.completion.prompt.template.text == "§ two" and again.completion.prompt.template.id == 2


def test_a_hint_teaches_a_plain_rollout_of_its_problem_by_on_policy_distillation() -> None:
    step = hinted_step("distill", problem_000=["§ one"])
    assert not any(prompt.is_templated for prompt in step.engines.prompts)
    taught = [rollout.teaching and rollout.teaching.template.text for rollout in step.result.groups[0].rollouts]
    assert taught == ["§ one"] * 3 + [None]
    assert all(rollout.teaching is None for group in step.result.groups[1:] for rollout in group.rollouts)


def test_cloning_divides_by_the_tokens_of_what_it_clones() -> None:
    solved = {PROBLEMS[0].id: [0, 1, 2, 3], PROBLEMS[1].id: [2]}
    settings = {"objective.surrogate": "clone", "objective.context": "replace", "schedule.problems_per_update": 4}
    (update,) = run_step(solved_by(solved), settings, TEMPLATED).policy.updates
    assert [sample.key for sample in update.samples] == [
        *((PROBLEMS[0].id, place) for place in range(4)),
        (PROBLEMS[1].id, 2),
    ]
    assert update.num_loss_tokens == sum(len(sample.response_ids) for sample in update.samples) == 5 * len("yes.")
    nothing = run_step(solved_by({}), settings, TEMPLATED)
    assert [(update.samples, update.num_loss_tokens) for update in nothing.policy.updates] == [((), 0)]


def test_the_anchor_is_the_ledgers_plain_rate_of_each_problem() -> None:
    entries = [
        LedgerEntry(
            epoch=0, step=1, problem_id=p.id, plain_tries=4, plain_solved=n, templated_tries=0, templated_solved=0
        )
        for n, p in enumerate(PROBLEMS)
    ]
    templates = {problem.id: [HINT] * 4 for problem in PROBLEMS}
    reply = solved_by({problem.id: [0, 1, 2, 3] for problem in PROBLEMS})
    settings = {"advantage.baseline": "plain_anchored"}
    step = run_step(reply, settings, templates, ledger=HardSampleLedger(entries))
    for number, group in enumerate(step.result.groups):
        assert group.advantages == pytest.approx(credits([1.0] * 4, anchor=number / 4))
    assert run_step(reply, None, templates).policy.updates[0].samples == ()


@pytest.mark.parametrize("sizes", [(4, 2), (8, 4), (3, 5)])
def test_a_library_made_for_another_group_size_is_refused(sizes: tuple[int, int]) -> None:
    templates = {problem.id: [HINT] * size for problem, size in zip(PROBLEMS, sizes, strict=False)}
    with pytest.raises(ValueError, match=r"rollout\.group_size=4 .*'problem-00[01]'"):
        run_step(templates=templates)


def test_a_step_that_fails_has_moved_nothing() -> None:
    journal = CallLog()

    def lost(prompt: Prompt, index: int) -> FakeReply:
        raise ConnectionError("engine lost")

    policy = FakePolicy(journal=journal)
    engines = FakeEngines(reply=lost, journal=journal)
    parts = Parts(
        policy=policy, engines=engines, grader=FakeGrader(), renderer=FakeRenderer(), solved_at=1.0, evolution=None
    )
    with pytest.raises(ConnectionError):
        p2o_step(PROBLEMS, TrainState(library=FakeLibrary()), HardSampleLedger(), parts, fake_config(), iter(()))
    assert journal == ["generate"]


MORE = [[fake_problem(number) for number in range(start, start + 4)] for start in (4, 8, 12)]
"""The batches that follow `PROBLEMS`."""


def trained_problems(step: Step) -> list[set[str]]:
    """Return the questions each update was trained on."""
    return [
        {"".join(map(chr, sample.context_ids)) for sample in call.samples if sample.advantage != 0}
        for call in step.policy.updates
    ]


def questions(*numbers: int) -> set[str]:
    return {fake_problem(number).question for number in numbers}


def test_dynamic_sampling_asks_further_batches_until_enough_groups_disagree() -> None:
    disagreeing = {fake_problem(number).id: [0, 2] for number in (1, 6, 7, 8, 11, 13)}
    settings = {"schedule.max_batches_per_step": 4}
    step = run_step(solved_by(disagreeing), settings, following=MORE)
    assert step.result.num_batches == 3
    assert [group.problem for group in step.result.groups] == [*PROBLEMS, *MORE[0], *MORE[1]]
    assert trained_problems(step) == [questions(1, 6), questions(7, 8)]  # 11 is one too many, 13 was not asked
    assert {problem.id for problem in step.result.hard} == {fake_problem(n).id for n in (0, 2, 3, 4, 5, 9, 10)}
    assert step.engines.refreshes == [1]


@pytest.mark.parametrize(("max_batches", "num_following", "asked"), [(1, 3, 1), (2, 3, 2), (4, 1, 2), (4, 0, 1)])
def test_dynamic_sampling_ends_at_its_limit_and_with_the_epoch(
    max_batches: int, num_following: int, asked: int
) -> None:
    settings = {"schedule.max_batches_per_step": max_batches}
    step = run_step(solved_by({PROBLEMS[3].id: [1]}), settings, following=MORE[:num_following])
    assert step.result.num_batches == asked
    assert trained_problems(step) == [set(), questions(3)]  # of the agreeing groups, the first asked fill the step
    assert len(step.result.groups) == 4 * asked
