"""The P2O token loss and its derivative in the log-prob, on plain tensors (arXiv:2603.21877).

Legend: N tokens, in any order.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal, Required, TypedDict, assert_never

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

MAX_LOG_RATIO = 20.0
"""The policy ratio is exp of the log-prob difference clamped to +-20."""
MAX_CONTEXT_LOG_RATIO = 60.0
"""The same for the context ratio."""

Context = Literal["sampling", "replace", "importance", "ratio_mask"]
RatioForm = Literal["hard", "one_sided", "soft", "fading"]
Surrogate = Literal["ppo", "gspo", "cispo"]
KlEstimator = Literal["k2", "k3"]
OwnSurrogate = Callable[[Tensor, Tensor, Tensor, "LossRule"], Tensor]
"""Takes the policy ratio, the log-probs and the advantages of N tokens, and the rule; returns N losses.

Differentiable by autograd in ratio and log-probs; the loss of a token depends on nothing of another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossRule:
    """How a token's loss follows from its log-probs. Contexts: c is the sampling prompt, x the prompt of the gradient.

    `sampling` (x is c) and `replace` compare with the old log-prob on x, `importance` with the sampling log-prob on c,
    `ratio_mask` compares on x and weighs a templated token by its context ratio rho = exp(old on x - sampling on c).
    """

    context: Context = "ratio_mask"
    surrogate: Surrogate | OwnSurrogate = "ppo"
    """What is made of the policy ratio: `ppo` clips the loss by token, `gspo` by sequence, `cispo` clips the weight of
    the log-prob. README.md has the formulas. Or a function that says so; it runs as torch operations on any device."""
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 3.0
    """Bound on the loss of tokens with negative advantage, in units of -advantage; of `ppo` alone."""
    ratio_low: float = 0.01
    ratio_high: float = 10.0
    """Band of rho, both ends inclusive."""
    ratio_form: RatioForm = "hard"
    """Weight outside the band. `hard`: 0. `one_sided`: 0, but 1 where the advantage is positive. `soft`: clip(rho) /
    rho. `fading`: the smaller of clip(rho) / rho and rho / clip(rho), which is never above 1."""
    importance_cap: float | None = None
    """Where given, a token that is not templated also weighs min(exp(old - sampling), cap): the truncated importance
    weight of a trainer and an engine that differ, under the one prompt they share."""
    kl_coefficient: float = 0.0
    """Factor of the estimate of KL(policy || reference) that is added to a token's loss."""
    kl_estimator: KlEstimator = "k3"
    entropy_coefficient: float = 0.0
    """Factor of the entropy in nats that is taken from a token's loss."""

    @property
    def acts_without_advantage(self) -> bool:
        """Whether a token whose advantage is zero has a loss all the same."""
        return self.kl_coefficient > 0 or self.entropy_coefficient > 0


class LossTokens(TypedDict, total=False):
    """What is known of the T tokens of a pack before their log-probs are computed."""

    advantages_T: Required[Tensor]
    """float32"""
    weights_T: Required[Tensor]
    """float32 factor on the token's loss, 0 outside the loss mask."""
    old_logprobs_T: Tensor | None
    """float32, under the same prompt before the first update; None: this pass provides them."""
    sampling_logprobs_T: Tensor | None
    """float32, under the prompt of sampling; for `importance`, `ratio_mask` and an importance cap."""
    is_templated_T: Tensor | None
    """bool, whether the prompts differ; for `ratio_mask` and an importance cap."""
    reference_logprobs_T: Tensor | None
    """float32, of the reference policy under the same prompt; for the KL term."""
    sequence_T: Tensor | None
    """int64 in [0, num_sequences), ascending: the sequence of each token; for `gspo`."""
    num_sequences: int
    sequence_group: ProcessGroup | None
    """Ranks that hold other tokens of the same sequences (context parallelism); all must call."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenInputs:
    """What the loss of N tokens needs besides the current log-prob."""

    advantages_N: Tensor
    weights_N: Tensor
    """Factor on the loss; 0 outside the loss mask."""
    old_logprobs_N: Tensor | None = None
    """Log-probs the policy ratio is taken against; None: the current ones, so that the ratio is 1."""
    mask_logprobs_N: Tensor | None = None
    """Sampling log-probs on c of a context-ratio weight that is still to be applied; None: there is none."""
    is_templated_N: Tensor | None = None
    """Whether x differs from c: the context ratio of other tokens is 1."""
    log_ratio_N: Tensor | None = None
    """Log of the policy ratio, in the place of log-prob minus old log-prob: of `gspo`, the same over a sequence."""
    reference_logprobs_N: Tensor | None = None
    """Log-probs of the reference policy, if the rule has a KL term."""

    def select(self, rows: Tensor) -> "TokenInputs":
        """Return some tokens."""
        given: dict[str, Tensor | None] = {item.name: getattr(self, item.name) for item in fields(self)}
        return replace(self, **{name: values[rows] for name, values in given.items() if values is not None})


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLosses:
    """The loss of N tokens and what became of them."""

    losses_N: Tensor
    """Weighted."""
    logprob_grad_N: Tensor
    """d losses / d log-prob."""
    weights_N: Tensor
    """After the context ratio."""
    ratio_N: Tensor
    is_clipped_N: Tensor
    """bool: clipping took the gradient away."""


def token_inputs(rule: LossRule, tokens: LossTokens) -> TokenInputs:
    """Choose the log-probs that `rule.context` compares with, and apply the context ratio where it is known already.

    Raises:
        ValueError: the rule needs an input that is None.
    """
    weights_N, old_logprobs_N = tokens["weights_T"], tokens.get("old_logprobs_T")
    sampling_logprobs_N, is_templated_N = tokens.get("sampling_logprobs_T"), tokens.get("is_templated_T")
    reference_logprobs_N = tokens.get("reference_logprobs_T")
    mask_N = None
    if rule.context == "importance":
        old_logprobs_N = _given(sampling_logprobs_N, "sampling_logprobs_T", f"context={rule.context!r}")
    if weighs_by_ratios(rule):
        needed = f"context={rule.context!r}" if rule.context == "ratio_mask" else "importance_cap"
        sampling_N = _given(sampling_logprobs_N, "sampling_logprobs_T", needed)
        templated_N = _given(is_templated_N, "is_templated_T", needed)
        if old_logprobs_N is None:
            mask_N = sampling_N
        else:
            advantages_N = tokens["advantages_T"]
            weights_N = context_weighted(rule, weights_N, old_logprobs_N, sampling_N, templated_N, advantages_N)
    if rule.kl_coefficient > 0:
        reference_logprobs_N = _given(reference_logprobs_N, "reference_logprobs_T", "kl_coefficient > 0")
    return TokenInputs(
        advantages_N=tokens["advantages_T"],
        weights_N=weights_N,
        old_logprobs_N=old_logprobs_N,
        mask_logprobs_N=mask_N,
        is_templated_N=None if mask_N is None else is_templated_N,
        reference_logprobs_N=reference_logprobs_N if rule.kl_coefficient > 0 else None,
    )


def _given(values_N: Tensor | None, name: str, rule: str) -> Tensor:
    if values_N is None:
        raise ValueError(f"{name} is None: {rule} needs it")
    return values_N


def weighs_by_ratios(rule: LossRule) -> bool:
    """Whether a token's weight depends on its log-prob under the prompt of sampling.

    Raises:
        ValueError: an importance cap in a context that compares with the sampling log-probs already.
    """
    match rule.context:
        case "ratio_mask":
            return True
        case "sampling" | "replace":
            return rule.importance_cap is not None
        case "importance":
            if rule.importance_cap is not None:
                raise ValueError("importance_cap: context='importance' has the ratio of trainer and engine in its own")
            return False
        case _:
            assert_never(rule.context)


def context_weighted(
    rule: LossRule,
    weights_N: Tensor,
    old_N: Tensor,
    sampling_N: Tensor,
    is_templated_N: Tensor,
    advantages_N: Tensor,
) -> Tensor:
    """Return the weights times those of the context ratio, in the dtype of `old_N`; 0 stays 0 whatever the ratio is.

    A ratio that is nan makes the weight nan in every form: as a token left out it would pass every check of the loss.
    """
    ratio_N = (old_N - sampling_N).clamp(-MAX_CONTEXT_LOG_RATIO, MAX_CONTEXT_LOG_RATIO).exp()
    ones_N = torch.ones_like(ratio_N)
    of_templated_N = _band_factors(rule, ratio_N, advantages_N) if rule.context == "ratio_mask" else ones_N
    of_plain_N = ones_N if rule.importance_cap is None else ratio_N.clamp(max=rule.importance_cap)
    factor_N = torch.where(is_templated_N, of_templated_N, of_plain_N)
    return torch.where(weights_N != 0, weights_N.to(factor_N.dtype) * factor_N, 0.0)


def _band_factors(rule: LossRule, ratio_N: Tensor, advantages_N: Tensor) -> Tensor:
    """Return the weights of context ratios by `rule.ratio_form`."""
    match rule.ratio_form:
        case "hard" | "one_sided":
            is_dropped_N = (ratio_N < rule.ratio_low) | (ratio_N > rule.ratio_high)
            if rule.ratio_form == "one_sided":
                is_dropped_N = is_dropped_N & ~(advantages_N > 0)
            return torch.where(ratio_N.isnan(), ratio_N, (~is_dropped_N).to(ratio_N.dtype))
        case "soft":
            return ratio_N.clamp(rule.ratio_low, rule.ratio_high) / ratio_N
        case "fading":
            band_N = ratio_N.clamp(rule.ratio_low, rule.ratio_high)
            return torch.minimum(band_N / ratio_N, ratio_N / band_N)
        case _:
            assert_never(rule.ratio_form)


def token_losses_torch(rule: LossRule, logprobs_N: Tensor, tokens: TokenInputs) -> TokenLosses:
    """Return the weighted losses and their derivatives, in the dtype of `logprobs_N`; README.md has the formulas."""
    old_N = logprobs_N if tokens.old_logprobs_N is None else tokens.old_logprobs_N
    weights_N = tokens.weights_N.to(logprobs_N.dtype)
    if tokens.mask_logprobs_N is not None:
        assert tokens.is_templated_N is not None
        masked = tokens.mask_logprobs_N, tokens.is_templated_N, tokens.advantages_N
        weights_N = context_weighted(rule, weights_N, old_N, *masked)
    log_ratio_N = logprobs_N - old_N if tokens.log_ratio_N is None else tokens.log_ratio_N
    ratio_N = log_ratio_N.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    advantages_N = tokens.advantages_N.to(logprobs_N.dtype)
    losses_N, logprob_grad_N, is_clipped_N = _surrogate(rule, logprobs_N, log_ratio_N, ratio_N, advantages_N)
    if rule.kl_coefficient > 0:
        assert tokens.reference_logprobs_N is not None
        penalties_N, penalty_grad_N = kl_penalties(rule.kl_estimator, tokens.reference_logprobs_N - logprobs_N)
        losses_N = losses_N + rule.kl_coefficient * penalties_N
        logprob_grad_N = logprob_grad_N + rule.kl_coefficient * penalty_grad_N
    counts_N = weights_N != 0  # also a weight that is nan, so that it shows in loss and gradient
    return TokenLosses(
        losses_N=torch.where(counts_N, weights_N * losses_N, 0.0),
        logprob_grad_N=torch.where(counts_N, weights_N * logprob_grad_N, 0.0),
        weights_N=weights_N,
        ratio_N=ratio_N,
        is_clipped_N=is_clipped_N,
    )


def _surrogate(
    rule: LossRule, logprobs_N: Tensor, log_ratio_N: Tensor, ratio_N: Tensor, advantages_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of the policy gradient, its derivative in the log-prob, and where the clip acts."""
    if callable(rule.surrogate):
        return own_surrogate(rule.surrogate, rule, logprobs_N, log_ratio_N, advantages_N)
    band_N = ratio_N.clamp(1 - rule.clip_low, 1 + rule.clip_high)
    plain_N, clipped_N = -advantages_N * ratio_N, -advantages_N * band_N
    match rule.surrogate:
        case "cispo":
            return clipped_N * logprobs_N, clipped_N, band_N != ratio_N
        case "ppo" | "gspo":
            losses_N = torch.maximum(plain_N, clipped_N)
            is_clipped_N = clipped_N > plain_N
            if rule.surrogate == "ppo":
                ceiling_N = -rule.dual_clip * advantages_N
                is_capped_N = (advantages_N < 0) & (losses_N > ceiling_N)
                losses_N = torch.where(is_capped_N, ceiling_N, losses_N)
                is_clipped_N = is_clipped_N | is_capped_N
            # Asked so that a log-prob that is nan has a gradient, which then is nan and shows.
            has_gradient_N = ~is_clipped_N & ~(log_ratio_N.abs() > MAX_LOG_RATIO)
            return losses_N, torch.where(has_gradient_N, plain_N, 0.0), is_clipped_N
        case _:
            assert_never(rule.surrogate)


def own_surrogate(
    function: OwnSurrogate, rule: LossRule, logprobs_N: Tensor, log_ratio_N: Tensor, advantages_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a function of the user's makes of the ratio, its derivative in the log-prob, and where there is none.

    Raises:
        ValueError: it returned no loss for each token, or one that does not depend on ratio or log-prob.
    """
    with torch.enable_grad():
        variable_N = logprobs_N.detach().requires_grad_()
        # The ratio may be that of other log-probs: its value is given, its derivative is its own.
        moved_N = log_ratio_N.detach() + (variable_N - logprobs_N.detach())
        ratio_N = moved_N.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        losses_N = function(ratio_N, variable_N, advantages_N, rule)
        if not isinstance(losses_N, Tensor) or losses_N.shape != logprobs_N.shape:  # pyright: ignore[reportUnnecessaryIsInstance]
            shape = tuple(losses_N.shape) if isinstance(losses_N, Tensor) else type(losses_N).__name__
            raise ValueError(f"the surrogate returned {shape}: must be a tensor of {tuple(logprobs_N.shape)} losses")
        if not losses_N.requires_grad:
            raise ValueError("the surrogate returned losses without a gradient: compute them from ratio or logprobs")
        (gradient_N,) = torch.autograd.grad(losses_N.sum(), variable_N)
    return losses_N.detach().to(logprobs_N.dtype), gradient_N, (gradient_N == 0) & (advantages_N != 0)


def kl_penalties(estimator: KlEstimator, difference_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the estimates of KL(policy || reference) in nats, and their derivatives in the policy's log-prob.

    `difference_N` is the reference's log-prob minus the policy's. Beyond `MAX_LOG_RATIO` k3 goes on with the slope that
    it has there, so that the pull never ends.
    """
    match estimator:
        case "k2":
            return difference_N.square() / 2, -difference_N
        case "k3":
            bounded_N = difference_N.clamp(max=MAX_LOG_RATIO)
            excess_N = bounded_N.expm1()
            beyond_N = (difference_N - bounded_N) * (excess_N + 1)
            return excess_N - difference_N + beyond_N, -excess_N
        case _:
            assert_never(estimator)
