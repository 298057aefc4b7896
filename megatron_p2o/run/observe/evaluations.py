"""Evaluations during a run: the policy on the sets of `data.evaluation`, and the best checkpoint."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import assert_never

from megatron_p2o.algorithm import TrainState
from megatron_p2o.config.tree import Config, EvaluationConfig
from megatron_p2o.evaluation.outcome import Evaluation, NothingDecided, evaluation_metrics
from megatron_p2o.evaluation.protocol import evaluate, template_of_set
from megatron_p2o.metrics.compute import ComputeMeter
from megatron_p2o.rl.sampling import SamplingParts
from megatron_p2o.run.beginning import Beginning
from megatron_p2o.run.observe.alarms import warn_of_undecided
from megatron_p2o.run.observe.step_log import StepLog
from megatron_p2o.run.resume.resumption import is_measured_otherwise
from megatron_p2o.run_folder.checkpoints import Best, checkpoint_name, read_best
from megatron_p2o.terminal import Countdown
from megatron_p2o.types import PLAIN, Problem, Template

logger = logging.getLogger(__name__)


class Evaluations:
    """Measures the policy of a run."""

    def __init__(
        self,
        sets: Mapping[str, Sequence[Problem]],
        parts: SamplingParts,
        config: Config,
        log: StepLog,
        compute: ComputeMeter,
    ) -> None:
        """`compute` counts what `parts` sample."""
        self._sets, self._parts, self._config, self._log = sets, parts, config, log
        self._compute = compute
        self._measured: dict[tuple[tuple[str, str], ...] | None, dict[str, Evaluation]] = {}
        """Outcomes at `_step` by task and text of the templates; asked plainly by None."""
        self._step = -1

    def measure(self, state: TrainState, templates: Mapping[str, Template] | None = None) -> dict[str, Evaluation]:
        """Return the outcome on each set, and write it down; a set without a verdict has none.

        What a step has measured already is not measured again: the last step's evaluation is also that of the end.

        `templates`: of each task; each set is asked through that of its task, and one without is left out. None: all
        sets are asked plainly.
        """
        if state.step != self._step:
            self._step, self._measured = state.step, {}
        key = None if templates is None else tuple(sorted((task, each.text) for task, each in templates.items()))
        if key not in self._measured:
            self._measured[key] = self._outcome(state, templates)
        return self._measured[key]

    def _outcome(self, state: TrainState, templates: Mapping[str, Template] | None) -> dict[str, Evaluation]:
        prefix = "" if templates is None else "templated_"
        outcome: dict[str, Evaluation] = {}
        for name, problems in self._sets.items():
            template = PLAIN if templates is None else template_of_set(name, templates, self._config.data)
            if templates is not None and template is PLAIN:
                continue
            try:
                note = self._countdown(prefix + name)
                with self._compute.evaluating():
                    outcome[name] = evaluate(name, problems, self._parts, self._config, template, note)
            except NothingDecided as error:
                logger.warning("evaluation of %s at step %d: %s: it has no result", prefix + name, state.step, error)
        self._log.take_phases()  # they are not of a step
        metrics = evaluation_metrics({prefix + name: each for name, each in outcome.items()})
        self._log.write(state, metrics)
        warn_of_undecided(state.step, metrics, self._config.alarms.undecided)
        return outcome

    def _countdown(self, name: str) -> Callable[[int, int], None]:
        """Announce the evaluation of a set, and return what tells how far it is."""
        activity = f"evaluation of {name}"
        self._log.announce(activity)
        countdowns: list[Countdown] = []

        def note(num_done: int, total: int) -> None:
            if not countdowns:
                countdowns.append(Countdown(activity, total, self._log.announce))
            countdowns[0].note(num_done)

        return note


class BestSoFar:
    """Knows which checkpoint has done best on `evaluation.best_set`."""

    def __init__(self, settings: EvaluationConfig, best: Best | None) -> None:
        """`best`: of the run until now."""
        self._settings, self._best = settings, best

    def take(self, step: int, outcome: Mapping[str, Evaluation]) -> Best | None:
        """Return, and note, what makes the checkpoint of this step the best so far; None when it is not."""
        settings = self._settings
        if settings.best_set is None or step == 0:
            return None
        score = _score(outcome.get(settings.best_set), settings)
        if score is None or (self._best is not None and score <= self._best.score):
            return None
        self._best = Best(
            checkpoint=checkpoint_name(step),
            step=step,
            set=settings.best_set,
            metric=settings.best_metric,
            score=score,
        )
        return self._best


def best_before(run_dir: Path, settings: EvaluationConfig, beginning: Beginning) -> Best | None:
    """Return the best checkpoint before the one a run goes on from; None when another measure found it."""
    if beginning.resumed is None or is_measured_otherwise(beginning.changes, settings.best_set):
        return None
    best = read_best(run_dir)
    if best is None or best.step > beginning.resumed.step:
        return None
    return best if (best.set, best.metric) == (settings.best_set, settings.best_metric) else None


def _score(outcome: Evaluation | None, settings: EvaluationConfig) -> float | None:
    """Return what decides which checkpoint is the best; None where too few responses have a verdict."""
    if outcome is None:
        return None
    match settings.best_metric:
        case "avg":
            return outcome.accuracy
        case "pass_at_k":
            return outcome.pass_at.get(str(outcome.samples_per_problem))
        case _:
            assert_never(settings.best_metric)
