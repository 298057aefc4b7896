"""Step metrics against numbers counted by hand."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest

from megatron_p2o.evaluation.outcome import GradedResponse, evaluation_metrics, evaluation_of
from megatron_p2o.metrics.step import (
    asked_plainly_metrics,
    epoch_metrics,
    library_metrics,
    step_metrics,
    template_effect_metrics,
)
from megatron_p2o.metrics.values import numbers_of
from megatron_p2o.rl.hard_samples import LedgerEntry
from megatron_p2o.testing.fakes import UNDECIDED, fake_problem
from megatron_p2o.types import (
    CORRECT,
    INCORRECT,
    PLAIN,
    Completion,
    ContextShift,
    FinishReason,
    Grade,
    Group,
    Problem,
    Prompt,
    Rollout,
    Template,
    TokenStats,
    UpdateOutcome,
    UpdateReport,
    no_tokens,
)

HINT = Template(id=3, text="Go on.", parent=0)


def rollout(
    problem: Problem,
    template: Template,
    *,
    correct: bool,
    length: int = 4,
    finish: FinishReason = "stop",
    grade: Grade | None = None,
) -> Rollout:
    ids = np.arange(5, dtype=np.int32)
    completion = Completion(
        prompt=Prompt(problem=problem, template=template, sampling_ids=ids, training_ids=ids),
        token_ids=np.zeros(length, dtype=np.int32),
        logprobs=np.zeros(length, dtype=np.float32),
        finish_reason=finish,
        weight_versions=(1,),
    )
    verdict = Grade.undecided("aborted") if finish == "abort" else Grade(reward=float(correct))
    return Rollout(completion=completion, grade=grade or verdict)


def two_groups() -> list[Group]:
    easy = Problem(id="e", question="?", answer="1", level="easy")
    hard = Problem(id="h", question="?", answer="2", level="hard")
    return [
        Group(
            problem=easy,
            rollouts=(rollout(easy, PLAIN, correct=True, length=2), rollout(easy, PLAIN, correct=True, length=3)),
            advantages=(0.0, 0.0),
        ),
        Group(
            problem=hard,
            rollouts=(
                rollout(hard, HINT, correct=True, length=10),
                rollout(hard, HINT, correct=False, length=16, finish="length"),
                rollout(hard, PLAIN, correct=False, length=5, grade=UNDECIDED),
                rollout(hard, PLAIN, correct=False, length=0, finish="abort"),
            ),
            advantages=(1.2, -0.6, -0.6, 0.0),
        ),
    ]


def report(loss: float, *, outcome: UpdateOutcome = "applied", tokens: float = 10.0, **sums: float) -> UpdateReport:
    return UpdateReport(
        loss=loss,
        grad_norm=2 * loss,
        learning_rate=loss / 100,
        outcome=outcome,
        tokens=replace(no_tokens(), **{"loss_tokens": tokens, "live_tokens": tokens, "kept_tokens": tokens, **sums}),
    )


def test_rewards_are_told_apart_by_prompt_and_by_level() -> None:
    numbers = numbers_of(step_metrics(two_groups(), [], {}))
    assert numbers["rollout/reward_mean"] == 3 / 4, "neither an aborted nor an undecided rollout is a failure"
    assert numbers["rollout/reward_plain"] == 2 / 2
    assert numbers["rollout/reward_templated"] == 1 / 2
    assert numbers["rollout/reward_level_easy"] == 1
    assert numbers["rollout/reward_level_hard"] == 1 / 2


def test_every_task_has_its_numbers_and_a_single_one_none() -> None:
    first, second = two_groups()
    assert not [name for name in step_metrics([first, second], [], {}) if name.startswith("task/")]
    of_tasks = [
        replace(each, problem=replace(each.problem, task=task)) for each, task in ((first, "math"), (second, "code"))
    ]
    numbers = numbers_of(step_metrics(of_tasks, [], {}))
    assert numbers["task/math/reward_mean"] == numbers_of(step_metrics([first], [], {}))["rollout/reward_mean"]
    assert numbers["task/code/reward_mean"] == numbers_of(step_metrics([second], [], {}))["rollout/reward_mean"]
    assert numbers["task/math/groups_count"] == numbers["task/code/groups_count"] == 1
    alone = numbers_of(step_metrics([second], [], {}))
    assert numbers["task/code/zero_advantage_groups_share"] == alone["rollout/zero_advantage_groups_share"]
    assert numbers["task/code/undecided_share"] == alone["rollout/undecided_share"]


def test_what_carries_no_gradient_and_how_completions_end_is_counted() -> None:
    numbers = numbers_of(step_metrics(two_groups(), [], {}))
    assert numbers["rollout/zero_advantage_groups_share"] == 1 / 2
    assert numbers["rollout/dropped_rollouts_share"] == 3 / 6
    assert numbers["rollout/truncated_share"] == 1 / 5
    assert numbers["rollout/aborted_count"] == 1
    assert numbers["rollout/grade_error_count"] == 1
    assert numbers["rollout/undecided_share"] == 1 / 5
    assert numbers["rollout/response_tokens_mean"] == 36 / 5
    assert numbers["rollout/response_tokens_max"] == 16


def test_a_plain_step_says_nothing_about_templated_rollouts() -> None:
    numbers = numbers_of(step_metrics(two_groups()[:1], [report(1.0, templated_tokens=0, templated_kept_tokens=0)], {}))
    assert "rollout/reward_templated" not in numbers
    assert "train/ratio_mask_kept_share" not in numbers
    assert numbers["rollout/reward_plain"] == 1


def test_token_shares_are_over_all_updates_tokens_not_means_of_updates() -> None:
    reports = [
        report(1.0, tokens=10, clipped_tokens=1, templated_tokens=4, templated_kept_tokens=1, entropy_sum=5),
        report(3.0, tokens=30, clipped_tokens=9, templated_tokens=16, templated_kept_tokens=14, entropy_sum=25),
    ]
    numbers = numbers_of(step_metrics([], reports, {}))
    assert numbers["train/loss"] == 2
    assert numbers["train/grad_norm"] == 4
    assert numbers["train/learning_rate"] == 0.03
    assert numbers["train/clipped_share"] == 10 / 40
    assert numbers["train/ratio_mask_kept_share"] == 15 / 20
    assert numbers["train/entropy_mean"] == 30 / 40


def test_the_shift_is_a_mean_over_tokens_of_all_rollouts_and_of_each_template() -> None:
    easy, hard = fake_problem(0), fake_problem(1)
    other = Template(id=7, text="Stop.", parent=0)
    groups = [
        Group(problem=each, rollouts=tuple(rollout(each, z, correct=True) for z in asked), advantages=(1.0, 1.0, 0.0))
        for each, asked in ((easy, (HINT, other, PLAIN)), (hard, (HINT, HINT, PLAIN)))
    ]

    def shift(head: tuple[float, int], rest: tuple[float, int]) -> ContextShift:
        return ContextShift(head_sum=head[0], head_tokens=head[1], rest_sum=rest[0], rest_tokens=rest[1])

    first = {(easy.id, 0): shift((4.0, 2), (1.0, 8)), (easy.id, 1): shift((3.0, 1), (0.0, 0))}
    second = {(hard.id, 1): shift((-1.0, 1), (5.0, 4))}
    reports = [replace(report(1), shifts=shifts) for shifts in (first, second)]
    numbers = {key: value for key, value in numbers_of(step_metrics(groups, reports, {})).items() if "shift" in key}
    assert numbers == {
        "template/shift_per_token": 12 / 16,
        "template/shift_head_per_token": 6 / 4,
        "template/shift_rest_per_token": 6 / 12,
        "template/3/shift_per_token": 9 / 15,
        "template/7/shift_per_token": 3.0,
    }
    assert not any("shift" in key for key in numbers_of(step_metrics(groups, [report(1)], {})))


def test_problems_tried_both_ways_are_helped_or_hurt_by_their_templates() -> None:
    def entry(plain: tuple[int, int], templated: tuple[int, int]) -> LedgerEntry:
        tried = {"plain_tries": plain[1], "templated_tries": templated[1]}
        solved = {"plain_solved": plain[0], "templated_solved": templated[0]}
        return LedgerEntry(epoch=0, step=1, problem_id="p", **tried, **solved)

    entries = [entry((1, 2), (1, 4)), entry((0, 2), (4, 4)), entry((2, 2), (0, 0))]
    numbers = numbers_of(template_effect_metrics(entries))
    assert numbers == {"hard/helped_share": (1 / 8 + 1) / 2, "hard/hurt_share": (3 / 8 + 0) / 2}


def test_updates_that_moved_nothing_are_counted_by_reason_and_spoil_no_mean() -> None:
    reports = [report(1.0), *[report(0.0, outcome="empty")] * 2, report(float("nan"), outcome="non_finite")]
    numbers = numbers_of(step_metrics([], reports, {}))
    assert numbers["train/loss"] == 1
    assert numbers["train/empty_updates_count"] == 2
    assert numbers["train/non_finite_updates_count"] == 1


@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_token_that_is_no_number_makes_the_worst_mismatch_none(place: int) -> None:
    worst = [0.1, 0.2, 0.3]
    worst[place] = float("nan")
    reports = [report(1, mismatch_tokens=2, mismatch_abs_sum=each, mismatch_abs_max=each) for each in worst]
    numbers = numbers_of(step_metrics([], reports, {}))
    assert math.isnan(numbers["mismatch/logprob_abs_max"]) and math.isnan(numbers["mismatch/logprob_abs_mean"])


def test_entropy_that_was_not_computed_is_not_reported_as_zero() -> None:
    assert "train/entropy_mean" not in step_metrics([], [report(1.0, entropy_sum=0.0)], {})


def test_mismatch_is_averaged_over_compared_tokens_and_its_maximum_is_the_worst_token() -> None:
    reports = [
        report(
            1,
            mismatch_tokens=2,
            mismatch_abs_sum=0.2,
            mismatch_ratio_sum=2.0,
            mismatch_abs_max=0.15,
            mismatch_kl_sum=0.5,
        ),
        report(1, mismatch_tokens=8, mismatch_abs_sum=0.2, mismatch_ratio_sum=9.0, mismatch_abs_max=0.05),
        report(1, mismatch_tokens=0, mismatch_abs_sum=0.0, mismatch_ratio_sum=0.0, mismatch_abs_max=0.0),
    ]
    numbers = numbers_of(step_metrics([], reports, {}))
    assert numbers["mismatch/logprob_abs_mean"] == pytest.approx(0.04, rel=1e-12)
    assert numbers["mismatch/ratio_mean"] == 1.1
    assert numbers["mismatch/kl_mean"] == 0.05
    assert "mismatch/importance_capped_share" not in numbers
    capped = [report(1, weighted_tokens=6, capped_tokens=1), report(1, weighted_tokens=2, capped_tokens=1)]
    assert numbers_of(step_metrics([], capped, {}))["mismatch/importance_capped_share"] == 0.25
    assert numbers["mismatch/logprob_abs_max"] == 0.15


def test_speed_divides_sampled_tokens_by_rollout_and_trained_tokens_by_training_time() -> None:
    reports = [replace(report(1, tokens=20), flops_per_rank=5e12), replace(report(1, tokens=40), flops_per_rank=7e12)]
    numbers = numbers_of(step_metrics(two_groups(), reports, {"rollout": 4.0, "train": 3.0, "step": 8}))
    assert numbers["perf/rollout_tokens_per_s"] == 36 / 4
    assert numbers["perf/train_tokens_per_s"] == 60 / 3
    assert numbers["perf/train_tflops_per_rank"] == 4
    assert numbers["perf/step_s"] == 8


def test_a_step_without_groups_or_updates_has_no_means_and_no_error() -> None:
    numbers = numbers_of(step_metrics([], [], {}))
    assert numbers["rollout/aborted_count"] == 0
    assert "rollout/reward_mean" not in numbers
    assert "train/loss" not in numbers


def test_every_metric_of_the_tokens_has_its_own_numerator_and_denominator() -> None:
    tokens = TokenStats(**{field.name: 2.0**index for index, field in enumerate(fields(TokenStats))})
    numbers = numbers_of(step_metrics([], [replace(report(1), tokens=tokens)], {}))
    place = {field.name: index for index, field in enumerate(fields(TokenStats))}
    of_tokens = {
        "train/ratio_mask_kept_share": ("templated_kept_tokens", "templated_tokens"),
        "train/ratio_mask_dropped_advantage_share": ("dropped_advantage_sum", "templated_advantage_sum"),
        "train/ratio_mask_dropped_shift_share": ("dropped_gain_sum", "templated_gain_sum"),
        "train/clipped_share": ("clipped_tokens", "kept_tokens"),
        "train/ratio_mean": ("ratio_sum", "live_tokens"),
        "train/entropy_mean": ("entropy_sum", "live_tokens"),
        "train/reference_kl_mean": ("reference_kl_sum", "reference_tokens"),
        "mismatch/logprob_abs_mean": ("mismatch_abs_sum", "mismatch_tokens"),
        "mismatch/ratio_mean": ("mismatch_ratio_sum", "mismatch_tokens"),
        "mismatch/kl_mean": ("mismatch_kl_sum", "mismatch_tokens"),
        "mismatch/importance_capped_share": ("capped_tokens", "weighted_tokens"),
    }
    for name, (numerator, denominator) in of_tokens.items():
        assert numbers[name] == 2.0 ** (place[numerator] - place[denominator]), name
    assert numbers["mismatch/logprob_abs_max"] == 2.0 ** place["mismatch_abs_max"]
    assert {name for name in numbers if name.startswith("mismatch/")} == {
        *(name for name in of_tokens if name.startswith("mismatch/")),
        "mismatch/logprob_abs_max",
    }


def test_epoch_and_evaluation_metrics_are_named_by_area() -> None:
    hard = [Problem(id="h", question="?", answer="2")]
    grades: tuple[Grade, ...] = (CORRECT, INCORRECT, UNDECIDED, CORRECT)
    answers = [
        GradedResponse(problem_id="h", sample=sample, grade=grade, finish_reason="stop", num_tokens=1)
        for sample, grade in enumerate(grades)
    ]
    numbers = numbers_of(
        {
            **epoch_metrics(hard, is_round_skipped=None),
            **library_metrics(2, 5, {"best_score": 0.75}),
            **evaluation_metrics({"heldout_hard": evaluation_of(answers, hard, 4, 0.6)}),
        }
    )
    assert numbers == {
        "hard/set_size": 1,
        "library/version": 2,
        "library/num_templates": 5,
        "evolution/best_score": 0.75,
        "eval/heldout_hard/avg": pytest.approx(2 / 3),
        "eval/heldout_hard/reward_mean": pytest.approx(2 / 3),
        # Any two of the three answers with a verdict hold a correct one.
        "eval/heldout_hard/pass_at_2": 1.0,
        "eval/heldout_hard/undecided_share": 0.25,
        "eval/heldout_hard/aborted_count": 0,
    }


def test_rollouts_whose_template_did_not_fit_are_counted() -> None:
    def group(problem: Problem, *templates: Template) -> Group:
        rollouts = tuple(rollout(problem, template, correct=False) for template in templates)
        return Group(problem=problem, rollouts=rollouts, advantages=(0.0,) * len(rollouts))

    fits, does_not, easy = (fake_problem(number) for number in range(3))
    given = [(HINT, HINT, PLAIN), (HINT, HINT, PLAIN), (PLAIN,) * 3]
    groups = [group(fits, HINT, HINT, PLAIN), group(does_not, PLAIN, HINT, PLAIN), group(easy, PLAIN, PLAIN, PLAIN)]
    assert numbers_of(asked_plainly_metrics(groups, given)) == {"rollout/asked_plainly_count": 1}
