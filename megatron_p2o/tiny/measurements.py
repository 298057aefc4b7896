"""What a tiny policy does, by family, level and kind of instruction, and how far its skill leans on the template."""

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from megatron_p2o.terminal import say
from megatron_p2o.tiny.model import prompt_ids, sample_texts
from megatron_p2o.tiny.problems import (
    FAMILIES,
    FILLER_PHRASES,
    NUM_STEPS,
    Family,
    Level,
    held_out_rewordings,
    join_phrases,
    make_problem,
    starts,
    user_message,
)
from megatron_p2o.tiny.regimes import LEVELS, demonstrate
from megatron_p2o.types import Problem


def answers_correctly(problem: Problem, text: str) -> bool:
    """Return whether the last box of the response holds the answer, up to spaces."""
    boxed = re.findall(r"\\boxed\{([^{}]*)\}", text)
    return bool(boxed) and boxed[-1].split() == (problem.answer or "").split()


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """Success of one family and level under one kind of instruction, on held-out start pairs."""

    family: str
    level: Level
    instruction: str
    """Kind of instruction; a sample draws one of the kind."""
    temperature: float
    """0 is greedy."""
    num_samples: int
    num_correct: int


def kinds_of_instruction(family: Family, seed: int) -> dict[str, Sequence[str]]:
    """Return the instructions of each measured kind."""
    first, second = family.key_phrases
    return {
        "plain": [""],
        "fillers": FILLER_PHRASES,
        "foreign_keys": [join_phrases(other.key_phrases) for other in FAMILIES.values() if other is not family],
        "first_key": [first],
        "second_key": [second],
        "both_keys": [join_phrases((first, second)), join_phrases((second, first))],
        "both_keys_held_out_wording": held_out_rewordings(join_phrases((first, second)), 16, seed),
    }


def measure(
    policy: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, temperature: float, num_samples: int, seed: int
) -> list[Measurement]:
    """Measure all families, levels and kinds, sampled and greedy. Hard plain cells take 8 times `num_samples`."""
    generator = random.Random(seed)
    torch.manual_seed(seed)
    held_out_starts = starts("held_out")
    measurements = []
    for family, level, used_temperature in product(FAMILIES.values(), LEVELS, (temperature, 0.0)):
        for kind, instructions in kinds_of_instruction(family, seed).items():
            num_in_cell = num_samples * (8 if (level, kind) == ("hard", "plain") else 1)
            drawn = generator.choices(held_out_starts, k=num_in_cell)
            problems = [make_problem(family, level, start) for start in drawn]
            messages = [user_message(generator.choice(instructions), problem.question) for problem in problems]
            texts = sample_texts(policy, tokenizer, messages, used_temperature)
            measurement = Measurement(
                family=family.name,
                level=level,
                instruction=kind,
                temperature=used_temperature,
                num_samples=num_in_cell,
                num_correct=sum(
                    answers_correctly(problem, text) for problem, text in zip(problems, texts, strict=True)
                ),
            )
            measurements.append(measurement)
    return measurements


def print_measurements(measurements: Sequence[Measurement]) -> None:
    """Print success by family and level, one line per kind of instruction and temperature."""
    columns = [(family, level) for level in LEVELS for family in FAMILIES]
    say(f"{'success':32}" + "".join(f"{f'{level} {family}':>13}" for family, level in columns))
    rows = dict.fromkeys((item.instruction, item.temperature) for item in measurements)
    for instruction, temperature in rows:
        success = {
            (item.family, item.level): item.num_correct / item.num_samples
            for item in measurements
            if (item.instruction, item.temperature) == (instruction, temperature)
        }
        name = f"{instruction}, {f'T={temperature}' if temperature else 'greedy'}"
        say(f"{name:32}" + "".join(f"{success[column]:13.4f}" for column in columns))


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextRatios:
    """log10 π(y|x) / π(y|x, z) of hard solutions of one family, with both its keys as z, on held-out start pairs."""

    family: str
    num_problems: int
    skill_smallest: float
    """Over the tokens that go on: the first of each further pair. They carry what the keys are for."""
    skill_mean: float
    skill_largest: float
    rest_smallest: float
    """Over all other tokens of the solutions."""


@torch.no_grad()
def measure_context_ratios(
    policy: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, temperature: float, num_problems: int, seed: int
) -> list[ContextRatios]:
    """Return the context ratios of every family at the sampling temperature, in float32."""
    generator, held_out_starts = random.Random(seed), starts("held_out")
    measured: list[ContextRatios] = []
    for family in FAMILIES.values():
        skill: list[float] = []
        rest: list[float] = []
        for start in generator.sample(held_out_starts, num_problems):
            question = make_problem(family, "hard", start).question
            solution = demonstrate(family, "hard", start, 1.0, generator) + "<|end|>"
            response: list[int] = tokenizer(solution)["input_ids"]
            plain, templated = (
                _logprobs(policy, prompt, response, temperature)
                for prompt in prompt_ids(
                    tokenizer, [question, user_message(join_phrases(family.key_phrases), question)]
                )
            )
            ratios = ((plain - templated) / math.log(10)).tolist()
            num_going_on = 3 * (NUM_STEPS["hard"] - 1)
            skill += ratios[:num_going_on:3]
            rest += [ratio for place, ratio in enumerate(ratios) if place % 3 or place >= num_going_on]
        measured.append(
            ContextRatios(
                family=family.name,
                num_problems=num_problems,
                skill_smallest=min(skill),
                skill_mean=fmean(skill),
                skill_largest=max(skill),
                rest_smallest=min(rest),
            )
        )
    return measured


def _logprobs(policy: Qwen3ForCausalLM, prompt: list[int], response: list[int], temperature: float) -> Tensor:
    """Return the log-prob of each response token."""
    logits_TV = policy.eval()(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    logprobs_TV = torch.log_softmax(logits_TV.float() / temperature, dim=-1)
    return logprobs_TV.gather(1, torch.tensor(response)[:, None])[:, 0]


def print_context_ratios(measured: Sequence[ContextRatios]) -> None:
    """Print the context ratios, one line per family."""
    for ratios in measured:
        say(
            f"context ratio of hard {ratios.family}: of the tokens that go on 1e{ratios.skill_smallest:.1f} to "
            f"1e{ratios.skill_largest:.1f}, mean 1e{ratios.skill_mean:.1f}; of the others above "
            f"1e{ratios.rest_smallest:.1f}"
        )
