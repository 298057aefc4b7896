"""The commands of docs/reproduction.md, run with a stand-in for sbatch: they load the settings of their cells."""

import re
import subprocess
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from megatron_p2o.config.read import load_config
from megatron_p2o.config.tree import Config
from megatron_p2o.machine.layout import with_layout

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
ENDPOINT = "https://host/v1"

SCALER_5K, MATH_5K, SCALER_10K, MATH_10K = "deepscaler-5k", "deepmath-5k", "deepscaler-10k", "deepmath-10k"
GRPO = {"evolution.enabled": False, "rollout.group_size": 6}
GRPO_12 = {"evolution.enabled": False, "rollout.group_size": 12}
SELF = {"evolution.enabled": True, "rollout.group_size": 6, "evolution.reflection.backend": "self"}
TEACHER = SELF | {"evolution.reflection.backend": "openai", "evolution.reflection.model": "Kimi-K2-Instruct-0905"}

CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo-scaler-5k": (SCALER_5K, GRPO),
    "grpo-math-5k": (MATH_5K, GRPO),
    "grpo-scaler-10k": (SCALER_10K, GRPO),
    "grpo-math-10k": (MATH_10K, GRPO),
    "grpo12-scaler-5k": (SCALER_5K, GRPO_12),
    "grpo12-math-5k": (MATH_5K, GRPO_12),
    # Version 3 isolates dynamic sampling: no clip-higher, no penalty for over-long answers, the loss of the other arms.
    "dapo-math-5k": (
        MATH_5K,
        GRPO
        | {"schedule.max_batches_per_step": 8, "objective.clip_high": 0.2, "advantage.overlong_tokens": None}
        | {"objective.normalization": "micro_batch_mean"},
    ),
    "selfref-scaler-5k": (SCALER_5K, SELF),
    "selfref-math-5k": (MATH_5K, SELF),
    "selfref-scaler-10k": (SCALER_10K, SELF),
    "selfref-math-10k": (MATH_10K, SELF),
    "teacher-scaler-5k": (SCALER_5K, TEACHER),
    "teacher-math-5k": (MATH_5K, TEACHER),
    "teacher-scaler-10k": (SCALER_10K, TEACHER),
    "teacher-math-10k": (MATH_10K, TEACHER),
    "no-distillation": (SCALER_5K, TEACHER | {"objective.context": "sampling"}),
    "same-template": (SCALER_5K, TEACHER | {"assignment.same_template_in_group": True}),
    # The paper's tau counts a problem as hard below tau correct rollouts.
    "tau-1": (MATH_5K, SELF | {"hard.max_solved": 0}),
    "tau-4": (MATH_5K, SELF | {"hard.max_solved": 3}),
    "single-turn": (MATH_5K, SELF | {"evolution.rules": "single_turn"}),
    "distillation": (
        MATH_5K,
        GRPO
        | {
            "rollout.group_size": 2,
            "rollout.temperature": 1.0,
            "assignment.num_plain": 0,
            "objective.surrogate": "clone",
        }
        | {"data.demonstrations_field": "demonstrations", "objective.context": "replace"},
    ),
}
"""Job name to its data and to what its row of the paper's tables claims."""


@pytest.fixture(scope="module")
def jobs() -> dict[str, Config]:
    """Run the page's commands; return each job's settings as its script hands them to the launcher."""
    (block,) = (code for code in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) if "sbatch" in code)
    stand_in = """
        sbatch() {
            local name="${1#--job-name=}" script="$2"
            shift 2
            printf 'JOB %s\\n' "$name"
            # The script's last command starts the launcher: print what it would be given instead.
            (
                exec() { shift 2; printf '%s\\n' "$@"; }
                SLURM_JOB_NUM_NODES=1
                source "$script"
            )
        }
    """
    done = subprocess.run(
        ["bash", "-euc", stand_in + block], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    )
    jobs: dict[str, Config] = {}
    for text in done.stdout.split("JOB ")[1:]:
        name, config, *arguments = text.splitlines()
        assert arguments[::2] == ["--set"] * (len(arguments) // 2), arguments
        assert name not in jobs, "two jobs of one name are one run"
        jobs[name] = load_config(ROOT / config, arguments[1::2])
    return jobs


def test_page_has_exactly_one_command_per_cell(jobs: dict[str, Config]) -> None:
    assert jobs.keys() == CELLS.keys()


@pytest.mark.parametrize("name", CELLS)
def test_command_says_what_its_cell_claims(name: str, jobs: dict[str, Config]) -> None:
    files, claimed = CELLS[name]
    config = jobs[name]
    assert {setting: attrgetter(setting)(config) for setting in claimed} == claimed
    train = "demonstrations" if config.data.demonstrations_field else "train"
    assert config.data.train["train"].file == f"data/{files}/{train}.jsonl"
    assert {name: given.file for name, given in config.data.evaluation.items()} == {
        "heldout": f"data/{files}/test.jsonl"
    }
    assert (config.preset, config.schedule.epochs) == ("reference", 10)
    assert with_layout(config, num_nodes=1, gpus_per_node=8).parallel.data == 8
    num_problems = 10_000 if files.endswith("10k") else 5_000
    # 5 % of the authors' steps, which count 9 evolution rounds, in whole rollout steps of two updates.
    num_steps = num_problems // 128 * 10 + 9
    assert config.optimizer.warmup_steps == 2 * int(0.05 * num_steps)
    is_teacher = claimed.get("evolution.reflection.backend") == "openai"
    assert (config.evolution.reflection.base_url == ENDPOINT) == is_teacher or not config.evolution.enabled


def test_every_file_the_page_needs_is_made_by_a_command_of_the_data_page(jobs: dict[str, Config]) -> None:
    data_page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    folders = {str(Path(config.data.train["train"].file).parent) for config in jobs.values()}
    assert folders == {*re.findall(r"prepare_data\.py deep\w+ .*--out (\S+)", data_page)}
    sets = {*re.findall(r"--benchmark \w+=(data/eval/\w+)\.jsonl", PAGE)}
    assert sets == {f"data/eval/{name}" for name in re.findall(r"(\w+)=downloads/", data_page)}
