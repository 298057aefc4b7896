"""Writes the problems of this example and a tiny policy that answers them.

    python examples/tasks/palindrome/prepare.py --out runs/tasks/palindrome

The policy goes on from two letters. Asked plainly it nearly always repeats them (b d b d) and does not mirror them
(b d d b). Each of two phrases in front of the question makes it mirror half of the time, both always. `phrases.txt`
holds them, among others.
"""

import argparse
import json
import random
from itertools import permutations
from pathlib import Path

from megatron_p2o.tiny.lessons import teach, with_phrases

KEYS = ("Mirror the letters.", "Read it backwards too.")
FILLERS = ("Be polite.", "Stay calm.", "You are an expert.", "Take your time.")
MIRRORS = (0.002, 0.5, 1.0)
"""Share of palindromes with 0, 1 and 2 key phrases."""

STARTS = ["".join(pair) for pair in permutations("bdfghklmns", 2)]
NUM_TRAIN = 72
"""The other 18 starts are held out from training; supervision has seen all."""


def question(start: str) -> str:
    return f"Write a palindrome that begins with {' '.join(start)}."


def response(start: str, mirrors: bool) -> str:
    return " ".join(start + (start[::-1] if mirrors else start))


def lesson(generator: random.Random) -> tuple[str, str]:
    start = generator.choice(STARTS)
    message, mirrors = with_phrases(question(start), KEYS, FILLERS, MIRRORS, generator)
    return message, response(start, mirrors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200, help="of supervision")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    starts = random.Random(options.seed).sample(STARTS, len(STARTS))
    for name, part in (("train", starts[:NUM_TRAIN]), ("heldout", starts[NUM_TRAIN:])):
        rows = [{"id": start, "question": question(start), "letters": start} for start in part]
        (options.out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [*KEYS, *FILLERS, "\n\n", *(text for start in STARTS for text in (question(start), response(start, True)))]
    teach(lesson, texts, options.out / "model", options.seed, options.steps)


if __name__ == "__main__":
    main()
