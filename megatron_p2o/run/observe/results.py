"""Writes results.json, the outcome of a run."""

from collections.abc import Mapping

from megatron_p2o.algorithm import TrainState
from megatron_p2o.config.tree import Config
from megatron_p2o.evaluation.outcome import Evaluation, evaluation_record, problems_record
from megatron_p2o.evolve.search.publish import rounds_path
from megatron_p2o.metrics.compute import ComputeAccount
from megatron_p2o.metrics.jsonl import read_lines
from megatron_p2o.records import to_json
from megatron_p2o.run.observe.files import RunFiles
from megatron_p2o.run.observe.progress import Progress
from megatron_p2o.run_folder.made_with import redone_in
from megatron_p2o.run_folder.results import limit_reached, write_results_file
from megatron_p2o.types import PLAIN


def write_run_results(
    files: RunFiles,
    config: Config,
    progress: Progress,
    spent: ComputeAccount,
    state: TrainState,
    plain: Mapping[str, Evaluation],
    templated: Mapping[str, Evaluation],
) -> None:
    """Write the results of a run that has ended at `state`. Raises `OSError`.

    `spent`: on the steps that led to the policy. `plain`, `templated`: the last evaluation, and the one under the best
    template; empty without one.
    """
    results = {
        "arm": config.run.arm,
        "seed": config.run.seed,
        "num_steps": state.step,
        "ended_by": limit_reached(config.schedule, state.step, spent) or f"schedule.epochs={config.schedule.epochs}",
        "evaluation": {name: evaluation_record(outcome) for name, outcome in plain.items()},
        "templated_evaluation": {name: evaluation_record(outcome) for name, outcome in templated.items()},
        "evaluation_problems": {
            name: {"samples_per_problem": outcome.samples_per_problem, **problems_record(outcome)}
            for name, outcome in plain.items()
        },
        "templated_accuracy_when_published": progress.published_accuracy,
        "best_template": progress.best_templates.get("", PLAIN).text,
        **_best_by_task(progress),
        "first_round": dict(progress.first_round),
        "rounds": list(read_lines(rounds_path(files.run_dir))),
        "pass_at_n_plain": progress.first_round.get("pass_at_n_plain"),
        "num_internalised": len(files.ledger.ledger.internalised()),
        "num_rollouts_train": progress.num_rollouts_train,
        "num_rollouts_evolution": progress.num_rollouts_evolution,
        "wall_s": spent.wall_s,
        "compute": {**to_json(spent), "learning_tokens": spent.learning_tokens},
        "compute_redone": to_json(redone_in(files.run_dir)),
    }
    write_results_file(files.run_dir, results)


def _best_by_task(progress: Progress) -> dict[str, dict[str, str]]:
    texts = {task: template.text for task, template in progress.best_templates.items() if task}
    return {"best_templates": texts} if texts else {}
