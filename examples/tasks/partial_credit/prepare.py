"""Writes problems of the policy of `python -m megatron_p2o.tiny.policy --out runs/tiny` with every step of the answer.

python examples/tasks/partial_credit/prepare.py --out runs/tasks/partial_credit
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from megatron_p2o.tiny.problems import FAMILIES, generate_problems, pair_text, worked_pairs
from megatron_p2o.types import Problem


def row(problem: Problem) -> dict[str, object]:
    first, second = problem.id.split("-")[2:]
    pairs = worked_pairs(FAMILIES[problem.source], "hard", (int(first), int(second)))
    columns = {name: value for name, value in asdict(problem).items() if name != "columns"}
    return {**columns, "steps": [pair_text(pair) for pair in pairs]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, split, num_problems in (("train", "train", 72), ("heldout", "held_out", 18)):
        problems = generate_problems({"hard": num_problems}, split, options.seed)
        (options.out / f"{name}.jsonl").write_text("".join(json.dumps(row(problem)) + "\n" for problem in problems))


if __name__ == "__main__":
    main()
