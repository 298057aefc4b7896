"""Rank 0 of a training run: start or resume, build the parts, train, close."""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

from megatron_p2o.algorithm import train
from megatron_p2o.config.tree import Config
from megatron_p2o.interfaces import PolicyDiverged, PromptEvolution
from megatron_p2o.machine.preflight import Pace
from megatron_p2o.policy.training.ranks import MegatronPolicy
from megatron_p2o.rl.hard_samples import HardSampleLedger
from megatron_p2o.rollout.engines import SglangEngines
from megatron_p2o.run.before.pace import pace_of
from megatron_p2o.run.beginning import Beginning, beginning_of
from megatron_p2o.run.inputs import Inputs, batches_of, notices, planned_steps
from megatron_p2o.run.observe.alarms import NothingLearnt, StepGivenUp
from megatron_p2o.run.observe.compute import spent_before, spent_since_checkpoint
from megatron_p2o.run.observe.files import open_files
from megatron_p2o.run.observe.observer import RunObserver
from megatron_p2o.run.parts import RunParts, StartEngines, start_parts
from megatron_p2o.run_folder.checkpoints import LATEST_FILE, POLICY_FOLDER, checkpoint_name
from megatron_p2o.run_folder.made_with import note_start
from megatron_p2o.run_folder.results import finished_line, outcome_lines
from megatron_p2o.run_folder.state import StopRequest
from megatron_p2o.terminal import duration_text, say
from megatron_p2o.types import Problem

logger = logging.getLogger(__name__)

BatchesOf = Callable[[int], Sequence[Sequence[Problem]]]
"""The problems of each step of an epoch; the same whenever asked."""


def conduct(config: Config, run_dir: Path, policy: MegatronPolicy, inputs: Inputs, start_engines: StartEngines) -> None:
    """Train to the end of the schedule or to a stop request, and save. Closes what it has started, however it ends.

    Raises:
        CheckpointError, ResumeRefused: the run cannot go on from its checkpoint; nothing was started.
        PolicyDiverged, NothingLearnt, StepGivenUp: training cannot go on; the message says what to go back to.
    """
    beginning = beginning_of(config, run_dir, inputs.train)
    num_steps_per_epoch = len(batches_of(config, inputs.train, epoch=0))
    say_what_starts(config, run_dir, policy, num_steps_per_epoch)
    stop = StopRequest(run_dir)
    with ExitStack() as stack:
        spent = spent_before(beginning)
        started = start_parts(config, run_dir, policy, inputs.renderer, start_engines, stop.is_made, stack, spent)
        num_steps = planned_steps(config.schedule, num_steps_per_epoch)
        policy.plan_updates(num_steps * config.schedule.updates_per_step)
        begin_weights(policy, started.engines, beginning)
        redone = spent_since_checkpoint(run_dir, beginning)  # before the files forget it
        say(begins_line(beginning, num_steps, pace_of(run_dir)))
        files = open_files(config, run_dir, policy, beginning, num_steps, stack)
        changes = [asdict(each) for each in beginning.changes]
        note_start(run_dir, beginning.made_with, beginning.state.step, changes, redone)
        observer = RunObserver(config, started, files, inputs.evaluation, beginning, stop)
        epoch_of = partial(asked_in, config, inputs.train, observer.ledger)
        ending = train_and_save(config, beginning, epoch_of, started, observer, stop)
    say(ending)


def asked_in(
    config: Config, train: Sequence[Problem], ledger: HardSampleLedger, epoch: int
) -> Sequence[Sequence[Problem]]:
    """Return the problems of each step of an epoch, and say how many there are where a curriculum decides it."""
    batches = batches_of(config, train, epoch, ledger)
    if config.data.curriculum != "none":
        num_asked = sum(map(len, batches))
        say(f"epoch {epoch + 1}: {num_asked} problems in {len(batches)} batches, by data.curriculum")
    return batches


def say_what_starts(config: Config, run_dir: Path, policy: MegatronPolicy, num_steps_per_epoch: int) -> None:
    """Tell the person watching how the policy was built, and what comes next."""
    for notice in notices(config, num_steps_per_epoch):
        logger.warning(notice)
    say(f"layers: {policy.layers.layers_reason}; attention: {policy.layers.attention_reason}")
    say(f"policy loaded; starting {config.rollout.num_engines} engine(s), logs in {run_dir}/engines")


def begins_line(beginning: Beginning, num_steps: int, pace: Pace | None) -> str:
    """Return where the run begins, which engines and weights are ready for. `pace`: of its steps before."""
    state = beginning.state
    if beginning.checkpoint is None:
        return f"engines ready: a fresh run of {num_steps} steps"
    left = ""
    if pace is not None and state.step < num_steps:
        left = f"; about {duration_text((num_steps - state.step) * pace.step_s)} left by its last steps"
    return f"engines ready: goes on after step {state.step} of {num_steps}, from {beginning.checkpoint}{left}"


def begin_weights(policy: MegatronPolicy, engines: SglangEngines, beginning: Beginning) -> None:
    """Have trainer and engines hold the weights the run begins with.

    Also of a fresh run: from the first rollout on, what the engines serve has been compared with the trainer. Raises
    `PolicyDiverged`, which says how to go back, when a checkpoint's weights are not finite.
    """
    engines.release_memory()  # what the trainer has lent, it takes back to load and to hand over
    if beginning.checkpoint is not None:
        load_finite(policy, beginning.checkpoint)
    engines.refresh(policy.weights(), version=beginning.state.step)


def load_finite(policy: MegatronPolicy, checkpoint: Path) -> None:
    """Load a checkpoint's policy. Raises `PolicyDiverged`, which says how to go back, when it is not finite."""
    policy.load(checkpoint / POLICY_FOLDER)
    try:
        policy.check_finite()
    except PolicyDiverged as error:
        raise PolicyDiverged(
            f"{checkpoint}: {error}; write the name of an earlier checkpoint into {checkpoint.parent / LATEST_FILE}"
        ) from error


def begin_unfinished_round(beginning: Beginning, evolution: PromptEvolution | None) -> None:
    """Go on with the round that ran beside training when the checkpoint was written; its journal knows how far."""
    resumed = beginning.resumed
    if resumed is not None and evolution is not None and resumed.round_problem_ids:
        evolution.evolve(beginning.round_problems, beginning.state.library, resumed.round_epoch)


def train_and_save(
    config: Config,
    beginning: Beginning,
    epoch_of: BatchesOf,
    started: RunParts,
    observer: RunObserver,
    stop: StopRequest,
) -> str:
    """Train from where the run begins, save where it ends, and return what to say of that. Raises as `conduct`."""
    if beginning.resumed is None:
        observer.on_start(beginning.state)
    begin_unfinished_round(beginning, started.parts.evolution)
    try:
        state = train(epoch_of, beginning.state, observer.ledger, started.parts, observer, config)
    except PolicyDiverged as error:  # by a step whose gradient was finite, at the weights of the newest checkpoint
        raise PolicyDiverged(f"{error}; {observer.way_back(is_newest_good=True)}") from error
    except (NothingLearnt, StepGivenUp) as error:
        way = observer.way_back(is_newest_good=False)
        raise type(error)(f"{error}; if the policy has diverged: {way}") from error
    if stop.is_made():
        observer.on_stop(state)
        stop.clear()
        return f"stopped after step {state.step}, all is saved in {config.run.folder}: the same command goes on"
    observer.on_end(state)
    checkpoint = config.run.folder / "checkpoints" / checkpoint_name(state.step)
    weights = (
        f"weights: {checkpoint}; as a Hugging Face folder: python tools/convert_checkpoint.py to-hf {checkpoint} "
        f"--out models/{config.run.name}"
    )
    return "\n".join([*outcome_lines(config.run.folder), weights, finished_line(config.run.folder, state.step)])
