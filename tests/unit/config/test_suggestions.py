"""What is missing is named with the command that makes it."""

import re
from pathlib import Path

import pytest

from megatron_p2o.config.suggestions import WRITERS, model_command, problems_command

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("models/Qwen3-4B", "download it: hf download Qwen/Qwen3-4B --local-dir models/Qwen3-4B"),
        ("/m/Qwen2.5-0.5B/", "download it: hf download Qwen/Qwen2.5-0.5B --local-dir /m/Qwen2.5-0.5B/"),
        (
            "models/SmolLM2-135M-Instruct",
            "fetch it: python tools/fetch_smollm2.py --out models/SmolLM2-135M-Instruct",
        ),
        ("runs/tiny/model", "write the tiny policy: python -m megatron_p2o.tiny.policy --out runs/tiny"),
        (
            "runs/tiny-seed3/model",
            "write the tiny policy: python -m megatron_p2o.tiny.policy --seed 3 --out runs/tiny-seed3",
        ),
        (
            "runs/tiny_leaning/model",
            "write the tiny policy: python -m megatron_p2o.tiny.policy --regime leaning --out runs/tiny_leaning",
        ),
        (
            "runs/tasks/code/model",
            "write the tiny policy: python examples/tasks/code/prepare.py --out runs/tasks/code",
        ),
        *(
            (path, f"download a model by its name on Hugging Face: hf download ORG/NAME --local-dir {path}")
            for path in ("models/SmolLM2-360M", "mine/model", "models/Llama-3.2-1B", ".")
        ),
    ],
)
def test_a_model_that_is_not_there_is_named_with_the_command_that_brings_it(path: str, command: str) -> None:
    assert model_command(path) == command


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("data/deepmath.jsonl", "make the paper's problems: python tools/prepare_data.py (docs/data.md)"),
        ("runs/tiny/problems/train.jsonl", "write it: python -m megatron_p2o.tiny.policy --out runs/tiny"),
        (
            "runs/tasks/reasoning_gym/gcd.jsonl",
            "write it: python examples/tasks/reasoning_gym/prepare.py --out runs/tasks/reasoning_gym",
        ),
        ("data/mine.parquet", ""),
        ("problems.jsonl", ""),
    ],
)
def test_a_file_of_problems_is_named_with_the_command_that_makes_it(file: str, command: str) -> None:
    assert problems_command(file) == command


def test_the_commands_are_those_of_the_tree() -> None:
    # Read, not imported: these tests also run where there is no torch.
    (regimes,) = re.findall(r"Regime = .*", (ROOT / "megatron_p2o/tiny/regimes.py").read_text("utf-8"))
    for pattern, command in WRITERS.items():
        tasks = re.findall(r"\?P<task>([\w|]+)\)", pattern)
        for task in tasks[0].split("|") if tasks else ():
            assert (ROOT / command.removeprefix("python ").format(task=task)).is_file()
        regime = re.search(r"--regime (\w+)", command)
        assert regime is None or f'"{regime[1]}"' in regimes
    named = {path for path in ROOT.glob("examples/**/*.yaml") if re.search(r"path: runs/", path.read_text("utf-8"))}
    assert len(named) >= 5
    for path in named:
        (model,) = re.findall(r"path: (runs/\S+)", path.read_text("utf-8"))
        assert "hf download" not in model_command(model), path
