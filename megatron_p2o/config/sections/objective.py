"""Settings of the loss: credit of a rollout, ratio and clip, origin of the log-probs."""

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_p2o.config.ranges import NonNegativeFloat, Range


@dataclass(frozen=True, kw_only=True, slots=True)
class AdvantageConfig:
    """Credit of a rollout against its siblings."""

    estimator: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    """Formula of a rollout's advantage from the rewards of its group. `grpo` divides the difference from the mean by
    the standard deviation, `dr_grpo` does not divide, `rloo` takes the mean of the other rollouts."""
    baseline: Literal["group", "plain_anchored"] = "group"
    """Rewards that a templated group is compared with. `group`: its own. `plain_anchored`: it is joined by as many
    virtual rollouts as it has, at the ledger's running estimate of the problem's plain success rate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """The token loss."""

    context: Literal["sampling", "replace", "importance", "ratio_mask"] = "ratio_mask"
    """Prompts of the loss: x is the plain prompt, c the prompt that was sampled with. `sampling`: old and current
    log-probs on c. `replace`: both on x, without correction. `importance`: old on c, current on x, so that the clip
    holds the true ratio. `ratio_mask`: both on x, weighted by the context ratio (the paper's production setting)."""
    ratio_low: Annotated[float, Range(above=0, at_most=1)] = 0.01
    """Smallest context ratio that `ratio_mask` keeps, inclusive (the paper's)."""
    ratio_high: Annotated[float, Range(at_least=1)] = 10.0
    """Largest context ratio that `ratio_mask` keeps, inclusive (the paper's)."""
    ratio_form: Literal["hard", "soft"] = "hard"
    """Weight of a token whose context ratio rho lies outside the band. `hard`: 0. `soft`: clip(rho) / rho."""
    clip_low: Annotated[float, Range(at_least=0, below=1)] = 0.2
    """PPO's lower clip: policy ratios below 1 minus this bound the loss (the paper's)."""
    clip_high: NonNegativeFloat = 0.2
    """PPO's upper clip: policy ratios above 1 plus this bound the loss (the paper's)."""
    dual_clip: Annotated[float, Range(above=1)] = 3.0
    """Bound on the loss of tokens with negative advantage, in units of -advantage (the paper's)."""
    denominator: Literal["all", "kept"] = "all"
    """Tokens that the loss is divided by. `all`: the response tokens of the mini-batch. `kept`: those of them with a
    non-zero weight and in a rollout with gradient."""
    normalization: Literal["global", "micro_batch"] = "global"
    """Batch over which the loss is a mean. `global`: the mini-batch. `micro_batch`: each micro-batch, as the authors;
    the result then depends on packing. For comparison only."""
    drop_zero_advantage: bool = True
    """Whether rollouts without gradient stay out of the forward pass, which saves time."""
    drop_failed_templated: bool = False
    """Whether failed templated rollouts get no gradient. They shape the baseline either way."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringConfig:
    """Where log-probs come from."""

    recompute: bool = False
    """Whether the trainer computes the log-probs of the sampling context itself. False trusts the engine's and saves a
    forward pass."""
    importance_cap: Annotated[float, Range(at_least=1)] | None = None
    """Cap of the truncated importance weight min(pi_trainer / pi_engine, cap) of each token, under the prompt it was
    sampled with. Needs `scoring.recompute`. None: no weight."""
