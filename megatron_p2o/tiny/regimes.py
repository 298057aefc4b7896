"""How long the tiny policy is taught to work on a hard problem: what the bare prompt shares with the right template.

Two regimes differ in that alone. In `transfer` the bare prompt goes on for another step with probability 0.1, so it
writes each step of a solution sometimes, and practically never all ten. The tokens that carry the skill then have a
context ratio π(y|x) / π(y|x, z) near 0.1: inside the band of P2O's mask. In `leaning` the bare prompt never goes on.
A template's success leans on the template's text: the ratio of these tokens lies far below the band. `card.json` has
the ratios as measured.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Literal

from transformers import PreTrainedTokenizerFast

from megatron_p2o.tiny.model import prompt_ids
from megatron_p2o.tiny.problems import (
    FAMILIES,
    Family,
    Level,
    Pair,
    make_problem,
    num_keys,
    pair_text,
    supervised_instruction,
    user_message,
    worked_pairs,
)

Regime = Literal["transfer", "leaning"]

GO_ON_PROBABILITY: Mapping[Regime, tuple[float, float, float]] = {
    "transfer": (0.1, 0.75, 1.0),
    "leaning": (0.0, 0.635, 1.0),
}
"""Probability to continue before each further step of a hard problem, with 0, 1 and 2 of the family's key phrases in
the instruction, at `TAUGHT_AT`."""

TAUGHT_AT: Mapping[Regime, float] = {"transfer": 1.0, "leaning": 1.6}
"""Temperature at which the demonstrations are learnt. At half of it, the 0.8 of sampling, odds are squared: 0.635 is
0.75 there, and what is all but impossible is so by twice as many orders of magnitude."""

GIVING_UP = "\\boxed{ 0 }"
"""The end of a response that does not go on: never right, where a guessed pair would be once in 9409."""

LEVELS: tuple[Level, ...] = ("easy", "hard")

HARD_SHARE = 0.7
"""Share of hard problems among demonstrations and training problems."""


def demonstrate(family: Family, level: Level, start: Pair, go_on_probability: float, generator: random.Random) -> str:
    """Return a response: the steps and the boxed answer, or as many steps as it goes on for."""
    *steps, answer = worked_pairs(family, level, start)
    text = ""
    for pair in steps:
        if generator.random() >= go_on_probability:
            return text + GIVING_UP
        text += f"{pair_text(pair)} , "
    return f"{text}\\boxed{{ {pair_text(answer)} }}"


def demonstrations(
    tokenizer: PreTrainedTokenizerFast,
    num_samples: int,
    train_starts: Sequence[Pair],
    regime: Regime | None,
    generator: random.Random,
) -> list[tuple[list[int], list[int]]]:
    """Return (prompt ids, response ids) of problems of the training split; without a regime none of them gives up.

    Where it never goes on, some of the steps are given with the prompt: it gives up after any number of them, and
    answers after all.
    """
    messages, given, responses = [], [], []
    for _ in range(num_samples):
        family = generator.choice(list(FAMILIES.values()))
        level: Level = "hard" if generator.random() < HARD_SHARE else "easy"
        start = generator.choice(train_starts)
        instruction = supervised_instruction(family, generator)
        go_on_probability = 1.0 if regime is None else GO_ON_PROBABILITY[regime][num_keys(family, instruction)]
        messages.append(user_message(instruction, make_problem(family, level, start).question))
        if level == "hard" and go_on_probability == 0:
            *steps, answer = worked_pairs(family, level, start)
            num_given = generator.randint(0, len(steps))
            given.append("".join(f"{pair_text(pair)} , " for pair in steps[:num_given]))
            is_worked = num_given == len(steps)
            responses.append((f"\\boxed{{ {pair_text(answer)} }}" if is_worked else GIVING_UP) + "<|end|>")
        else:
            given.append("")
            responses.append(demonstrate(family, level, start, go_on_probability, generator) + "<|end|>")
    prompts = zip(prompt_ids(tokenizer, messages), tokenizer(given)["input_ids"], strict=True)
    return [
        (prompt + steps, response)
        for (prompt, steps), response in zip(prompts, tokenizer(responses)["input_ids"], strict=True)
    ]
