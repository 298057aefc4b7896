"""Metrics of a step: pure functions of what the algorithm returned. Keys are `area/name_unit`.

A `_share` lies in [0, 1] and its denominator is in the table below; a metric without observations (the reward of
templated rollouts in a plain step) is left out rather than reported as zero.

    rollout/reward_*                    decided rollouts of that kind (`Rollout.is_decided`)
    task/<name>/*                       the same of one task, in runs with several (`data.train`)
    rollout/solved_share                decided rollouts: their reward reaches hard.solved_at
    rollout/undecided_share             responses that were graded: the grader could not decide, `grade_error_count`
    rollout/zero_advantage_groups_share groups
    rollout/dropped_rollouts_share      rollouts
    rollout/truncated_share             rollouts that the engines did not give up, as rollout/response_tokens_*
    train/ratio_mask_kept_share         response tokens of templated rollouts with an advantage
    train/ratio_mask_dropped_*_share    |advantage| of those tokens; for successes, times what the template adds in nats
    template/*shift*per_token           tokens of templated rollouts that were trained on without their template
    distill/gain_per_token              tokens of plain rollouts that a template taught
    train/clipped_share                 tokens that keep a weight after the context ratio
    train/*_mean                        tokens that went through the LM head
    train/reference_kl_mean             tokens with a KL term: KL(policy || initial policy) in nats by k3
    train/empty_updates_count           updates without a gradient: the rollouts of every group had one outcome
    train/non_finite_updates_count      updates that were skipped because their gradient was not finite
    memory/<phase>_peak_bytes           of the conducting rank: tensors on its GPU; without one, resident memory
    memory/*_host*_bytes                resident pages of ranks, engines, graders, evolution (`memory.ProcessMemory`)
    hard/forgotten_share                problems of the step that were mastered: solved plainly at least half the time
    hard/helped_share, hard/hurt_share  problems of the step tried with and without a template
    hard/first_solved_by_template_share problems tried so far
    hard/internalised_share             problems first solved by a template: solved plainly since
    hint/level_mean                     problems of the step that were asked through a hint
    mismatch/*_mean                     tokens of plain rollouts with an advantage: engine and trainer, same prompt
    mismatch/importance_capped_share    tokens with an importance weight: it was truncated at logprobs.importance_cap

`mismatch/kl_mean` estimates KL(engine || trainer) in nats per token; see `types.TokenStats`.
"""

from collections.abc import Iterable, Mapping, Sequence

from megatron_p2o.config.shape import ONLY_TASK
from megatron_p2o.metrics.values import Last, Max, Mean, MetricValue, Sum
from megatron_p2o.rl.hard_samples import HardSampleLedger, LedgerEntry, helped_and_hurt
from megatron_p2o.rl.objective import total_stats
from megatron_p2o.rl.teachers.teaching import teachings_of
from megatron_p2o.types import ContextShift, Demonstration, Group, Problem, Rollout, RolloutKey, Template, UpdateReport


def step_metrics(
    groups: Sequence[Group],
    reports: Sequence[UpdateReport],
    seconds: Mapping[str, float],
    peak_bytes: Mapping[str, int] | None = None,
) -> dict[str, MetricValue]:
    """Return everything one step shows.

    Args:
        groups: all rollouts of the step, the dropped ones included.
        reports: one per optimizer step, in order.
        seconds: phase name (rollout, grade, train, refresh, evolution, evaluation, step) to duration.
        peak_bytes: phase name to the most memory held in it; None where it is not measured.
    """
    return {
        **rollout_metrics(groups),
        **task_metrics(groups),
        **update_metrics(reports),
        **shift_metrics(groups, reports),
        **teaching_metrics(groups),
        **speed_metrics(groups, reports, seconds),
        **memory_metrics(peak_bytes or {}),
    }


def rollout_metrics(groups: Sequence[Group]) -> dict[str, MetricValue]:
    """Return rewards by kind and level, what the group baseline could not use, and how completions ended."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    plain = [rollout for rollout in rollouts if not rollout.completion.prompt.is_templated]
    templated = [rollout for rollout in rollouts if rollout.completion.prompt.is_templated]
    graded = [rollout for rollout in rollouts if not rollout.completion.is_aborted]
    is_undecided = [not rollout.is_decided for rollout in graded]
    lengths = [len(rollout.completion.token_ids) for rollout in graded]
    metrics: dict[str, MetricValue] = {
        "rollout/reward_mean": _mean_reward(rollouts),
        "rollout/solved_share": Mean.of(rollout.is_solved for rollout in rollouts if rollout.is_decided),
        "rollout/reward_plain": _mean_reward(plain),
        "rollout/reward_templated": _mean_reward(templated),
        "rollout/zero_advantage_groups_share": Mean.of(not any(group.advantages) for group in groups),
        "rollout/dropped_rollouts_share": Mean.of(a == 0 for group in groups for a in group.advantages),
        "rollout/truncated_share": Mean.of(rollout.completion.finish_reason == "length" for rollout in graded),
        "rollout/aborted_count": Sum(len(rollouts) - len(graded)),
        "rollout/grade_error_count": Sum(sum(is_undecided)),
        "rollout/undecided_share": Mean.of(is_undecided),
        "rollout/response_tokens_mean": Mean.of(lengths),
        "rollout/rollouts_count": Sum(len(rollouts)),
    }
    if lengths:
        metrics["rollout/response_tokens_max"] = Max(max(lengths))
    for level in sorted({group.problem.level for group in groups} - {""}):
        of_level = [rollout for group in groups if group.problem.level == level for rollout in group.rollouts]
        metrics[f"rollout/reward_level_{level}"] = _mean_reward(of_level)
    return metrics


def task_metrics(groups: Sequence[Group]) -> dict[str, MetricValue]:
    """Return rewards and what the group baseline could not use, of each task; nothing of a run with a single one."""
    metrics: dict[str, MetricValue] = {}
    for task in sorted({group.problem.task for group in groups} - {"", ONLY_TASK}):
        own = [group for group in groups if group.problem.task == task]
        rollouts = [rollout for group in own for rollout in group.rollouts]
        plain = [rollout for rollout in rollouts if not rollout.completion.prompt.is_templated]
        templated = [rollout for rollout in rollouts if rollout.completion.prompt.is_templated]
        metrics |= {
            f"task/{task}/reward_mean": _mean_reward(rollouts),
            f"task/{task}/reward_plain": _mean_reward(plain),
            f"task/{task}/reward_templated": _mean_reward(templated),
            f"task/{task}/solved_share": Mean.of(rollout.is_solved for rollout in rollouts if rollout.is_decided),
            f"task/{task}/zero_advantage_groups_share": Mean.of(not any(group.advantages) for group in own),
            f"task/{task}/undecided_share": Mean.of(
                not rollout.is_decided for rollout in rollouts if not rollout.completion.is_aborted
            ),
            f"task/{task}/groups_count": Sum(len(own)),
        }
    return metrics


def update_metrics(reports: Sequence[UpdateReport]) -> dict[str, MetricValue]:
    """Return what the optimizer steps did; one that moved no weight is counted and in no mean of loss or gradient."""
    applied = [report for report in reports if report.outcome == "applied"]
    outcomes = [report.outcome for report in reports]
    tokens = [report.tokens for report in reports]
    total = total_stats(tokens)
    metrics: dict[str, MetricValue] = {
        "train/loss": Mean.of(report.loss for report in applied),
        "train/grad_norm": Mean.of(report.grad_norm for report in applied),
        "train/empty_updates_count": Sum(outcomes.count("empty")),
        "train/non_finite_updates_count": Sum(outcomes.count("non_finite")),
        "train/ratio_mask_kept_share": Mean(total.templated_kept_tokens, total.templated_tokens),
        "train/ratio_mask_dropped_advantage_share": Mean(total.dropped_advantage_sum, total.templated_advantage_sum),
        "train/ratio_mask_dropped_shift_share": Mean(total.dropped_gain_sum, total.templated_gain_sum),
        "train/clipped_share": Mean(total.clipped_tokens, total.kept_tokens),
        "train/ratio_mean": Mean(total.ratio_sum, total.live_tokens),
        "train/reference_kl_mean": Mean(total.reference_kl_sum, total.reference_tokens),
        "mismatch/logprob_abs_mean": Mean(total.mismatch_abs_sum, total.mismatch_tokens),
        "mismatch/ratio_mean": Mean(total.mismatch_ratio_sum, total.mismatch_tokens),
        "mismatch/kl_mean": Mean(total.mismatch_kl_sum, total.mismatch_tokens),
        "mismatch/importance_capped_share": Mean(total.capped_tokens, total.weighted_tokens),
    }
    if reports:
        metrics["train/learning_rate"] = Last(reports[-1].learning_rate)
    # No policy is that certain: a sum of exactly zero says that the entropy was not computed.
    if total.entropy_sum:
        metrics["train/entropy_mean"] = Mean(total.entropy_sum, total.live_tokens)
    compared = [each.mismatch_abs_max for each in tokens if each.mismatch_tokens]
    if compared:
        metrics["mismatch/logprob_abs_max"] = Max.of(compared)
    return metrics


def shift_metrics(groups: Sequence[Group], reports: Sequence[UpdateReport]) -> dict[str, MetricValue]:
    """Return what templates still buy, in nats per token (`rl.context_shift`): over all templated rollouts that were
    trained on, in the first tokens of their responses and in the rest, and by template of the current library but for
    those that were written for one problem alone."""
    shifts = shifts_by_rollout(reports)
    by_template: dict[int, list[ContextShift]] = {}
    for group in groups:
        for place, rollout in enumerate(group.rollouts):
            template = rollout.completion.prompt.template
            is_its_own = template.lineage_problem_ids == {group.problem.id}  # there are as many as hard problems
            if (shift := shifts.get((group.problem.id, place))) is not None and not is_its_own:
                by_template.setdefault(template.id, []).append(shift)
    return {
        "template/shift_per_token": _mean_shift(shifts.values()),
        "template/shift_head_per_token": Mean(
            sum(shift.head_sum for shift in shifts.values()), sum(shift.head_tokens for shift in shifts.values())
        ),
        "template/shift_rest_per_token": Mean(
            sum(shift.rest_sum for shift in shifts.values()), sum(shift.rest_tokens for shift in shifts.values())
        ),
        **{
            f"template/{template_id}/shift_per_token": _mean_shift(own)
            for template_id, own in sorted(by_template.items())
        },
    }


def teaching_metrics(groups: Sequence[Group]) -> dict[str, MetricValue]:
    """Return what templates taught plain rollouts (`objective.context: distill`); nothing where none was to teach."""
    teachings = teachings_of(groups)
    if not teachings:
        return {}
    gains = [teaching.gains for teaching in teachings if teaching.gains is not None]
    num_tokens = sum(map(len, gains))
    return {
        "distill/gain_per_token": Mean(sum(float(row.sum(dtype=float)) for row in gains), num_tokens),
        "distill/taught_rollouts_count": Sum(len(gains)),
        "distill/untaught_rollouts_count": Sum(len(teachings) - len(gains)),
        "distill/taught_tokens_count": Sum(num_tokens),
    }


def shifts_by_rollout(reports: Iterable[UpdateReport]) -> dict[RolloutKey, ContextShift]:
    """Return the shift of each rollout of a step that has one."""
    return {key: shift for report in reports for key, shift in report.shifts.items()}


def _mean_shift(shifts: Iterable[ContextShift]) -> Mean:
    own = list(shifts)
    return Mean(
        sum(shift.head_sum + shift.rest_sum for shift in own),
        sum(shift.head_tokens + shift.rest_tokens for shift in own),
    )


def speed_metrics(
    groups: Sequence[Group], reports: Sequence[UpdateReport], seconds: Mapping[str, float]
) -> dict[str, MetricValue]:
    """Return seconds per phase; tokens per second, sampled ones over `rollout`, trained ones over `train`; and the
    arithmetic of training in TFLOP/s per rank, to be held against the device's."""
    metrics = phase_metrics(seconds)
    completions = [rollout.completion for group in groups for rollout in group.rollouts]
    sampled = sum(len(each.token_ids) for each in completions if not isinstance(each.prompt.template, Demonstration))
    trained = sum(report.tokens.loss_tokens for report in reports)
    if seconds.get("rollout"):
        metrics["perf/rollout_tokens_per_s"] = Mean(sampled, seconds["rollout"])
    if seconds.get("train"):
        metrics["perf/train_tokens_per_s"] = Mean(trained, seconds["train"])
        flops = sum(report.flops_per_rank for report in reports)
        metrics["perf/train_tflops_per_rank"] = Mean(flops / 1e12, seconds["train"])
    return metrics


def phase_metrics(seconds: Mapping[str, float]) -> dict[str, MetricValue]:
    """Return `perf/<phase>_s` for each phase."""
    return {f"perf/{phase}_s": Sum(duration) for phase, duration in seconds.items()}


def memory_metrics(peak_bytes: Mapping[str, int]) -> dict[str, MetricValue]:
    """Return `memory/<phase>_peak_bytes` for each phase."""
    return {f"memory/{phase}_peak_bytes": Max(peak) for phase, peak in peak_bytes.items()}


def forgotten_metrics(num_forgotten: int, num_mastered: int) -> dict[str, MetricValue]:
    """Return the share of a step's mastered problems that no plain rollout solved any more."""
    return {"hard/forgotten_share": Mean(num_forgotten, num_mastered)}


def template_effect_metrics(entries: Sequence[LedgerEntry]) -> dict[str, MetricValue]:
    """Return the shares of the problems tried both ways that their templates helped and hurt."""
    helped, hurt, num_compared = helped_and_hurt(entries)
    return {"hard/helped_share": Mean(helped, num_compared), "hard/hurt_share": Mean(hurt, num_compared)}


def ledger_metrics(ledger: HardSampleLedger) -> dict[str, MetricValue]:
    """Return what became of all problems so far."""
    by_template = len(ledger.first_solved_by_template())
    return {
        "hard/first_solved_by_template_share": Mean(by_template, ledger.num_problems),
        "hard/internalised_share": Mean(len(ledger.internalised()), by_template),
    }


def asked_plainly_metrics(groups: Sequence[Group], given: Sequence[Sequence[Template]]) -> dict[str, MetricValue]:
    """Return how many rollouts were asked plainly because their template, `given` to each, made the prompt too long."""
    num_templated = sum(rollout.completion.prompt.is_templated for group in groups for rollout in group.rollouts)
    num_assigned = sum(template.text != "" for templates in given for template in templates)
    return {"rollout/asked_plainly_count": Sum(num_assigned - num_templated)}


def hint_metrics(problems: Sequence[Problem], levels: Sequence[int]) -> dict[str, MetricValue]:
    """Return how many problems of a step were asked through hints and of which level, and how many needed one and have
    none.

    Args:
        levels: that each problem needs; 0: none.
    """
    needed = [(level, len(problem.hints)) for problem, level in zip(problems, levels, strict=True) if level]
    used = [min(level, num_hints) for level, num_hints in needed if num_hints]
    return {
        "hint/problems_count": Sum(len(used)),
        "hint/missing_count": Sum(len(needed) - len(used)),
        "hint/level_mean": Mean.of(used),
    }


def epoch_metrics(hard: Sequence[Problem], is_round_skipped: bool | None) -> dict[str, MetricValue]:
    """Return the state after an epoch: the size of its hard set, and whether it was too small for a round of evolution.

    `is_round_skipped`: None where no round would have followed anyway.
    """
    skipped = {} if is_round_skipped is None else {"evolution/skipped_rounds_count": Sum(is_round_skipped)}
    return {"hard/set_size": Last(len(hard)), **skipped}


def library_metrics(library_version: int, num_templates: int, evolution: Mapping[str, float]) -> dict[str, MetricValue]:
    """Return the metrics of a library that takes effect, and of the evolution round that made it.

    Args:
        evolution: name to number, e.g. pool_size, best_score, coverage, pass_at_n_plain, num_rollouts; empty when no
            round ran. Each becomes `evolution/<name>`, one called `<task>/<name>` becomes `task/<task>/<name>`.
    """
    of_tasks = [(*key.split("/"), number) for key, number in evolution.items() if "/" in key]
    return {
        "library/version": Last(library_version),
        "library/num_templates": Last(num_templates),
        **{f"evolution/{name}": Last(number) for name, number in evolution.items() if "/" not in name},
        **{f"task/{task}/{name}": Last(number) for task, name, number in of_tasks},
    }


def _mean_reward(rollouts: Iterable[Rollout]) -> Mean:
    return Mean.of(rollout.reward for rollout in rollouts if rollout.is_decided)
