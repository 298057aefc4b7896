"""Make a tiny policy and its problems: a Qwen3-shaped Hugging Face model that gets stuck under GRPO and not under P2O.

    python tools/make_tiny_policy.py --out runs/tiny --seed 1

writes `model/` (any Qwen3 program loads it), `problems/{train,heldout_easy,heldout_hard}.jsonl` and `card.json` with the
behaviour measured after supervision. About a minute on one CPU core. `megatron_p2o.data.generated` explains the problems.
"""

import argparse
import json
import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from megatron_p2o.data.generated import (
    FAMILIES,
    FILLER_PHRASES,
    MODULUS,
    NUM_STEPS,
    PHRASES,
    Family,
    Level,
    Pair,
    Problem,
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

GO_ON_PROBABILITY = (0.2, 0.75, 1.0)
"""Before each step of a hard problem, with 0, 1 and 2 of the family's key phrases in the instruction; else a guess."""

HARD_SHARE = 0.7
"""Of demonstrations and of training problems."""

MAX_NEW_TOKENS = 40
"""The longest response has 34."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Accepts `enable_thinking`, as every chat template does, and has no use for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Supervision:
    """How the policy is taught; the defaults were tuned over seeds 1 to 4."""

    num_steps: int = 500
    batch_size: int = 128
    lr: float = 2e-3
    warmup_steps: int = 30
    weight_decay: float = 0.01


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer: one token per number, word and sign; anything else is one `<unk>`."""
    special = ["<|pad|>", "<unk>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    signs = ["+", ":", ",", ".", "\\boxed{", "}"]
    numbers = [str(number) for number in range(MODULUS)]
    words = sorted({*FAMILIES, *re.findall("[a-z]+", " ".join(PHRASES))})
    vocabulary = {token: index for index, token in enumerate([*special, *signs, *numbers, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    token_pattern = Regex(r"\\boxed\{|[0-9]+|[a-z]+|[^\s0-9a-z]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(token_pattern, behavior="removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<|pad|>",
        eos_token="<|end|>",
        extra_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=512,
    )


def build_policy(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """Return an untrained float32 Qwen3 of about 0.35 million parameters."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        initializer_range=0.07,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    policy = Qwen3ForCausalLM(config)
    policy.generation_config.do_sample = True
    return policy


def prompt_ids(tokenizer: PreTrainedTokenizerFast, messages: Sequence[str]) -> list[list[int]]:
    """Return what the chat template makes of each user message."""
    conversations = [[{"role": "user", "content": message}] for message in messages]
    return tokenizer.apply_chat_template(
        conversations, add_generation_prompt=True, enable_thinking=False, return_dict=False
    )


def demonstrate(family: Family, level: Level, start: Pair, instruction: str, generator: random.Random) -> str:
    """Return a response as the policy is to give it; a hard problem may end in a guess."""
    pairs = worked_pairs(family, level, start)
    go_on_probability = GO_ON_PROBABILITY[num_keys(family, instruction)]
    text = ""
    for pair in pairs[:-1]:
        if generator.random() >= go_on_probability:
            guess = (generator.randrange(MODULUS), generator.randrange(MODULUS))
            return f"{text}\\boxed{{ {pair_text(guess)} }}"
        text += f"{pair_text(pair)} , "
    return f"{text}\\boxed{{ {pair_text(pairs[-1])} }}"


def demonstration_batch(
    tokenizer: PreTrainedTokenizerFast, batch_size: int, train_starts: Sequence[Pair], generator: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and labels, both int64 [batch_size, longest], right-padded; labels are -100 off the responses."""
    messages, responses = [], []
    for _ in range(batch_size):
        family = generator.choice(list(FAMILIES.values()))
        level: Level = "hard" if generator.random() < HARD_SHARE else "easy"
        start = generator.choice(train_starts)
        instruction = supervised_instruction(family, generator)
        messages.append(user_message(instruction, make_problem(family, level, start).question))
        responses.append(demonstrate(family, level, start, instruction, generator) + "<|end|>")
    prompts = prompt_ids(tokenizer, messages)
    answers = tokenizer(responses)["input_ids"]
    longest = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    token_ids = torch.full((batch_size, longest), tokenizer.pad_token_id)
    labels = torch.full((batch_size, longest), -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        token_ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return token_ids, labels


def supervise(policy: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, settings: Supervision, seed: int) -> None:
    """Train the policy in place on fresh demonstrations of the training split."""
    generator, train_starts = random.Random(seed), starts("train")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    policy.train()
    started = time.monotonic()
    for step in range(settings.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * min(1, (step + 1) / settings.warmup_steps) * (1 - step / settings.num_steps)
        token_ids, labels = demonstration_batch(tokenizer, settings.batch_size, train_starts, generator)
        logits = policy(input_ids=token_ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            elapsed_s = time.monotonic() - started
            print(f"supervised {step + 1}/{settings.num_steps}  loss {loss.item():.3f}  {elapsed_s:.0f} s", flush=True)


@torch.no_grad()
def sample_texts(
    policy: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, messages: Sequence[str], temperature: float
) -> list[str]:
    """Return one response per user message; temperature 0 is greedy."""
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    policy.eval()
    texts: list[str] = []
    for first in range(0, len(messages), 512):
        prompts = tokenizer.pad(
            {"input_ids": prompt_ids(tokenizer, messages[first : first + 512])}, return_tensors="pt"
        )
        token_ids = policy.generate(**prompts, **sampling, top_k=0, top_p=1.0, max_new_tokens=MAX_NEW_TOKENS)
        texts += tokenizer.batch_decode(token_ids[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def is_correct(problem: Problem, text: str) -> bool:
    """Whether the last box of the response holds the answer, up to spaces."""
    boxed = re.findall(r"\\boxed\{([^{}]*)\}", text)
    return bool(boxed) and boxed[-1].split() == problem.answer.split()


def instruction_kinds(family: Family, seed: int) -> Mapping[str, Sequence[str]]:
    """Return instructions to measure the family with, by kind."""
    first, second = family.key_phrases
    foreign = [join_phrases(other.key_phrases) for other in FAMILIES.values() if other is not family]
    return {
        "plain": [""],
        "fillers": FILLER_PHRASES,
        "foreign_keys": foreign,
        "first_key": [first],
        "second_key": [second],
        "both_keys": [join_phrases((first, second)), join_phrases((second, first))],
        "both_keys_held_out_wording": held_out_rewordings(join_phrases((first, second)), 16, seed),
    }


def measure(
    policy: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, temperature: float, num_samples: int, seed: int
) -> list[dict[str, object]]:
    """Return the success rate on held-out start pairs by family, level, instruction kind and temperature."""
    generator, rows = random.Random(seed), []
    held_out_starts = starts("held_out")
    for family in FAMILIES.values():
        for level in NUM_STEPS:
            problems = [
                make_problem(family, level, start) for start in generator.choices(held_out_starts, k=num_samples)
            ]
            for kind, instructions in instruction_kinds(family, seed).items():
                for used_temperature in (temperature, 0.0):
                    messages = [user_message(generator.choice(instructions), problem.question) for problem in problems]
                    texts = sample_texts(policy, tokenizer, messages, used_temperature)
                    num_correct = sum(is_correct(problem, text) for problem, text in zip(problems, texts, strict=True))
                    rows.append(
                        {
                            "family": family.name,
                            "level": level,
                            "instruction": kind,
                            "temperature": used_temperature,
                            "num_samples": num_samples,
                            "num_correct": num_correct,
                            "success": num_correct / num_samples,
                        }
                    )
                    print(f"{family.name:8}{level:6}{kind:28}T={used_temperature:<4}{num_correct / num_samples:.4f}")
    return rows


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=1, help="seeds initial weights, demonstrations and problems")
    parser.add_argument("--num-train", type=int, default=448, help="training problems, 70 %% of them hard")
    parser.add_argument("--num-held-out", type=int, default=96, help="problems of each held-out file")
    parser.add_argument("--supervised-steps", type=int, default=Supervision().num_steps)
    parser.add_argument("--temperature", type=float, default=0.8, help="of the measured samples")
    parser.add_argument("--num-samples", type=int, default=512, help="measured samples per cell; 0 measures nothing")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    settings = Supervision(num_steps=arguments.supervised_steps)
    tokenizer = build_tokenizer()
    policy = build_policy(tokenizer, arguments.seed)
    print(f"{sum(weight.numel() for weight in policy.parameters())} parameters, {len(tokenizer)} tokens", flush=True)
    write_problems(arguments.out / "problems", arguments.num_train, arguments.num_held_out, arguments.seed)
    supervise(policy, tokenizer, settings, arguments.seed)
    policy.save_pretrained(arguments.out / "model")
    tokenizer.save_pretrained(arguments.out / "model")
    measured = []
    if arguments.num_samples > 0:
        measured = measure(policy, tokenizer, arguments.temperature, arguments.num_samples, arguments.seed)
    card = {"seed": arguments.seed, "supervision": asdict(settings), "measured": measured}
    (arguments.out / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
