"""Settings of the loss: credit of a rollout, ratio and clip, origin of the log-probs."""

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_p2o.config.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Range

ObjectiveContext = Literal["sampling", "replace", "importance", "ratio_mask", "distill"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdvantageConfig:
    """Credit of a rollout against its siblings."""

    estimator: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    """Formula of a rollout's advantage from the rewards of its group. `grpo` divides the difference from the mean by
    the standard deviation, `dr_grpo` does not divide, `rloo` takes the mean of the other rollouts."""
    baseline: Literal["group", "plain_anchored"] = "group"
    """Rewards that a templated group is compared with. `group`: its own. `plain_anchored`: it is joined by as many
    virtual rollouts as it has, at the ledger's running estimate of the problem's plain success rate."""
    overlong_tokens: PositiveInt | None = None
    """Last tokens before `rollout.max_new_tokens` over which the reward falls in a straight line by 1 in all (DAPO's
    soft overlong punishment, arXiv:2503.14476, eq. 13). Grades, ledger and metrics see the reward without it. None: it
    does not fall."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """The token loss."""

    context: ObjectiveContext = "ratio_mask"
    """Prompts of the loss: x is the plain prompt, c the prompt that was sampled with. `sampling`: old and current
    log-probs on c. `replace`: both on x, without correction. `importance`: old on c, current on x, so that the clip
    holds the true ratio. `ratio_mask`: both on x, weighted by the context ratio, as `objective.ratio_form` says (with
    `hard` the paper's production setting).
    `distill`: all of it on x, sampling too; the template adds to the advantage of each token by how much more likely it
    makes it (on-policy context distillation, arXiv:2602.12275)."""
    distill_beta: PositiveFloat = 1.0
    """Factor by which `distill` adds log pi(y|x,z) - log pi(y|x) of a token, in nats, to its advantage."""
    ratio_low: Annotated[float, Range(above=0, at_most=1)] = 0.01
    """Smallest context ratio that `ratio_mask` keeps, inclusive (the paper's)."""
    ratio_high: Annotated[float, Range(at_least=1)] = 10.0
    """Largest context ratio that `ratio_mask` keeps, inclusive (the paper's)."""
    ratio_widening: PositiveFloat = 1.0
    """Factor by which the band of `ratio_mask` is wider at the first optimizer step: it begins at
    `objective.ratio_low` / this and `objective.ratio_high` times this. Above 1 the mask closes, below 1 it opens."""
    ratio_anneal_steps: NonNegativeInt = 0
    """Optimizer steps over which `objective.ratio_widening` goes to 1, by equal factors. 0: the band is always the
    same."""
    ratio_form: Literal["hard", "one_sided", "soft", "fading"] = "one_sided"
    """Weight of a token whose context ratio rho lies outside the band. `one_sided`: 0 in responses whose advantage is
    not positive; those with a positive one keep every token. `hard`: 0 (the paper's), which can drop all that templates
    teach (docs/hard_problems.md). `soft`: clip(rho) / rho (the authors' option), which is above 1 below the band.
    `fading`: rho / `objective.ratio_low` below the band, `objective.ratio_high` / rho above it. No weight at all is
    `objective.context: replace`."""
    surrogate: str = "ppo"
    """Loss made of the policy ratio. `ppo`: clipped token by token (arXiv:1707.06347; the paper's). `gspo`: one ratio
    for a whole response, the geometric mean over its tokens, and one clip (arXiv:2507.18071). `cispo`: the log-prob
    weighted by the clipped ratio, so that every token keeps a gradient (arXiv:2506.13585). `clone`: minus the log-prob
    of each response that solves its problem, and nothing of any other (rejection sampling and behavioural cloning;
    advantages do not count). The policy under its templates or hints is then a teacher of the plain one. Or one's own,
    `package.module:callable` or `path/to/file.py:callable`, called as (ratio, logprobs, advantages, rule)."""
    clip_low: Annotated[float, Range(at_least=0, at_most=1)] = 0.2
    """Lower clip: policy ratios below 1 minus this bound the loss (the paper's). 1: no lower clip. GSPO's is 0.0003."""
    clip_high: NonNegativeFloat = 0.2
    """Upper clip: policy ratios above 1 plus this bound the loss (the paper's). GSPO's is 0.0004."""
    dual_clip: Annotated[float, Range(above=1)] = 3.0
    """Bound on the loss of tokens with negative advantage, in units of -advantage (the paper's). For `ppo` alone."""
    normalization: Literal["token_mean", "kept_token_mean", "sequence_mean", "sequence_sum", "micro_batch_mean"] = (
        "token_mean"
    )
    """Mean that the loss is. `token_mean`: over the response tokens of the mini-batch (DAPO, arXiv:2503.14476).
    `kept_token_mean`: over those of them with a non-zero weight and in a rollout with gradient. `sequence_mean`: over
    the rollouts, each the mean of its tokens (GRPO, arXiv:2402.03300). `sequence_sum`: over the rollouts, each the sum
    of its tokens divided by `rollout.max_new_tokens` (Dr. GRPO, arXiv:2503.20783). `micro_batch_mean`: over the tokens
    of each micro-batch, as the authors; the result then depends on packing, for comparison only."""
    entropy_coefficient: NonNegativeFloat = 0.0
    """Factor of the mean entropy, in nats per token, that is taken from the loss (arXiv:1602.01783)."""
    kl_coefficient: NonNegativeFloat = 0.0
    """Factor of the KL divergence from the initial policy, estimated under the prompt of the gradient. Above 0 each
    rank keeps its part of the weights of `model.path`, as it is when the run starts or resumes, in host memory; they
    change places with the policy's for a forward pass per step."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimate of the divergence from one token, d being log-prob of the initial policy minus the policy's
    (http://joschu.net/blog/kl-approx.html). `k1`: -d. `k2`: d^2 / 2. `k3`: exp(d) - 1 - d (GRPO's)."""
    kl_as: Literal["loss", "reward"] = "loss"
    """Place of the KL term. `loss`: added to each token's loss (GRPO; `k2` and `k3`). `reward`: summed over a response
    and taken from its reward before the advantage (arXiv:2009.01325; `k1` is unbiased there, arXiv:2510.01555)."""
    drop_zero_advantage: bool = True
    """Whether rollouts without gradient stay out of the forward pass, which saves time. They always take part where an
    entropy or KL term acts on them."""
    drop_failed_templated: bool = False
    """Whether templated rollouts that did not solve their problem (`hard.solved_at`) get no gradient. They shape the
    baseline either way."""
    drop_truncated: bool = False
    """Whether rollouts that `rollout.max_new_tokens` cut off get no gradient (DAPO's overlong filtering,
    arXiv:2503.14476). They shape the baseline either way."""

    def band_at(self, num_updates: int) -> tuple[float, float]:
        """Return the ends of the band of `ratio_mask` in an optimizer step that follows `num_updates` others."""
        left = max(0.0, 1 - num_updates / self.ratio_anneal_steps) if self.ratio_anneal_steps else 0.0
        widening = self.ratio_widening**left
        return self.ratio_low / widening, self.ratio_high * widening


@dataclass(frozen=True, kw_only=True, slots=True)
class LogprobsConfig:
    """Where log-probs come from."""

    recompute: bool = False
    """Whether the trainer computes the log-probs of the sampling context itself. False trusts the engine's and saves a
    forward pass."""
    importance_cap: Annotated[float, Range(at_least=1)] | None = None
    """Cap of the truncated importance weight min(pi_trainer / pi_engine, cap) of each token, under the prompt it was
    sampled with. Without `logprobs.recompute` plain rollouts are weighted in the training pass itself, and only
    templated ones need a forward pass of the trainer under their template. None: no weight."""
