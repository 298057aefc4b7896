"""docs/papers.md: every block of settings can be run and says what its paper says."""

import re
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_p2o.config.read import load_config
from megatron_p2o.config.rules import problems_of
from megatron_p2o.config.tree import Config
from megatron_p2o.rl.objective import loss_rule
from megatron_p2o.rl.surrogate import surrogate_named

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^### (.*?) \(arXiv:[\d.]+\)\n\n```yaml\n(.*?)```$", PAGE, flags=re.MULTILINE | re.DOTALL))

PLAIN = {"evolution.enabled": False, "data.hints_field": None}
HINTS = {"evolution.enabled": False, "data.hints_field": "hints"}
P2O = {"evolution.searches": True, "rollout.group_size": 6}

PAPERS: dict[str, dict[str, Any]] = {
    # Mean over tokens inside the mean over outputs, k3 at 0.04, one update per batch of samples.
    "GRPO": PLAIN
    | {
        "objective.surrogate": "ppo",
        "objective.normalization": "sequence_mean",
        "objective.kl_coefficient": 0.04,
        "objective.kl_estimator": "k3",
        "objective.kl_as": "loss",
        "schedule.updates_per_step": 1,
    },
    # Neither the standard deviation nor the length divides; no KL.
    "Dr. GRPO": PLAIN
    | {
        "advantage.estimator": "dr_grpo",
        "objective.normalization": "sequence_sum",
        "objective.kl_coefficient": 0.0,
    },
    # REINFORCE on whole responses, KL in the reward.
    "RLOO": PLAIN
    | {
        "advantage.estimator": "rloo",
        "objective.normalization": "sequence_sum",
        "objective.kl_coefficient": 0.03,
        "objective.kl_estimator": "k1",
        "objective.kl_as": "reward",
        "schedule.updates_per_step": 1,
    },
    # Clip higher, token mean, dynamic sampling, L_cache 4096, no KL.
    "DAPO": PLAIN
    | {
        "objective.clip_low": 0.2,
        "objective.clip_high": 0.28,
        "objective.normalization": "token_mean",
        "objective.kl_coefficient": 0.0,
        "advantage.overlong_tokens": 4096,
        "schedule.max_batches_per_step": 8,
    },
    # Section 5.1, four mini-batches.
    "GSPO": PLAIN
    | {
        "objective.surrogate": "gspo",
        "objective.clip_low": 3e-4,
        "objective.clip_high": 4e-4,
        "objective.normalization": "sequence_mean",
        "schedule.updates_per_step": 4,
    },
    # No lower bound, only the upper one is tuned; token mean.
    "CISPO": PLAIN
    | {
        "objective.surrogate": "cispo",
        "objective.clip_low": 1.0,
        "objective.clip_high": 3.0,
        "objective.normalization": "token_mean",
        "schedule.updates_per_step": 4,
    },
    "P2O": P2O
    | {
        "objective.context": "ratio_mask",
        "objective.ratio_form": "hard",
        "objective.ratio_low": 0.01,
        "objective.ratio_high": 10.0,
        "assignment.num_plain": 0,
        "evolution.rules": "reference",
    },
    "Distillation from a teacher": PLAIN
    | {
        "data.demonstrations_field": "demonstrations",
        "rollout.group_size": 2,
        "assignment.num_plain": 0,
        "objective.surrogate": "clone",
        "schedule.max_batches_per_step": 1,
    },
    "P2O without context distillation": P2O | {"objective.context": "sampling", "preset": "reference"},
    "P2O's single-turn reflection": P2O | {"evolution.rules": "single_turn", "preset": "reference"},
    "GEPA": {"evolution.searches": True, "optimizer.lr": 0.0},
    "PrAg-PO": {"evolution.enabled": True, "evolution.searches": False, "objective.context": "sampling"},
    "SAGE": HINTS | {"objective.context": "sampling", "assignment.num_plain": 0},
    "Scaf-GRPO": HINTS | {"objective.context": "sampling"},
    "NuRL": HINTS | {"hard.max_solved": 0},
    "Guide": HINTS | {"hard.max_solved": 0, "objective.context": "importance"},
    "DAHS and BHA": HINTS | {"assignment.num_plain": 3},
    "OPCD": P2O | {"objective.context": "distill", "objective.distill_beta": 1.0},
    "SDPO": HINTS | {"objective.context": "distill"},
    "HiLL": P2O | {"assignment.weight": "transfer"},
}


def loaded(paper: str, folder: Path) -> Config:
    """Return the settings of a block; its `base` is told from the root of the repository."""
    settings = yaml.safe_load(BLOCKS[paper])
    file = folder / "paper.yaml"
    file.write_text(yaml.safe_dump(settings | {"base": str(ROOT / settings["base"])}))
    return load_config(file)


def test_every_paper_has_a_block_and_every_block_a_claim() -> None:
    assert BLOCKS.keys() == PAPERS.keys() and PAGE.count("```yaml") == len(BLOCKS)


@pytest.mark.parametrize("paper", PAPERS)
def test_a_block_loads_and_says_what_its_paper_says(paper: str, tmp_path: Path) -> None:
    config, claimed = loaded(paper, tmp_path), PAPERS[paper]
    assert problems_of(config) == []
    assert loss_rule(config.objective).surrogate == surrogate_named(config.objective.surrogate)
    assert {name: attrgetter(name)(config) for name in claimed} == claimed
    if not config.evolution.enabled and config.data.hints_field is None:
        assert config.advantage.estimator == claimed.get("advantage.estimator", "grpo")
        parts = (config.advantage.overlong_tokens, config.schedule.max_batches_per_step)
        assert parts == ((4096, 8) if paper == "DAPO" else (None, 1))
