"""Triton kernel of the P2O token loss: one launch instead of some twenty over a chunk of tokens."""

import triton
import triton.language as tl


@triton.jit
def _clamp(values, low, high):
    """Like torch.clamp: nan stays nan, which the hardware's minimum and maximum would drop."""
    nan: tl.constexpr = tl.PropagateNan.ALL
    return tl.minimum(tl.maximum(values, low, propagate_nan=nan), high, propagate_nan=nan)


@triton.jit
def _expm1(values):
    """exp(values) - 1: by its series where the difference would cancel."""
    series = values * (1.0 + values * (0.5 + values * (0.16666667 + values * 0.041666667)))
    return tl.where(tl.abs(values) < 0.03, series, tl.exp(values) - 1.0)


@triton.jit
def token_losses_kernel(
    logprobs_ptr, advantages_ptr, weights_ptr, old_ptr, sampling_ptr, is_templated_ptr, log_ratio_ptr, reference_ptr,
    losses_ptr, logprob_grad_ptr, token_weights_ptr, ratio_ptr, is_clipped_ptr,
    num_tokens, clip_low, clip_high, dual_clip, ratio_low, ratio_high, importance_cap, kl_coefficient,
    max_log_ratio, max_context_log_ratio,
    HAS_OLD: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LOG_RATIO: tl.constexpr, SOFT: tl.constexpr,
    FADING: tl.constexpr, ONE_SIDED: tl.constexpr, HAS_BAND: tl.constexpr, HAS_CAP: tl.constexpr,
    CISPO: tl.constexpr, DUAL_CLIP: tl.constexpr, K2: tl.constexpr, K3: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (token blocks,). `token_loss.token_losses_torch`, term by term."""
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < num_tokens
    logprob = tl.load(logprobs_ptr + tokens, mask=inside, other=0.0)
    advantage = tl.load(advantages_ptr + tokens, mask=inside, other=0.0)
    weight = tl.load(weights_ptr + tokens, mask=inside, other=0.0)
    old = logprob
    if HAS_OLD:
        old = tl.load(old_ptr + tokens, mask=inside, other=0.0)
    if HAS_MASK:
        is_templated = tl.load(is_templated_ptr + tokens, mask=inside, other=0) != 0
        sampling = tl.load(sampling_ptr + tokens, mask=inside, other=0.0)
        context_ratio = tl.exp(_clamp(old - sampling, -max_context_log_ratio, max_context_log_ratio))
        band = _clamp(context_ratio, ratio_low, ratio_high)
        if SOFT:
            factor = band / context_ratio
        elif FADING:
            nan: tl.constexpr = tl.PropagateNan.ALL
            factor = tl.minimum(band / context_ratio, context_ratio / band, propagate_nan=nan)
        else:
            is_dropped = (context_ratio < ratio_low) | (context_ratio > ratio_high)
            if ONE_SIDED:
                is_dropped = is_dropped & ((advantage > 0.0) == 0)
            factor = tl.where(is_dropped, 0.0, 1.0)
            factor = tl.where(context_ratio == context_ratio, factor, context_ratio)  # nan
        if not HAS_BAND:
            factor = 1.0
        of_plain = 1.0
        if HAS_CAP:
            of_plain = tl.minimum(context_ratio, importance_cap, propagate_nan=tl.PropagateNan.ALL)
        factor = tl.where(is_templated, factor, of_plain)
        weight = tl.where(weight != 0.0, weight * factor, 0.0)
    log_ratio = logprob - old
    if HAS_LOG_RATIO:
        log_ratio = tl.load(log_ratio_ptr + tokens, mask=inside, other=0.0)
    ratio = tl.exp(_clamp(log_ratio, -max_log_ratio, max_log_ratio))
    band = _clamp(ratio, 1.0 - clip_low, 1.0 + clip_high)
    plain = -advantage * ratio
    clipped = -advantage * band
    if CISPO:
        loss = clipped * logprob
        gradient = clipped
        is_clipped = band != ratio
    else:
        loss = tl.maximum(plain, clipped, propagate_nan=tl.PropagateNan.ALL)
        is_clipped = clipped > plain
        if DUAL_CLIP:
            ceiling = -dual_clip * advantage
            is_capped = (advantage < 0.0) & (loss > ceiling)
            loss = tl.where(is_capped, ceiling, loss)
            is_clipped = is_clipped | is_capped
        is_far = tl.abs(log_ratio) > max_log_ratio
        gradient = tl.where((is_clipped == 0) & (is_far == 0), plain, 0.0)
    if K2 or K3:
        difference = tl.load(reference_ptr + tokens, mask=inside, other=0.0) - logprob
        if K2:
            penalty = 0.5 * difference * difference
            pull = -difference
        else:
            bounded = tl.minimum(difference, max_log_ratio, propagate_nan=tl.PropagateNan.ALL)
            excess = _expm1(bounded)
            penalty = excess - difference + (difference - bounded) * (excess + 1.0)
            pull = -excess
        loss += kl_coefficient * penalty
        gradient += kl_coefficient * pull
    counts = weight != 0.0
    tl.store(losses_ptr + tokens, tl.where(counts, weight * loss, 0.0), mask=inside)
    tl.store(logprob_grad_ptr + tokens, tl.where(counts, weight * gradient, 0.0), mask=inside)
    tl.store(token_weights_ptr + tokens, weight, mask=inside)
    tl.store(ratio_ptr + tokens, ratio, mask=inside)
    tl.store(is_clipped_ptr + tokens, is_clipped.to(tl.int8), mask=inside)
