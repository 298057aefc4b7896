"""One rank of a run: build the parts, resume, train, close. Started by torchrun as `-m megatron_p2o.run.train CONFIG`.

The only place where implementations meet. Rank 0 conducts; the others serve its policy's calls until it is done.
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import FrameType

from megatron_p2o.algorithm import Parts, TrainState, train
from megatron_p2o.config.read import load_config, with_template_date
from megatron_p2o.config.tree import Config
from megatron_p2o.data.batches import epoch_batches
from megatron_p2o.data.chat import chat_renderer
from megatron_p2o.evaluation.benchmark import (
    answer,
    checkpoint_subject,
    discard_answers,
    open_benchmarks,
    write_results,
)
from megatron_p2o.evolve.process.beside import BesideTraining
from megatron_p2o.evolve.process.session import EvolutionSession
from megatron_p2o.evolve.record.library import EMPTY_LIBRARY, PublishedLibrary, library_path
from megatron_p2o.interfaces import PolicyDiverged, PromptEvolution, TemplateLibrary
from megatron_p2o.machine.layout import gpus_here, layout_line, with_layout
from megatron_p2o.machine.memory_plan import planned_memory, with_planned_cache
from megatron_p2o.machine.nodes import nodes_of_slurm
from megatron_p2o.metrics.clock import PhaseClock, TimedEngines, TimedEvolution, TimedGrader, TimedPolicy
from megatron_p2o.metrics.log import open_metrics_log
from megatron_p2o.metrics.memory import ProcessMemory, peak_meter
from megatron_p2o.metrics.rollouts import RolloutWriter
from megatron_p2o.policy.model.layer_choice import machine_capabilities
from megatron_p2o.policy.training.ranks import MegatronPolicy, build_policy
from megatron_p2o.policy.training.settings import (
    check_values,
    check_weights,
    machine_problems,
    megatron_summary,
    policy_settings,
)
from megatron_p2o.processes import end_with_parent, host_memory_of
from megatron_p2o.rewards.registry import make_grader
from megatron_p2o.rl.sampling import SamplingParts
from megatron_p2o.rollout.engines import SglangEngines
from megatron_p2o.rollout.refresh.outlet import open_outlet
from megatron_p2o.rollout.servers.remote import meet_daemons
from megatron_p2o.rollout.servers.server import EngineStartFailed
from megatron_p2o.rollout.servers.server_arguments import check_arguments
from megatron_p2o.rollout.start import start_engines
from megatron_p2o.run.alarms import NothingLearnt, StepGivenUp
from megatron_p2o.run.inputs import Inputs, evolution_notice, load_inputs, summary_of
from megatron_p2o.run.observer import RunFiles, RunObserver
from megatron_p2o.run.rank_errors import report_error
from megatron_p2o.run.resume import Change, check_resume, is_measured_otherwise, of_ids, resumed_library, resumption
from megatron_p2o.run.trials import TrialSubmitter, free_scores, round_statistics
from megatron_p2o.run_folder.checkpoints import LATEST_FILE, POLICY_FOLDER, CheckpointSaver, checked, latest_checkpoint
from megatron_p2o.run_folder.made_with import made_with, note_start, read_made_with
from megatron_p2o.run_folder.state import STATE_FILE, LedgerFile, RunState, StopRequest, read_state
from megatron_p2o.terminal import say, set_up_logging
from megatron_p2o.types import Completion, Group, Problem, Prompt, SamplingParams

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run this rank and return its exit status."""
    parser = argparse.ArgumentParser(prog="megatron_p2o.run.train")
    parser.add_argument("config", type=Path, help="resolved settings: runs/<name>/config.yaml")
    parser.add_argument("--evaluate", type=Path, metavar="CHECKPOINT", help="measure this checkpoint, train nothing")
    parser.add_argument("--restart", action="store_true", help="throw earlier answers of the evaluation away")
    parser.add_argument("--parent", type=int, metavar="PID", default=os.getppid(), help="ends with this process")
    options = parser.parse_args(arguments)
    end_with_parent(options.parent)
    signal.signal(signal.SIGTERM, _exit_on_signal)
    set_up_logging()
    logging.getLogger("megatron_p2o.evolve.process.session").setLevel(logging.INFO)  # one line a round
    run_dir = options.config.parent
    sys.excepthook = partial(report_error, run_dir)
    config = load_config(options.config)
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    config = with_planned_cache(replace(config, parallel=config.parallel.for_processes(num_processes)))
    # Before the weights, which take minutes: whatever is wrong with the problems is said in the first seconds.
    inputs = load_inputs(config) if os.environ.get("RANK", "0") == "0" and not options.evaluate else None
    policy = build_policy(config)
    daemons = meet_daemons(config, options.config)
    outlet = open_outlet(config, policy.largest_weight_bytes, policy.meeting)
    if outlet is not None:
        policy.deliver_to(outlet.take)
    policy.wait_for_ranks()
    start = partial(start_engines, config, run_dir, daemons=daemons, outlet=outlet)
    if not policy.is_conductor:
        policy.serve()
        return 0
    with ExitStack() as stack:
        stack.callback(policy.close)
        if options.evaluate:
            if options.restart:
                discard_answers(run_dir)
            evaluate_checkpoint(config, run_dir, policy, options.evaluate, start, stack)
        else:
            assert inputs is not None, "the conductor is rank 0"
            Conductor(config, run_dir, policy, inputs, latest_checkpoint(run_dir), start, stack).train()
    return 0


def evaluate_checkpoint(
    config: Config,
    output: Path,
    policy: MegatronPolicy,
    checkpoint: Path,
    start: Callable[[Sequence[int]], SglangEngines],
    stack: ExitStack,
) -> None:
    """Evaluate a checkpoint of a run plainly on every set of `data.evaluation`; see `benchmark`.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ValueError: a problem file or earlier answers in `output` are not usable.
    """
    checked(checkpoint)
    step = read_state(checkpoint / STATE_FILE).step
    subject = checkpoint_subject(checkpoint, step)
    renderer = chat_renderer(config)
    benchmarks = open_benchmarks(subject, renderer, config, output, stack)
    if any(benchmark.missing for benchmark in benchmarks):
        grader = make_grader(config.grading)
        stack.callback(grader.close)
        grader.check()
        engines = stack.enter_context(start(renderer.eos_token_ids))
        policy.load(checkpoint / POLICY_FOLDER)
        engines.refresh(policy.weights(), version=step)
        answer(benchmarks, SamplingParts(engines=engines, grader=grader, renderer=renderer), config)
    write_results(benchmarks, subject, config, output)


def dry_run(config: Config) -> None:
    """Read everything a run would read and print what was found. Starts nothing.

    Raises:
        ValueError: a file, a row, a prompt or a setting of policy or engines is bad; the message names it.
    """
    given, nodes, problems = config.parallel, nodes_of_slurm(os.environ), list[str]()
    num_nodes = nodes.count if nodes else 1
    try:
        config = with_layout(config, num_nodes)
        say(layout_line(given, config.parallel, num_nodes, gpus_here()))
    except ValueError as error:
        problems.append(str(error))
    settings = policy_settings(config)
    check_weights(config, settings)
    check_values(config)
    for line in summary_of(config, load_inputs(config)):
        say(line)
    say(f"megatron: {megatron_summary(config)}")
    dated = with_template_date(config, config.run.folder / "config.yaml")
    resumed = check_resume(dated, config.run.folder)
    for change in resumed.changes if resumed else ():
        say(f"changed since the checkpoint: {change}")
    problems += machine_problems(config, settings, machine_capabilities())
    try:
        check_arguments(config)
    except EngineStartFailed as error:
        problems.append(str(error))
    try:
        for line in planned_memory(config):
            say(line)
    except ValueError as error:
        problems.append(str(error))
    for problem in problems:
        say(f"not on this machine: {problem}")


def load_finite(policy: MegatronPolicy, checkpoint: Path) -> None:
    """Load a checkpoint's policy. Raises `PolicyDiverged`, which says how to go back, when it is not finite."""
    policy.load(checkpoint / POLICY_FOLDER)
    try:
        policy.check_finite()
    except PolicyDiverged as error:
        raise PolicyDiverged(
            f"{checkpoint}: {error}; write the name of an earlier checkpoint into {checkpoint.parent / LATEST_FILE}"
        ) from error


class Conductor:
    """Rank 0 of a run: owns the engines, the grader and evolution through the exit stack it is given."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        policy: MegatronPolicy,
        inputs: Inputs,
        checkpoint: Path | None,
        start: Callable[[Sequence[int]], SglangEngines],
        stack: ExitStack,
    ) -> None:
        self.config, self.run_dir, self.policy = config, run_dir, policy
        self.inputs = inputs
        self.stop = StopRequest(run_dir)
        self.checkpoint = checkpoint
        self.resumed = read_state(checkpoint / STATE_FILE) if checkpoint else None
        self.made_with = made_with(config, self.inputs.train)
        self.made_before = read_made_with(checkpoint) if checkpoint else None
        self.changes: Sequence[Change] = ()
        self.state = self._initial_state()
        notice = evolution_notice(config, len(self.batches_of(0)))
        if notice is not None:
            logger.warning(notice)
        say(f"layers: {policy.layers.layers_reason}; attention: {policy.layers.attention_reason}")
        say(f"policy loaded; starting {config.rollout.num_engines} engine(s), logs in {run_dir}/engines")
        self.grader = make_grader(config.grading)
        stack.callback(self.grader.close)
        self.grader.check()
        self.engines = stack.enter_context(start(self.inputs.renderer.eos_token_ids))
        self.evolution = self._start_evolution(stack) if config.evolution.enabled else None
        evolution: PromptEvolution | None = self.evolution
        if self.evolution and config.evolution.beside_training:
            evolution = BesideTraining(self.evolution)
        self.clock = PhaseClock(peak_meter())
        self.memory = ProcessMemory()
        self.parts = Parts(
            policy=TimedPolicy(policy, self.clock),
            engines=TimedEngines(self.engines, self.clock),
            grader=TimedGrader(self.grader, self.clock),
            renderer=self.inputs.renderer,
            evolution=TimedEvolution(evolution, self.clock) if evolution else None,
        )
        if checkpoint:
            load_finite(policy, checkpoint)
        # Also a fresh run: from the first rollout on, what the engines serve has been compared with the trainer.
        self.engines.refresh(policy.weights(), version=self.state.step)
        self._stack = stack

    def train(self) -> None:
        """Train to the end of the schedule or to a stop request, and save."""
        config, state = self.config, self.state
        stop = self.stop
        observer = self._observer(stop)
        note_start(self.run_dir, self.made_with, state.step, [asdict(change) for change in self.changes])
        observer.on_start(state)
        self._begin_unfinished_round()
        try:
            state = train(self.batches_of, state, observer.ledger, self.parts, observer, config)
        except PolicyDiverged as error:  # by a step whose gradient was finite, at the weights of the newest checkpoint
            raise PolicyDiverged(f"{error}; {observer.way_back(is_newest_good=True)}") from error
        except (NothingLearnt, StepGivenUp) as error:
            way = observer.way_back(is_newest_good=False)
            raise type(error)(f"{error}; if the policy has diverged: {way}") from error
        if stop.is_made():
            observer.save_last(state)
            stop.clear()
            return
        observer.on_end(state)

    def batches_of(self, epoch: int) -> Sequence[Sequence[Problem]]:
        """Return the problems of each step of an epoch; the same whenever asked."""
        return epoch_batches(self.inputs.train, self.config.schedule.problems_per_step, self.config.run.seed, epoch)

    def _observer(self, stop: StopRequest) -> RunObserver:
        num_steps = len(self.batches_of(0)) * self.config.schedule.epochs
        metrics = open_metrics_log(
            self.run_dir,
            self.config.run.name,
            self.config.logging,
            num_steps=min(num_steps, self.config.schedule.max_steps or num_steps),
            num_kept=self.resumed.num_metrics_lines if self.resumed else 0,
        )
        ledger = LedgerFile(self.run_dir / "hard_samples.jsonl", self.resumed.num_ledger_entries if self.resumed else 0)
        self._stack.callback(ledger.close)
        files = RunFiles(
            run_dir=self.run_dir,
            ledger=ledger,
            metrics=self._stack.enter_context(metrics),
            checkpoints=CheckpointSaver(
                self.run_dir, self.policy, self.config.schedule.keep_checkpoints, self.checkpoint, self.made_with
            ),
            rollouts=RolloutWriter(self.run_dir / "rollouts", self.resumed.step if self.resumed else -1),
        )
        return RunObserver(
            config=self.config,
            parts=self.parts,
            files=files,
            clock=self.clock,
            stop=stop,
            evaluation_sets=self.inputs.evaluation,
            observe_groups=self._observe_groups,
            keep_library=self._keep_library,
            take_round_statistics=self._take_round_statistics,
            process_metrics=self._process_metrics,
            resumed=self.resumed,
            is_measured_otherwise=is_measured_otherwise(self.changes, self.config.evaluation.best_set),
        )

    def _process_metrics(self, phase_peak_bytes: Mapping[str, int]) -> Mapping[str, float]:
        """Return what the engines did and what the run's processes hold; `phase_peak_bytes`: of this one."""
        others = {"graders": host_memory_of(self.grader.worker_pids)}
        if self.evolution is not None and self.evolution.service_process_id is not None:
            others["evolution"] = host_memory_of([self.evolution.service_process_id])
        ranks, engines = self.policy.memory(), self.engines.host_memory()
        return {**self.engines.metrics(), **self.memory.metrics(ranks, engines, others, phase_peak_bytes)}

    def _initial_state(self) -> TrainState:
        resumed = self.resumed
        if resumed is None:
            return TrainState(library=EMPTY_LIBRARY)
        assert self.checkpoint is not None, "it was resumed from there"
        return TrainState(
            library=resumed_library(self.run_dir, resumed.library_version, self.config.rollout.group_size),
            step=resumed.step,
            epoch=resumed.epoch,
            batch=self._batch(resumed, self.checkpoint),
            hard=tuple(self._problems(resumed.hard_problem_ids)),
        )

    def _batch(self, resumed: RunState, checkpoint: Path) -> int:
        """Return the data cursor. Says what has changed since the checkpoint, or raises `ResumeRefused`."""
        if self.made_before is None:
            say(f"{checkpoint} does not say what it was made with: settings, data and model count as they are now")
            return resumed.batch
        how = resumption(self.made_before, self.made_with, resumed, checkpoint)
        self.changes = how.changes
        for change in how.changes:
            say(f"changed since {checkpoint.name}: {change}")
        return how.batch

    def _problems(self, ids: Sequence[str]) -> Sequence[Problem]:
        """Return the problems of a list in the checkpoint."""
        assert self.checkpoint is not None, "it was resumed from there"
        return of_ids(ids, self.inputs.train, self.made_before, self.checkpoint)

    def _begin_unfinished_round(self) -> None:
        """Go on with the round that ran beside training when the checkpoint was written; its journal knows how far."""
        resumed, evolution = self.resumed, self.parts.evolution
        if resumed and evolution and resumed.round_problem_ids:
            hard = self._problems(resumed.round_problem_ids)
            evolution.evolve(hard, self.state.library, resumed.round_epoch)

    def _start_evolution(self, stack: ExitStack) -> EvolutionSession:
        def sample(prompt: Prompt, sampling: SamplingParams) -> Future[Completion]:
            return self.engines.broker.submit(prompt, sampling, priority="evolution")

        submit_trial = TrialSubmitter(
            sample, self.inputs.renderer, self.grader, self.config.evolution.max_template_tokens
        )
        url = key = model = None
        if self.config.evolution.reflection.backend == "self":
            url, key = self.engines.start_reflection_server()
            model = self.config.model.path
        session = EvolutionSession(
            self.config,
            self.run_dir,
            submit_trial,
            reflection_url=url,
            reflection_model=model,
            reflection_api_key=key,
            is_stopping=self.stop.is_made,
        )
        stack.callback(session.close)
        return session

    def _observe_groups(self, groups: Sequence[Group]) -> None:
        if self.evolution is not None:
            for score in free_scores(groups, self.inputs.renderer.decode):
                self.evolution.observe(score)

    def _keep_library(self, library: TemplateLibrary) -> None:
        """Write a library that no round has published: a cleared one, which a checkpoint refers to all the same."""
        if isinstance(library, PublishedLibrary) and not library_path(self.run_dir, library.version).exists():
            library.save(self.run_dir)

    def _take_round_statistics(self) -> Mapping[str, float]:
        if self.evolution is None:
            return {}
        last_round, self.evolution.last_round = self.evolution.last_round, None
        return round_statistics(last_round)


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    # An exception unwinds the exit stack, which ends the engines, the graders and the evolution service.
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
