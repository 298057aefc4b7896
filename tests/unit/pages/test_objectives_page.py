"""The table of papers in docs/objectives.md: every row can be run and says what its paper says."""

import re
from pathlib import Path
from typing import Any

import pytest

from megatron_p2o.config.read import load_config
from megatron_p2o.config.rules import problems_of
from megatron_p2o.rl.objective import loss_rule

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| ([^|]+) \(arXiv:[\d.]+\) \| (`.*`) \|$", PAGE, flags=re.MULTILINE))

PAPERS: dict[str, dict[str, Any]] = {
    # GRPO: mean over tokens inside the mean over outputs, k3 at 0.04, one update per batch of samples.
    "GRPO": {"surrogate": "ppo", "normalization": "sequence_mean", "kl": (0.04, "k3", "loss"), "num_updates": 1},
    # Dr. GRPO: neither the standard deviation nor the length divides; no KL.
    "Dr. GRPO": {"surrogate": "ppo", "normalization": "sequence_sum", "kl": (0.0, "k3", "loss"), "num_updates": 2},
    # RLOO: REINFORCE on whole responses, KL in the reward.
    "RLOO": {"surrogate": "ppo", "normalization": "sequence_sum", "kl": (0.03, "k1", "reward"), "num_updates": 1},
    # DAPO: clip higher, token mean, dynamic sampling, L_cache 4096.
    "DAPO": {"surrogate": "ppo", "normalization": "token_mean", "kl": (0.0, "k3", "loss"), "clips": (0.2, 0.28)},
    # GSPO: section 5.1, four mini-batches.
    "GSPO": {"surrogate": "gspo", "normalization": "sequence_mean", "clips": (3e-4, 4e-4), "num_updates": 4},
    # CISPO: no lower bound, only the upper one is tuned; token mean.
    "CISPO": {"surrogate": "cispo", "normalization": "token_mean", "clips": (1.0, 3.0), "num_updates": 4},
}
ESTIMATORS = {"Dr. GRPO": "dr_grpo", "RLOO": "rloo"}


def test_every_paper_has_a_row() -> None:
    assert ROWS.keys() == PAPERS.keys()


@pytest.mark.parametrize("paper", PAPERS)
def test_a_row_loads_and_is_the_papers_objective(paper: str) -> None:
    config = load_config(ROOT / "examples" / "grpo_qwen3_4b.yaml", re.findall(r"`([^`]+)`", ROWS[paper]))
    assert problems_of(config) == []
    objective, claimed = config.objective, PAPERS[paper]
    found = {
        "surrogate": loss_rule(objective).surrogate,
        "normalization": objective.normalization,
        "kl": (objective.kl_coefficient, objective.kl_estimator, objective.kl_as),
        "clips": (objective.clip_low, objective.clip_high),
        "num_updates": config.schedule.updates_per_step,
    }
    assert {name: found[name] for name in claimed} == claimed
    assert config.advantage.estimator == ESTIMATORS.get(paper, "grpo")
    assert (config.advantage.overlong_tokens, config.schedule.max_batches_per_step) == (
        (4096, 8) if paper == "DAPO" else (None, 1)
    )
