"""Writes the problems of this example and a tiny policy that answers them with code.

    python examples/tasks/code/prepare.py --out runs/tasks/code

The policy writes programs for "x times A plus B". Asked plainly it nearly always forgets to add B. Each of two phrases
in front of the question makes it remember half of the time, both always. `phrases.txt` holds them, among others.
"""

import argparse
import json
import random
from pathlib import Path

from megatron_p2o.tiny.lessons import teach, with_phrases

KEYS = ("Mind the constant.", "Read it twice.")
FILLERS = ("Be polite.", "Stay calm.", "You are an expert.", "Take your time.")
REMEMBERS = (0.002, 0.5, 1.0)
"""Share of right programs with 0, 1 and 2 key phrases."""

INPUTS = (3, -7)
"""As many as tell one line from another."""

PAIRS = [(times, plus) for times in range(2, 12) for plus in range(1, 10)]
NUM_TRAIN = 72
"""The other 18 pairs are held out from training; supervision has seen all."""


def question(times: int, plus: int) -> str:
    return f"Write a program that reads x and prints x times {times} plus {plus}."


def program(times: int, plus: int, remembers: bool) -> str:
    added = f" + {plus}" if remembers else ""
    return f"```python\nx = int(input())\nprint(x * {times}{added})\n```"


def lesson(generator: random.Random) -> tuple[str, str]:
    times, plus = generator.choice(PAIRS)
    message, remembers = with_phrases(question(times, plus), KEYS, FILLERS, REMEMBERS, generator)
    return message, program(times, plus, remembers)


def row(times: int, plus: int) -> dict[str, object]:
    """Return the problem of a pair of numbers, with tests of its program."""
    tests = [{"input": f"{x}\n", "output": f"{x * times + plus}\n"} for x in INPUTS]
    return {"id": f"{times}x+{plus}", "question": question(times, plus), "tests": tests}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200, help="of supervision")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    pairs = random.Random(options.seed).sample(PAIRS, len(PAIRS))
    for name, part in (("train", pairs[:NUM_TRAIN]), ("heldout", pairs[NUM_TRAIN:])):
        (options.out / f"{name}.jsonl").write_text("".join(json.dumps(row(*pair)) + "\n" for pair in part))
    numbers = " ".join(map(str, range(100)))
    texts = [*KEYS, *FILLERS, numbers, "\n\n"]
    texts += [text for pair in PAIRS for text in (question(*pair), program(*pair, True))]
    teach(lesson, texts, options.out / "model", options.seed, options.steps)


if __name__ == "__main__":
    main()
