"""The engines of a run and the trainer's share of their time, behind the real broker, in virtual time."""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np

from megatron_p2o.config.tree import Config
from megatron_p2o.rollout.broker import Broker
from megatron_p2o.rollout.requests import NOBODY
from megatron_p2o.rollout.servers.client import EngineClient
from megatron_p2o.seeds import seed_of
from megatron_p2o.simulation.batch import EngineCoefficients
from megatron_p2o.simulation.engine import LengthOf, SimulatedEngine
from megatron_p2o.simulation.evolution import prompt_of
from megatron_p2o.simulation.hardware import Workload
from megatron_p2o.simulation.virtual_time import SimulatedBrokerLoop, VirtualTimeLoop
from megatron_p2o.types import Completion, Prompt, SamplingParams, TokenIds


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCost:
    """What a step took, in simulated seconds."""

    generation_s: float
    update_s: float
    refresh_s: float
    num_tokens: int
    """Sampled for training."""
    num_evolution_tokens: int
    """Sampled for evolution meanwhile, whether or not a trial has ended."""
    busy_share: float
    """Share of the generation phase in which an engine had work, mean over the engines."""

    @property
    def step_s(self) -> float:
        return self.generation_s + self.update_s + self.refresh_s


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerCost:
    """What the trainer takes of a step."""

    update_token_s: float
    """For each sampled token of the step."""
    refresh_s: float
    lends: bool
    """Whether the engines stand still during the update, because their memory is the trainer's."""


class SimulatedCluster:
    """Engines and a broker on one loop. Make it before the loop runs."""

    def __init__(
        self,
        loop: VirtualTimeLoop,
        config: Config,
        coefficients: EngineCoefficients,
        cache_tokens: int,
        length_of: LengthOf,
        trainer: TrainerCost,
    ) -> None:
        """`cache_tokens`: of each engine."""
        self._loop = loop
        self._config = config
        self._trainer = trainer
        rollout = config.rollout
        self.broker = Broker(
            slots_per_engine=rollout.max_running_requests,
            request_timeout_s=rollout.request_timeout_s,
            stall_timeout_s=rollout.stall_timeout_s,
            max_slowdown=config.evolution.max_slowdown,
            thread=SimulatedBrokerLoop(loop),
        )
        self.engines: list[SimulatedEngine] = []
        for index in range(rollout.num_engines):
            self.broker.add_engine(
                f"engine {index}",
                partial(self._new_engine, coefficients, cache_tokens, length_of),
                lambda: "",
            )

    @property
    def num_tokens(self) -> int:
        """Sampled so far."""
        return sum(engine.counts.num_tokens for engine in self.engines)

    async def step(self, number: int, prompt_tokens: int) -> StepCost:
        """Sample, update and refresh as a step does; `number` makes its prompts and lengths."""
        begin, sampled = self._loop.time(), self.num_tokens
        busy = sum(engine.counts.busy_s for engine in self.engines)
        completions = await self._sample(step_prompts(self._config, number, prompt_tokens), number)
        generation_s = self._loop.time() - begin
        busy_s = sum(engine.counts.busy_s for engine in self.engines) - busy
        num_tokens = sum(len(completion.token_ids) for completion in completions)
        update_s = num_tokens * self._trainer.update_token_s
        if self._trainer.lends:
            await self._stand_still()
        await asyncio.sleep(update_s)
        await self._stand_still()
        await asyncio.sleep(self._trainer.refresh_s)
        await asyncio.gather(*(engine.resume(number + 1) for engine in self.engines))
        self.broker.serve(number + 1)
        return StepCost(
            generation_s=generation_s,
            update_s=update_s,
            refresh_s=self._trainer.refresh_s,
            num_tokens=num_tokens,
            num_evolution_tokens=self.num_tokens - sampled - num_tokens,
            busy_share=busy_s / (generation_s * len(self.engines)),
        )

    def _new_engine(self, coefficients: EngineCoefficients, cache_tokens: int, length_of: LengthOf) -> EngineClient:
        engine = SimulatedEngine(
            coefficients,
            length_of,
            cache_tokens=cache_tokens,
            max_running=self._config.rollout.max_running_requests,
            has_priorities=self._config.evolution.enabled,
        )
        self.engines.append(engine)
        return cast(EngineClient, engine)  # it has of it what the broker uses

    async def _sample(self, prompts: Sequence[Prompt], number: int) -> list[Completion]:
        rollout = self._config.rollout
        futures = [
            self.broker.submit(
                prompt,
                SamplingParams(
                    temperature=rollout.temperature,
                    max_new_tokens=rollout.max_new_tokens,
                    seed=seed_of(self._config.run.seed, number, place),
                ),
            )
            for place, prompt in enumerate(prompts)
        ]
        return await asyncio.gather(*map(asyncio.wrap_future, futures))

    async def _stand_still(self) -> None:
        self.broker.admit(NOBODY)
        await asyncio.gather(*(engine.pause() for engine in self.engines))


def step_prompts(config: Config, number: int, prompt_tokens: int) -> list[Prompt]:
    """Return the prompts of a step: a group for each of its problems."""
    names = [f"problem {number}/{index}" for index in range(config.schedule.problems_per_step)]
    return [prompt for name in names for prompt in [prompt_of(name, prompt_tokens, name)] * config.rollout.group_size]


def lognormal_lengths(workload: Workload) -> LengthOf:
    """Return a response's length as a function of its seed alone, so that two simulations sample the same."""

    def length_of(token_ids: TokenIds, sampling: SamplingParams) -> int:
        drawn = np.random.default_rng(sampling.seed).standard_normal()
        length = workload.response_tokens * math.exp(workload.response_log_std * drawn)
        return max(1, min(sampling.max_new_tokens, int(length)))

    return length_of
