"""Make a tiny policy and its problems: a Qwen3-shaped Hugging Face model that gets stuck under GRPO and not under P2O.

    python -m megatron_p2o.tiny.policy --out runs/tiny --seed 1

writes `model/` (any program that loads Qwen3 loads it), `problems/{train,heldout_easy,heldout_hard}.jsonl` and
`card.json` with the behaviour measured after supervision. A minute or two on one CPU core.
`megatron_p2o.tiny.problems` explains the problems, `megatron_p2o.tiny.regimes` what `--regime leaning` changes.
"""

import argparse
import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from megatron_p2o.terminal import say
from megatron_p2o.tiny.measurements import (
    measure,
    measure_context_ratios,
    print_context_ratios,
    print_measurements,
)
from megatron_p2o.tiny.model import build_tokenizer, new_policy, supervised_rows
from megatron_p2o.tiny.problems import generate_problems, starts
from megatron_p2o.tiny.regimes import HARD_SHARE, TAUGHT_AT, Regime, demonstrations


@dataclass(frozen=True, kw_only=True, slots=True)
class Supervision:
    """Settings of the supervision. The defaults were tuned over seeds 1 to 4."""

    regime: Regime = "transfer"
    num_steps: int = 1600
    batch_size: int = 32
    lr: float = 4e-3
    """Decays linearly to 0."""
    num_warmup_steps: int = 20
    beta2: float = 0.99
    weight_decay: float = 0.01
    first_lesson: float = 0.3
    """Share of the steps whose demonstrations never give up: the step is learnt first, when to stop after that."""


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
        regime = settings.regime if step >= settings.first_lesson * settings.num_steps else None
        samples = demonstrations(tokenizer, settings.batch_size, train_starts, regime, generator)
        token_ids, position_ids, targets = supervised_rows(samples, row_length=96)
        logits = policy(input_ids=token_ids, position_ids=position_ids, use_cache=False).logits
        logits = logits / TAUGHT_AT[settings.regime]
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            elapsed_s = time.monotonic() - started
            say(f"supervised {step + 1}/{settings.num_steps}  loss {loss.item():.3f}  {elapsed_s:.0f} s")


NUM_RATIO_PROBLEMS = 16
"""Hard problems of each family whose context ratios are measured."""


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
    parser.add_argument(
        "--regime",
        choices=get_args(Regime),
        default=Supervision().regime,
        help="what the bare prompt shares with the right template, see megatron_p2o/tiny/regimes.py",
    )
    parser.add_argument("--num-train", type=int, default=448, help="training problems, 70 %% of them hard")
    parser.add_argument("--num-held-out", type=int, default=96, help="problems of each held-out file")
    parser.add_argument("--supervised-steps", type=int, default=Supervision().num_steps)
    parser.add_argument("--temperature", type=float, default=0.8, help="of the measured samples")
    parser.add_argument("--num-samples", type=int, default=256, help="measured samples per cell; 0 measures nothing")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    settings = Supervision(regime=arguments.regime, num_steps=arguments.supervised_steps)
    tokenizer = build_tokenizer()
    policy = new_policy(tokenizer, arguments.seed)
    say(f"{policy.num_parameters()} parameters, {len(tokenizer)} tokens")
    write_problems(arguments.out / "problems", arguments.num_train, arguments.num_held_out, arguments.seed)
    supervise(policy, tokenizer, settings, arguments.seed)
    policy.save_pretrained(arguments.out / "model")
    tokenizer.save_pretrained(arguments.out / "model")
    measurements, ratios = [], []
    if arguments.num_samples > 0:
        ratios = measure_context_ratios(policy, tokenizer, arguments.temperature, NUM_RATIO_PROBLEMS, arguments.seed)
        print_context_ratios(ratios)
        measurements = measure(policy, tokenizer, arguments.temperature, arguments.num_samples, arguments.seed)
        print_measurements(measurements)
    card = {
        "seed": arguments.seed,
        "supervision": asdict(settings),
        "context_ratios": [asdict(ratio) for ratio in ratios],
        "measurements": [asdict(measurement) for measurement in measurements],
    }
    (arguments.out / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
