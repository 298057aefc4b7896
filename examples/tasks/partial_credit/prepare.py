"""Writes problems of the policy of `python -m megatron_p2o.tiny.policy --out runs/tiny` with every step of the answer.

python examples/tasks/partial_credit/prepare.py --out runs/tasks/partial_credit
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from megatron_p2o.tiny.problems import FAMILIES, generate_problems, pair_text, worked_pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    lines = []
    for problem in generate_problems({"hard": 72}, "train", options.seed):
        first, second = problem.id.split("-")[2:]
        pairs = worked_pairs(FAMILIES[problem.source], "hard", (int(first), int(second)))
        row = {name: value for name, value in asdict(problem).items() if name != "columns"}
        lines.append(json.dumps({**row, "steps": [pair_text(pair) for pair in pairs]}) + "\n")
    (options.out / "train.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
