"""What a run will take: some of its steps simulated without, with and beside a round of evolution."""

import asyncio
import tempfile
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_p2o.config.tree import Config
from megatron_p2o.evolve.search.publish import RoundStats
from megatron_p2o.simulation.batch import EngineCoefficients
from megatron_p2o.simulation.cluster import SimulatedCluster, StepCost, TrainerCost, lognormal_lengths
from megatron_p2o.simulation.evolution import SimulatedReflector, SimulatedRunner, round_of, run_round
from megatron_p2o.simulation.hardware import Workload
from megatron_p2o.simulation.virtual_time import VirtualTimeLoop, simulate

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedRun:
    """What is simulated."""

    config: Config
    coefficients: EngineCoefficients
    cache_tokens: int
    """KV cache of an engine."""
    trainer: TrainerCost
    workload: Workload
    num_problems: int
    """Problems that an epoch asks."""

    @property
    def steps_per_epoch(self) -> int:
        return self.num_problems // self.config.schedule.problems_per_step

    @property
    def num_hard(self) -> int:
        return max(2, round(self.workload.hard_share * self.num_problems))


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundAlone:
    """A round that training waits for."""

    round_s: float
    num_tokens: int
    num_trials: int

    @property
    def tokens_per_s(self) -> float:
        """What evolution samples when it has the engines to itself."""
        return self.num_tokens / self.round_s


@dataclass(frozen=True, kw_only=True, slots=True)
class StepsBeside:
    """Steps with a round beside them, from its begin on."""

    steps: tuple[StepCost, ...]
    num_trials: int
    """Trials of the round that ended within these steps."""
    is_round_over: bool

    @property
    def num_tokens(self) -> int:
        """Sampled by evolution."""
        return sum(step.num_evolution_tokens for step in self.steps)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunCost:
    """What was found."""

    off: tuple[StepCost, ...]
    """Steps without evolution."""
    alone: RoundAlone | None
    """None without evolution, like `beside`."""
    beside: StepsBeside | None

    @property
    def extra_s(self) -> float:
        """Seconds that evolution adds to the steps it runs beside."""
        assert self.beside is not None
        return sum(step.step_s for step in self.beside.steps) - len(self.beside.steps) * mean_step_s(self.off)

    @property
    def slowdown(self) -> float:
        """`extra_s` as a share of the steps without evolution."""
        assert self.beside is not None
        return self.extra_s / (len(self.beside.steps) * mean_step_s(self.off))

    @property
    def price(self) -> float:
        """Extra training seconds times serial throughput over evolution's tokens: 1 is what waiting costs."""
        assert self.alone is not None and self.beside is not None
        return self.extra_s * self.alone.tokens_per_s / max(1, self.beside.num_tokens)

    @property
    def round_steps(self) -> float:
        """Steps that a round lasts, by its trials so far where it was not over."""
        assert self.alone is not None and self.beside is not None
        share = 1.0 if self.beside.is_round_over else self.beside.num_trials / max(1, self.alone.num_trials)
        return len(self.beside.steps) / max(share, 1e-9)


def run_cost(run: SimulatedRun, num_steps: int) -> RunCost:
    """Simulate `num_steps` steps without evolution, a round alone, and as many steps beside a round."""
    off = steps_without(run, num_steps)
    if not run.config.evolution.searches:
        return RunCost(off=off, alone=None, beside=None)
    return RunCost(off=off, alone=round_alone(run), beside=steps_beside(run, num_steps))


def steps_without(run: SimulatedRun, num_steps: int) -> tuple[StepCost, ...]:
    """Simulate steps without evolution."""
    return simulate(lambda loop: _steps(run, cluster_of(run, loop), num_steps))


def round_alone(run: SimulatedRun) -> RoundAlone:
    """Simulate a round that has the engines to itself."""
    return _in_folder(lambda folder: simulate(lambda loop: _round_alone(run, loop, folder)))


def steps_beside(run: SimulatedRun, num_steps: int) -> StepsBeside:
    """Simulate up to `num_steps` steps beside a round."""
    return _in_folder(lambda folder: simulate(lambda loop: _beside(run, loop, folder, num_steps)))


def mean_step_s(steps: tuple[StepCost, ...]) -> float:
    return sum(step.step_s for step in steps) / len(steps)


def cluster_of(run: SimulatedRun, loop: VirtualTimeLoop) -> SimulatedCluster:
    lengths = lognormal_lengths(run.workload)
    return SimulatedCluster(loop, run.config, run.coefficients, run.cache_tokens, lengths, run.trainer)


async def _steps(run: SimulatedRun, cluster: SimulatedCluster, num_steps: int) -> tuple[StepCost, ...]:
    return tuple([await cluster.step(number, run.workload.prompt_tokens) for number in range(num_steps)])


def _round_alone(run: SimulatedRun, loop: VirtualTimeLoop, folder: Path) -> Coroutine[Any, Any, RoundAlone]:
    runner, round_ = _round(run, cluster_of(run, loop), folder)

    async def measure() -> RoundAlone:
        await round_
        return RoundAlone(round_s=loop.time(), num_tokens=runner.num_tokens, num_trials=runner.num_trials)

    return measure()


def _beside(run: SimulatedRun, loop: VirtualTimeLoop, folder: Path, num_steps: int) -> Coroutine[Any, Any, StepsBeside]:
    cluster = cluster_of(run, loop)
    runner, round_ = _round(run, cluster, folder)

    async def measure() -> StepsBeside:
        task = asyncio.ensure_future(round_)
        steps: list[StepCost] = []
        while len(steps) < num_steps and not task.done():
            steps.append(await cluster.step(len(steps), run.workload.prompt_tokens))
        if task.done():
            task.result()
        return StepsBeside(steps=tuple(steps), num_trials=runner.num_trials, is_round_over=task.done())

    return measure()


def _round(
    run: SimulatedRun, cluster: SimulatedCluster, folder: Path
) -> tuple[SimulatedRunner, Coroutine[Any, Any, RoundStats]]:
    config, workload = run.config, run.workload
    runner = SimulatedRunner(cluster.broker, config.rollout.max_new_tokens, workload.prompt_tokens, config.run.seed)
    spec = round_of(config, [f"hard problem {index}" for index in range(run.num_hard)], epoch=0)
    return runner, run_round(spec, folder, runner, SimulatedReflector(workload.reflection_s, config.run.seed))


def _in_folder(simulated: Callable[[Path], T]) -> T:
    """Simulate with a folder for the journal, which goes afterwards."""
    with tempfile.TemporaryDirectory(prefix="p2o-plan-") as folder:
        return simulated(Path(folder))
