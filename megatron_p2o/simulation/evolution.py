"""A round of prompt evolution in virtual time: the real search and journal, templates and verdicts made up.

A template has a quality, which reflection changes at random, and a problem a difficulty. A greedy rollout solves its
problem with a probability that grows with their difference, and the same pair always has the same outcome.
"""

import asyncio
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_p2o.config.tree import Config
from megatron_p2o.evolve.process.conduct import conduct_round, split_of
from megatron_p2o.evolve.reflection.reflection import ReflectionRequest
from megatron_p2o.evolve.search.publish import RoundStats
from megatron_p2o.evolve.search.round import RoundSettings, RoundSpec
from megatron_p2o.evolve.trial import Rejection, Trial
from megatron_p2o.rollout.broker import Broker
from megatron_p2o.seeds import seed_of
from megatron_p2o.types import PLAIN, Problem, Prompt, SamplingParams

QUALITY = re.compile(r"quality (-?\d+\.\d+)")

PLAIN_QUALITY = -3.0
"""Quality of the empty template: hard problems are solved in one of twenty rollouts or fewer."""

CHANGE = 1.0
"""Standard deviation of what reflection does to a quality."""


class SimulatedRunner:
    """A `TrialRunner` that samples through the broker."""

    def __init__(self, broker: Broker, max_new_tokens: int, prompt_tokens: int, seed: int) -> None:
        self._broker = broker
        self._max_new_tokens = max_new_tokens
        self._prompt_tokens = prompt_tokens
        self._seed = seed
        self.num_tokens = 0
        """Sampled by the trials that ended."""
        self.num_trials = 0

    async def run_trial(
        self, template_text: str, problem_id: str, *, temperature: float, sample: int = 0
    ) -> Trial | Rejection:
        seed = seed_of(self._seed, template_text, problem_id, sample)
        prompt = prompt_of(f"{template_text}/{problem_id}", self._prompt_tokens, problem_id, template_text)
        sampling = SamplingParams(temperature=temperature, max_new_tokens=self._max_new_tokens, seed=seed)
        completion = await self._broker.generate(prompt, sampling, "evolution")
        self.num_tokens += len(completion.token_ids)
        self.num_trials += 1
        random = np.random.default_rng(seed)
        return Trial(
            reward=float(random.random() < solve_probability(template_text, problem_id)),
            response_text="",
            finish_reason=completion.finish_reason,
            num_tokens=len(completion.token_ids),
            weight_version=completion.weight_versions[-1],
        )


class SimulatedReflector:
    """Writes templates whose quality differs from their parent's by chance."""

    def __init__(self, seconds: float, seed: int) -> None:
        """`seconds`: what a reply takes."""
        self._seconds = seconds
        self._seed = seed

    async def propose(self, request: ReflectionRequest) -> str:
        await asyncio.sleep(self._seconds)
        change = np.random.default_rng([self._seed, request.proposal]).normal(0.0, CHANGE)
        return f"Instructions {request.proposal} of quality {quality_of(request.parent_text) + change:.6f}"

    async def close(self) -> None: ...


def quality_of(template_text: str) -> float:
    found = QUALITY.search(template_text)
    return float(found[1]) if found else PLAIN_QUALITY


def solve_probability(template_text: str, problem_id: str) -> float:
    difficulty = np.random.default_rng(seed_of(0, problem_id)).normal()
    return 1 / (1 + math.exp(difficulty - quality_of(template_text)))


def prompt_of(what: str, num_tokens: int, problem_id: str, template_text: str = "") -> Prompt:
    """Return a prompt of tokens that depend on `what`; the same is the same to a prefix cache."""
    ids = np.random.default_rng(seed_of(1, what)).integers(0, 2**16, num_tokens).astype(np.int32)
    problem = Problem(id=problem_id, question="", answer=None)
    return Prompt(problem=problem, template=replace(PLAIN, text=template_text), sampling_ids=ids, training_ids=ids)


def round_of(config: Config, problem_ids: Sequence[str], epoch: int) -> RoundSpec:
    """Return the round that the settings describe over these hard problems."""
    return RoundSpec(
        epoch=epoch,
        library_version=epoch + 1,
        problems=tuple(Problem(id=key, question=key, answer=None) for key in problem_ids),
        warm_templates=(),
        settings=RoundSettings(
            evolution=config.evolution,
            assignment=config.assignment,
            group_size=config.rollout.group_size,
            sampling_temperature=config.rollout.temperature,
            min_problems=min(config.hard.min_problems, len(problem_ids)),
            seed=config.run.seed,
        ),
    )


async def run_round(
    spec: RoundSpec, run_dir: Path, runner: SimulatedRunner, reflector: SimulatedReflector
) -> RoundStats:
    """Run a round to its end and return its numbers. Raise `ValueError` when its problems are too few."""
    split = split_of(spec)
    if split is None:
        raise ValueError(f"{len(spec.problems)} hard problems are too few for a round")
    return await conduct_round(spec, split, run_dir, runner, reflector, asyncio.Event(), lambda _: None)
