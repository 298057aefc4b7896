"""Builds the parts of a run: starts engines, grader and evolution, and closes them."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from megatron_p2o.algorithm import Parts
from megatron_p2o.config.tree import Config
from megatron_p2o.data.chat import ChatRenderer
from megatron_p2o.evolve.process.beside import BesideTraining
from megatron_p2o.evolve.process.given import GivenTemplates
from megatron_p2o.evolve.process.plain_rollouts import PlainRollouts
from megatron_p2o.evolve.process.session import EvolutionSession
from megatron_p2o.interfaces import PromptEvolution
from megatron_p2o.machine.layout import num_gpus_of
from megatron_p2o.metrics.clock import PhaseClock, TimedEngines, TimedEvolution, TimedGrader, TimedPolicy
from megatron_p2o.metrics.compute import ComputeAccount, ComputeMeter
from megatron_p2o.metrics.memory import peak_meter
from megatron_p2o.policy.training.ranks import MegatronPolicy
from megatron_p2o.rewards.tasks import TaskGrader
from megatron_p2o.rollout.engines import SglangEngines
from megatron_p2o.run.observe.processes import ProcessMeter
from megatron_p2o.run.trials import EvolutionLink, TrialSubmitter
from megatron_p2o.types import Completion, Prompt, SamplingParams, TokenIds

StartEngines = Callable[[Sequence[int]], SglangEngines]
"""Starts the engines, given the tokens that end a response."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunParts:
    """What was started for a run, and what measures it."""

    parts: Parts
    """For the algorithm; what they take is counted by `clock` and `compute`."""
    engines: SglangEngines
    clock: PhaseClock
    compute: ComputeMeter
    processes: ProcessMeter
    evolution: EvolutionLink


def start_parts(
    config: Config,
    run_dir: Path,
    policy: MegatronPolicy,
    renderer: ChatRenderer,
    start_engines: StartEngines,
    is_stopping: Callable[[], bool],
    stack: ExitStack,
    spent: ComputeAccount,
) -> RunParts:
    """Start the grader, the engines and evolution; `stack` closes them, also when a later one does not start.

    Args:
        is_stopping: whether the run is to stop; a round of evolution then ends.
        spent: what the checkpoint counts that the run goes on from.

    Raises what cannot be started.
    """
    grader = TaskGrader(config)
    stack.callback(grader.close)
    grader.check()
    engines = stack.enter_context(start_engines(renderer.eos_token_ids))
    compute = ComputeMeter(
        spent,
        engine_s=lambda: engines.busy_s,
        num_ranks=config.parallel.world_size,
        num_gpus=num_gpus_of(config),
    )
    session = None
    if config.evolution.searches:
        submit = TrialSubmitter(
            _sampler(engines),
            renderer,
            grader,
            config.evolution.max_template_tokens,
            config.hard.solved_at,
            compute.count_lost_trial,
            _scorer(engines, compute) if config.assignment.weight == "transfer" else None,
        )
        session = start_session(config, run_dir, submit, engines, renderer.control_tokens, is_stopping)
        stack.callback(session.close)
    clock = PhaseClock(peak_meter())
    evolution = evolution_of(session, config)
    return RunParts(
        parts=Parts(
            policy=TimedPolicy(policy, clock, compute),
            engines=TimedEngines(engines, clock, compute),
            grader=TimedGrader(grader, clock),
            renderer=renderer,
            solved_at=config.hard.solved_at,
            evolution=TimedEvolution(evolution, clock) if evolution else None,
        ),
        engines=engines,
        clock=clock,
        compute=compute,
        processes=ProcessMeter(policy, engines, grader, session),
        evolution=EvolutionLink(session, renderer.decode),
    )


def start_session(
    config: Config,
    run_dir: Path,
    submit_trial: TrialSubmitter,
    engines: SglangEngines,
    control_tokens: Sequence[str],
    is_stopping: Callable[[], bool],
) -> EvolutionSession:
    """Return rank 0's side of evolution, with a server of the initial policy where that is what reflects."""
    url = key = model = None
    if config.evolution.reflection.backend == "self":
        url, key = engines.start_reflection_server()
        model = config.model.path
    return EvolutionSession(
        config,
        run_dir,
        submit_trial,
        reflection_url=url,
        reflection_model=model,
        reflection_api_key=key,
        control_tokens=control_tokens,
        is_stopping=is_stopping,
    )


def evolution_of(session: EvolutionSession | None, config: Config) -> PromptEvolution | None:
    """Return evolution as the algorithm sees it: waited for, beside training, or what takes its place; None is plain
    GRPO."""
    if config.evolution.enabled and config.evolution.plain_rollouts is not None:
        return PlainRollouts(config.evolution.plain_rollouts, config.rollout.group_size)
    if config.evolution.enabled and config.evolution.templates_file is not None:
        return GivenTemplates(config, Path(config.evolution.templates_file))
    return BesideTraining(session) if session is not None and config.evolution.beside_training else session


def _scorer(engines: SglangEngines, compute: ComputeMeter) -> Callable[[Prompt, TokenIds], "Future[Completion]"]:
    """Return what has the engines read a response for evolution, and counts the tokens that they read."""

    def score(prompt: Prompt, response: TokenIds) -> "Future[Completion]":
        compute.count_read(len(prompt.sampling_ids) + len(response))
        return engines.submit_score(prompt, response, priority="evolution")

    return score


def _sampler(engines: SglangEngines) -> Callable[[Prompt, SamplingParams], "Future[Completion]"]:
    """Return what samples one rollout for evolution, on what the engines have to spare."""
    return lambda prompt, sampling: engines.broker.submit(prompt, sampling, priority="evolution")
