"""Make a tiny policy and its problems: a Qwen3-shaped Hugging Face model that gets stuck under GRPO and not under P2O.

    python -m megatron_p2o.tiny.policy --out runs/tiny --seed 1

writes `model/` (any program that loads Qwen3 loads it), `problems/{train,heldout_easy,heldout_hard}.jsonl` and
`card.json` with the behaviour measured after supervision. A minute or two on one CPU core.
`megatron_p2o.tiny.problems` explains the problems.
"""

import argparse
import json
import random
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import cast

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from megatron_p2o.terminal import say
from megatron_p2o.tiny.problems import (
    FAMILIES,
    FILLER_PHRASES,
    MODULUS,
    PHRASES,
    Family,
    Level,
    Pair,
    generate_problems,
    held_out_rewordings,
    join_phrases,
    make_problem,
    num_keys,
    pair_text,
    starts,
    supervised_instruction,
    user_message,
    worked_pairs,
)
from megatron_p2o.types import Problem

GO_ON_PROBABILITY = (0.1, 0.75, 1.0)
"""Probability to continue before each further step of a hard problem, with 0, 1 and 2 of the family's key phrases in
the instruction."""

GIVING_UP = "\\boxed{ 0 }"
"""The end of a response that does not go on: never right, where a guessed pair would be once in 9409."""

LEVELS: tuple[Level, ...] = ("easy", "hard")

HARD_SHARE = 0.7
"""Share of hard problems among demonstrations and training problems."""

MAX_NEW_TOKENS = 36
"""The longest response has 32."""

TINY_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Accepts `enable_thinking`, as every chat template does, and has no use for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Supervision:
    """Settings of the supervision. The defaults were tuned over seeds 1 to 4."""

    num_steps: int = 1600
    batch_size: int = 32
    lr: float = 4e-3
    """Decays linearly to 0."""
    num_warmup_steps: int = 20
    beta2: float = 0.99
    weight_decay: float = 0.01
    first_lesson: float = 0.3
    """Share of the steps whose demonstrations never give up: the step is learnt first, when to stop after that."""


SPECIAL = ("<|pad|>", "<unk>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
"""Control tokens of the tiny policies."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer: one token per number, word and sign; anything else is one `<unk>`."""
    signs = ["+", ":", ",", ".", "\\boxed{", "}"]
    numbers = [str(number) for number in range(MODULUS)]
    words = sorted({*FAMILIES, *re.findall("[a-z]+", " ".join(PHRASES))})
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *signs, *numbers, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    token_pattern = Regex(r"\\boxed\{|[0-9]+|[a-z]+|[^\s0-9a-z]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(token_pattern, behavior="removed", invert=True)
    return with_chat(tokenizer)


def with_chat(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Return the tokenizer, whose vocabulary begins with `SPECIAL`, with the tiny policies' chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<|pad|>",
        eos_token="<|end|>",
        extra_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=TINY_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=512,
    )


def new_policy(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """Return an untrained float32 Qwen3 of 194,944 parameters."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=512,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            initializer_range=0.07,
            pad_token_id=tokenizer.get_vocab()["<|pad|>"],
            bos_token_id=None,
            eos_token_id=tokenizer.get_vocab()["<|end|>"],
            dtype="float32",
        )
    )


def prompt_ids(tokenizer: PreTrainedTokenizerFast, messages: Sequence[str]) -> list[list[int]]:
    """Return the tokens of each user message in the chat template."""
    conversations = [[{"role": "user", "content": message}] for message in messages]
    token_ids = tokenizer.apply_chat_template(
        conversations, add_generation_prompt=True, enable_thinking=False, return_dict=False
    )
    return cast(list[list[int]], token_ids)


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
    may_give_up: bool,
    generator: random.Random,
) -> list[tuple[list[int], list[int]]]:
    """Return (prompt ids, response ids) of problems of the training split."""
    messages, responses = [], []
    for _ in range(num_samples):
        family = generator.choice(list(FAMILIES.values()))
        level: Level = "hard" if generator.random() < HARD_SHARE else "easy"
        start = generator.choice(train_starts)
        instruction = supervised_instruction(family, generator)
        go_on_probability = GO_ON_PROBABILITY[num_keys(family, instruction)] if may_give_up else 1.0
        messages.append(user_message(instruction, make_problem(family, level, start).question))
        responses.append(demonstrate(family, level, start, go_on_probability, generator) + "<|end|>")
    return list(zip(prompt_ids(tokenizer, messages), tokenizer(responses)["input_ids"], strict=True))


def supervised_rows(samples: Sequence[tuple[list[int], list[int]]], row_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lay samples end to end in rows: token ids, position ids and targets, int64 [rows, row_length].

    Positions restart at 0 with each sample, which tells transformers to keep attention inside it. Targets are the next
    token on responses and -100 elsewhere.
    """
    rows: list[list[tuple[list[int], list[int]]]] = []
    num_free: list[int] = []
    for prompt, response in sorted(samples, key=lambda sample: -len(sample[0]) - len(sample[1])):
        length = len(prompt) + len(response) - 1
        row = next((index for index, free in enumerate(num_free) if free >= length), len(rows))
        if row == len(rows):
            rows.append([])
            num_free.append(max(row_length, length))
        rows[row].append((prompt, response))
        num_free[row] -= length
    token_ids = torch.zeros(len(rows), row_length, dtype=torch.int64)
    position_ids = torch.zeros_like(token_ids)
    targets = torch.full_like(token_ids, -100)
    for row, row_samples in enumerate(rows):
        first = 0
        for prompt, response in row_samples:
            last = first + len(prompt) + len(response) - 1
            token_ids[row, first:last] = torch.tensor((prompt + response)[:-1])
            position_ids[row, first:last] = torch.arange(last - first)
            targets[row, first + len(prompt) - 1 : last] = torch.tensor(response)
            first = last
    return token_ids, position_ids, targets


def supervise(policy: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, settings: Supervision, seed: int) -> None:
    """Train the policy in place on fresh demonstrations of the training split."""
    generator, train_starts = random.Random(seed), starts("train")
    optimizer = torch.optim.AdamW(
        policy.parameters(), betas=(0.9, settings.beta2), weight_decay=settings.weight_decay, fused=True
    )
    started, policy = time.monotonic(), policy.train()
    for step in range(settings.num_steps):
        warmup = min(1, (step + 1) / settings.num_warmup_steps)
        optimizer.param_groups[0]["lr"] = settings.lr * warmup * (1 - step / settings.num_steps)
        may_give_up = step >= settings.first_lesson * settings.num_steps
        samples = demonstrations(tokenizer, settings.batch_size, train_starts, may_give_up, generator)
        token_ids, position_ids, targets = supervised_rows(samples, row_length=96)
        logits = policy(input_ids=token_ids, position_ids=position_ids, use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            elapsed_s = time.monotonic() - started
            say(f"supervised {step + 1}/{settings.num_steps}  loss {loss.item():.3f}  {elapsed_s:.0f} s")


@torch.no_grad()
def sample_texts(
    policy: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, messages: Sequence[str], temperature: float
) -> list[str]:
    """Return one response per user message; temperature 0 is greedy."""
    greedy = {"do_sample": False}
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else greedy
    texts: list[str] = []
    for first in range(0, len(messages), 512):
        prompts = tokenizer.pad(
            {"input_ids": prompt_ids(tokenizer, messages[first : first + 512])}, return_tensors="pt"
        )
        token_ids = policy.eval().generate(  # pyright: ignore[reportAttributeAccessIssue]
            **prompts, **sampling, max_new_tokens=MAX_NEW_TOKENS
        )
        texts += tokenizer.batch_decode(token_ids[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


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


def write_problems(directory: Path, num_train: int, num_held_out: int, seed: int) -> None:
    """Write the three problem files as JSONL, one `Problem` a line."""
    num_hard = round(HARD_SHARE * num_train)
    files = {
        "train": generate_problems({"hard": num_hard, "easy": num_train - num_hard}, "train", seed),
        "heldout_easy": generate_problems({"easy": num_held_out}, "held_out", seed),
        "heldout_hard": generate_problems({"hard": num_held_out}, "held_out", seed),
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, problems in files.items():
        lines = (json.dumps(asdict(problem)) + "\n" for problem in problems)
        (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=1, help="seeds initial weights, demonstrations and problems")
    parser.add_argument("--num-train", type=int, default=448, help="training problems, 70 %% of them hard")
    parser.add_argument("--num-held-out", type=int, default=96, help="problems of each held-out file")
    parser.add_argument("--supervised-steps", type=int, default=Supervision().num_steps)
    parser.add_argument("--temperature", type=float, default=0.8, help="of the measured samples")
    parser.add_argument("--num-samples", type=int, default=256, help="measured samples per cell; 0 measures nothing")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    settings = Supervision(num_steps=arguments.supervised_steps)
    tokenizer = build_tokenizer()
    policy = new_policy(tokenizer, arguments.seed)
    say(f"{policy.num_parameters()} parameters, {len(tokenizer)} tokens")
    write_problems(arguments.out / "problems", arguments.num_train, arguments.num_held_out, arguments.seed)
    supervise(policy, tokenizer, settings, arguments.seed)
    policy.save_pretrained(arguments.out / "model")
    tokenizer.save_pretrained(arguments.out / "model")
    measurements = []
    if arguments.num_samples > 0:
        measurements = measure(policy, tokenizer, arguments.temperature, arguments.num_samples, arguments.seed)
        print_measurements(measurements)
    card = {
        "seed": arguments.seed,
        "supervision": asdict(settings),
        "measurements": [asdict(measurement) for measurement in measurements],
    }
    (arguments.out / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
