"""Writes problems of the library reasoning-gym as JSONL. The reward `reasoning_gym` grades them.

    python -m megatron_p2o.data.reasoning_gym chain_sum --size 500 --seed 1 --set max_terms=3 --out train.jsonl

The same arguments write the same file.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_p2o.errors import expected_message
from megatron_p2o.terminal import say


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_p2o.data.reasoning_gym", description=__doc__)
    parser.add_argument("name", metavar="DATASET", help="name of a dataset of the library, such as chain_sum")
    parser.add_argument("--size", type=int, required=True, help="number of problems")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="setting of the dataset, as JSON"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to write")
    options = parser.parse_args(arguments)
    try:
        return write(options)
    except (ValueError, OSError) as error:
        message = expected_message(error)
        if message is None:
            raise
        say(message, sys.stderr)
        return 2


def write(options: argparse.Namespace) -> int:
    problems = rows(options.name, options.size, options.seed, settings_in(options.set))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("".join(json.dumps(row) + "\n" for row in problems))
    say(f"{options.out}: {len(problems)} problems of {options.name}")
    return 0


def settings_in(texts: Sequence[str]) -> dict[str, Any]:
    """Return settings written as NAME=VALUE. Raises `ValueError`."""
    settings: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
        if not equals or not name.isidentifier():
            raise ValueError(f"--set {text} must be NAME=VALUE")
    return settings


def rows(name: str, size: int, seed: int, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each problem: id, question, answer, source, metadata and the settings for its scorer.

    Raises:
        ValueError: the library is not installed, has no such dataset or settings, or its problems cannot be graded
            from a file: its own answer, read back from JSON, does not score 1.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ValueError(f"problems of reasoning-gym need it: pip install reasoning-gym ({error})") from error
    if name not in DATASETS:
        raise ValueError(f"reasoning-gym has no dataset {name!r}; it has {', '.join(sorted(DATASETS))}")
    if size < 1:
        raise ValueError(f"--size {size} must be at least 1")
    try:
        dataset = reasoning_gym.create_dataset(name, size=size, seed=seed, **settings)
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"reasoning-gym does not make {name} with {dict(settings)}: {error}") from error
    return [row(dataset, index, name, seed, settings) for index in range(size)]


def row(dataset: Any, index: int, name: str, seed: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return one problem. Raises `ValueError` when it could not be graded from a file."""
    entry = dataset[index]
    try:
        kept = json.loads(json.dumps(entry))
    except TypeError as error:
        raise ValueError(f"a problem of {name} cannot be written as JSON ({error}): no file can hold it") from error
    if kept["answer"] is not None and dataset.score_answer(kept["answer"], kept) != 1:
        raise ValueError(
            f"the library's own answer to a problem of {name} scores less than 1 when it is read from a file"
        )
    return {
        "id": f"{name}-{seed}-{index}",
        "question": kept["question"],
        "answer": kept["answer"],
        "source": name,
        "metadata": kept["metadata"],
        "settings": dict(settings),
    }


if __name__ == "__main__":
    sys.exit(main())
