"""Every settings file under examples/ loads, and the runs of the paper ask for what the paper says."""

import os
import subprocess
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from megatron_p2o.config.read import dump_config, load_config
from megatron_p2o.config.rules import problems_of
from megatron_p2o.config.tree import Config
from megatron_p2o.machine.layout import with_layout

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = sorted(path for path in EXAMPLES.rglob("*.yaml") if path.parent.name != "kubernetes")

PAPER: dict[str, Any] = {
    "model.enable_thinking": False,
    "data.max_prompt_tokens": 4096,
    "rollout.group_size": 6,
    "rollout.temperature": 0.6,
    "rollout.top_p": 1.0,
    "rollout.max_new_tokens": 12288,
    "rollout.tensor_parallel": 1,
    "hard.max_solved": 1,
    "hard.counted": "all",
    "hard.min_problems": 100,
    "assignment.num_plain": 0,
    "advantage.estimator": "grpo",
    "advantage.baseline": "group",
    "objective.context": "ratio_mask",
    "objective.ratio_low": 0.01,
    "objective.ratio_high": 10.0,
    "objective.ratio_form": "hard",
    "objective.clip_low": 0.2,
    "objective.clip_high": 0.2,
    "objective.dual_clip": 3.0,
    "optimizer.lr": 1e-6,
    "optimizer.beta1": 0.9,
    "optimizer.beta2": 0.999,
    "optimizer.weight_decay": 0.01,
    "optimizer.clip_grad": 1.0,
    "optimizer.micro_batch_tokens": 16384,
    "schedule.problems_per_step": 128,
    "schedule.problems_per_update": 64,
    "schedule.epochs": 10,
    "evolution.enabled": True,
    "evolution.rules": "reference",
    "evolution.budget": 72,
    "evolution.dev_size": 300,
    "evolution.num_lineages": 16,
    "evolution.minibatch_size": 3,
    "evolution.trial_temperature": 0.0,
    "evolution.reflection.backend": "openai",
    "evolution.reflection.temperature": 0.6,
    "evolution.reflection.max_tokens": 2048,
    "evaluation.every_steps": 30,
    "evaluation.num_samples": None,
    "evaluation.temperature": None,
    "evaluation.best_set": "heldout",
    "evaluation.at_start": True,
}
"""arXiv:2603.21877 and the authors' scripts, by setting."""


def settings(name: str) -> Config:
    return load_config(EXAMPLES / f"{name}.yaml")


def differences(one: Config, other: Config) -> dict[str, Any]:
    """Return what differs, by section and field, without the run's name."""
    return {
        f"{section}.{field}": getattr(getattr(other, section), field)
        for section in Config.__dataclass_fields__
        for field in getattr(getattr(one, section), "__dataclass_fields__", ())
        if getattr(getattr(one, section), field) != getattr(getattr(other, section), field) and section != "run"
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_example_loads_without_problems(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert problems_of(config) == []
    resolved = tmp_path / "config.yaml"
    resolved.write_text(dump_config(config))
    assert load_config(resolved) == config


def test_a_run_is_called_after_its_file() -> None:
    names = {path.stem: load_config(path).run.name for path in FILES if path.stem != "base"}
    assert all(stem == name for stem, name in names.items())


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_job_script_is_called_after_its_settings(path: Path) -> None:
    script = path.with_suffix(".sh").read_text()
    assert f"#SBATCH --job-name={path.stem}\n" in script
    assert f"examples/{path.stem}.yaml" in script


@pytest.mark.parametrize("setting", PAPER)
def test_the_paper_run_has_the_papers_setting(setting: str) -> None:
    assert attrgetter(setting)(settings("p2o_qwen3_4b")) == PAPER[setting]


def test_warm_up_is_nineteen_rollout_steps() -> None:
    config = settings("p2o_qwen3_4b")
    num_updates = config.schedule.problems_per_step // config.schedule.problems_per_update
    assert config.optimizer.warmup_steps == 19 * num_updates


def test_the_baselines_differ_from_p2o_in_nothing_else() -> None:
    p2o, grpo, grpo_n12 = (settings(name) for name in ("p2o_qwen3_4b", "grpo_qwen3_4b", "grpo_qwen3_4b_n12"))
    (difference,) = differences(p2o, grpo)
    assert difference == "evolution.enabled" and not grpo.evolution.enabled
    assert differences(grpo, grpo_n12) == {"rollout.group_size": 12}


@pytest.mark.parametrize(
    "name", ["code/code", "palindrome/palindrome", "partial_credit/partial_credit", "reasoning_gym/reasoning_gym"]
)
def test_the_baseline_of_a_task_differs_from_p2o_in_nothing_else(name: str) -> None:
    p2o, grpo = settings(f"tasks/{name}_p2o"), settings(f"tasks/{name}_grpo")
    assert differences(p2o, grpo) == {"evolution.enabled": False}


def test_self_reflection_leaves_a_gpu_to_its_server() -> None:
    config = settings("p2o_qwen3_4b_selfref")
    assert config.evolution.reflection.backend == "self"
    assert (config.rollout.num_engines + 1) * config.rollout.tensor_parallel == 8
    assert with_layout(config, num_nodes=1, gpus_per_node=8).parallel.data == 8


def test_the_large_run_and_its_engines_fill_four_nodes() -> None:
    config = settings("p2o_qwen3_32b")
    assert with_layout(config, num_nodes=4, gpus_per_node=8).parallel.data == 2, "a replica on two nodes"
    assert config.parallel.tensor <= 8, "tensor parallelism stays within a node"
    assert config.rollout.num_engines * config.rollout.tensor_parallel == 4 * 8


@pytest.mark.parametrize(
    ("name", "num_nodes", "num_idle"),
    [
        *(
            (name, num_nodes, 0)
            for name in ("p2o_qwen3_4b", "grpo_qwen3_4b", "grpo_qwen3_4b_n12")
            for num_nodes in (1, 2)
        ),
        *(("p2o_qwen3_32b", num_nodes, 0) for num_nodes in (2, 4, 8)),
        *(("p2o_qwen3_4b_selfref", num_nodes, num_nodes) for num_nodes in (1, 2)),
    ],
)
def test_on_any_number_of_nodes_every_gpu_has_a_trainer_rank_and_an_engine_rank(
    name: str, num_nodes: int, num_idle: int, tmp_path: Path
) -> None:
    launcher = tmp_path / "examples" / "slurm" / "launch.sh"
    launcher.parent.mkdir(parents=True)
    launcher.write_text('printf "%s\\n" "$@"')
    told = {
        "SLURM_JOB_NUM_NODES": str(num_nodes),
        "P2O_REFLECTION_URL": "http://host/v1",
        "P2O_REFLECTION_API_KEY": "key",
    }
    outcome = subprocess.run(
        ["bash", EXAMPLES / f"{name}.sh"],
        cwd=tmp_path,
        env=os.environ | told,
        check=True,
        capture_output=True,
        text=True,
    )
    settings_file, *options = outcome.stdout.split()
    assert set(options[::2]) == {"--set"}
    config = load_config(EXAMPLES.parent / settings_file, options[1::2])
    assert with_layout(config, num_nodes, gpus_per_node=8).parallel.world_size == 8 * num_nodes
    assert config.rollout.num_engines * config.rollout.tensor_parallel == 8 * num_nodes - num_idle
