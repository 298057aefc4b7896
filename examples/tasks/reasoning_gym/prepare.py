"""Writes problems of two datasets of reasoning-gym and a tiny policy that answers half of them.

python examples/tasks/reasoning_gym/prepare.py --out runs/tasks/reasoning_gym
"""

import argparse
import json
import random
from pathlib import Path

from megatron_p2o.data.reasoning_gym import rows
from megatron_p2o.tiny.lessons import teach

DATASETS = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "gcd": {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 12},
}
KNOWS = 0.5
"""Share of right answers in what the policy is taught."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300, help="of supervision")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    problems = []
    for name, settings in DATASETS.items():
        found = rows(name, 36, options.seed, settings)
        (options.out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
        problems += found

    def lesson(generator: random.Random) -> tuple[str, str]:
        row = generator.choice(problems)
        other = generator.choice([one for one in problems if one["source"] == row["source"]])
        answer = row["answer"] if generator.random() < KNOWS else other["answer"]
        return row["question"], f"<answer>{answer}</answer>"

    texts = [text for row in problems for text in (row["question"], f"<answer>{row['answer']}</answer>")]
    teach(lesson, texts, options.out / "model", options.seed, options.steps)


if __name__ == "__main__":
    main()
