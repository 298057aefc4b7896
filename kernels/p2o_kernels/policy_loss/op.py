"""`linear_policy_loss`: LM head, log-probs on the original prompt, P2O loss and both gradients in one pass."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from p2o_kernels.advantage import active_token_index
from p2o_kernels.lm_head import HeadShard, LmHeadPath, SoftmaxChunk, make_shard, path_for, with_entropy_gradient
from p2o_kernels.logprob.op import linear_logprob_of_shard
from p2o_kernels.policy_loss.sequence_ratio import sequence_log_ratios
from p2o_kernels.policy_loss.token_loss import (
    LossRule,
    LossTokens,
    TokenInputs,
    TokenLosses,
    context_weighted,
    token_inputs,
    token_losses_torch,
)

TWO_PHASE_DEAD_SHARE = 1 / 3
"""Computing log-probs first (2T) and all of it for the live rows T' only (6T') beats one pass (6T) below T' = 2/3 T."""
_MAIN_GRAD_RULE = (
    "weight_main_grad_VpD is complete after the forward call: put factors into loss_scale, the gradient of the loss "
    "must be 1"
)


class PolicyLoss(NamedTuple):
    """The loss, and per token what the metrics need; only `loss` has a gradient."""

    loss: Tensor
    """Scalar: loss_scale * sum of the weighted token losses, the same on all ranks."""
    logprobs_T: Tensor
    """0 where not live, but for rows that a first phase found the context ratio to drop."""
    entropy_T: Tensor
    """Nats; 0 where not live or not asked for."""
    weights_T: Tensor
    """After the context ratio; 0 where not live."""
    ratio_T: Tensor
    """Policy ratio; 1 where not live."""
    is_clipped_T: Tensor
    """bool"""
    is_live_T: Tensor
    """bool: the token has a weight, and an advantage or a KL or entropy term: it went through the head."""


def linear_policy_loss(
    hidden_TD: Tensor,
    weight_VpD: Tensor,
    targets_T: Tensor,
    *,
    rule: LossRule,
    loss_scale: float = 1.0,
    temperature: float = 1.0,
    tp_group: ProcessGroup | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    weight_main_grad_VpD: Tensor | None = None,
    expected_dead_share: float = 0.0,
    with_entropy: bool = True,
    path: LmHeadPath | None = None,
    **tokens: Unpack[LossTokens],
) -> PolicyLoss:
    """Compute the P2O loss and, in the same pass, both gradients: three matrix products, no [T, V] logits.

    Equals `(weights * token_loss(linear_logprob(...))).sum() * loss_scale` and its backward. Rows whose weight is zero
    never reach the first product, nor do those whose advantage is zero unless the rule has a KL or entropy term.
    Arguments not listed are those of `linear_logprob`, whose hidden gradient is a partial sum under `tp_group` as well.
    Only hidden and weight get gradients.

    `gspo` against given old log-probs takes a fourth product: the ratio of a sequence needs all its log-probs before
    the first token's gradient. Where this pass provides the old ones the ratio is 1, and there are three.

    Args:
        rule: context, surrogate with its clips, context-ratio band, KL and entropy terms.
        loss_scale: 1 / global denominator, known before the call so that the gradient needs no second pass.
        weight_main_grad_VpD: float32 [Vp, D]. The weight gradient is added to it **during the forward call**, none is
            returned to autograd, and the gradient that arrives at `loss` must be 1.
        expected_dead_share: share of live rows the context mask will drop, as measured in the last step. Above
            `TWO_PHASE_DEAD_SHARE` the Triton path finds log-probs first and then the rest for what is left; the torch
            path drops such rows after each chunk's softmax anyway. Changes time, not results.
        tokens: the fields of `LossTokens`.

    Raises:
        ValueError: inputs do not fit each other or the rule. RuntimeError: backward through one loss twice.
    """
    path = path_for(hidden_TD) if path is None else path
    shard = make_shard(hidden_TD, weight_VpD, targets_T, temperature, tp_group, vocab_start, vocab_size)
    _check_tokens(targets_T, tokens)
    _check_main_grad(weight_main_grad_VpD, weight_VpD, shard)

    def logprobs_of(rows: Tensor) -> Tensor:
        with torch.no_grad():
            return linear_logprob_of_shard(hidden_TD[rows], weight_VpD, targets_T[rows], shard, path)[0]

    inputs, live, first_phase = _live_tokens(path, rule, tokens, logprobs_of, expected_dead_share)
    wants_grad = _wants_grad(hidden_TD), _wants_grad(weight_VpD)
    with_entropy = with_entropy or rule.entropy_coefficient > 0
    call = _Call(
        shard, path, rule, inputs, live, first_phase, loss_scale, weight_main_grad_VpD, with_entropy, *wants_grad
    )
    return PolicyLoss(*_LinearPolicyLoss.apply(hidden_TD, weight_VpD, targets_T, call))  # pyright: ignore[reportGeneralTypeIssues]


@dataclass(frozen=True, slots=True)
class _Call:
    """The constants of one call; `tokens` holds the live rows only."""

    shard: HeadShard
    path: LmHeadPath
    rule: LossRule
    tokens: TokenInputs
    live: Tensor
    """int64 rows of the batch that go through the head, ascending."""
    first_phase: tuple[Tensor, Tensor] | None
    """Rows whose log-probs were computed to decide which of them are live, and those; None without such a phase."""
    loss_scale: float
    weight_main_grad_VpD: Tensor | None
    with_entropy: bool
    wants_hidden_grad: bool
    wants_weight_grad: bool


def _wants_grad(tensor: Tensor) -> bool:
    """Whether backward will ask for this gradient; inside an autograd function that can no longer be told."""
    return torch.is_grad_enabled() and tensor.requires_grad


def _index(path: LmHeadPath, advantages_N: Tensor, weights_N: Tensor) -> Tensor:
    """Return the row numbers of the tokens that have both."""
    return active_token_index(advantages_N, weights_N, implementation="triton" if path.is_triton else "torch")


def _live_tokens(
    path: LmHeadPath,
    rule: LossRule,
    tokens: LossTokens,
    logprobs_of: Callable[[Tensor], Tensor],
    expected_dead_share: float,
) -> tuple[TokenInputs, Tensor, tuple[Tensor, Tensor] | None]:
    """Return what the loss of the tokens that have one needs, their row numbers, and `_Call.first_phase`.

    `logprobs_of` computes the log-probs of rows, where a ratio or a mask needs them before the pass.
    """
    inputs = token_inputs(rule, tokens)
    if rule.surrogate == "gspo" and inputs.old_logprobs_N is not None:
        rows = _index(path, tokens["advantages_T"], tokens["weights_T"])
        log_ratios_N = logprobs_of(rows) - inputs.old_logprobs_N[rows]
        sequences = tokens.get("sequence_T"), tokens.get("num_sequences", 0), tokens.get("sequence_group")
        inputs = replace(inputs, log_ratio_N=sequence_log_ratios(rows, log_ratios_N, *sequences))
    inputs, live = _live_rows(path, rule, inputs)
    may_lose_rows = inputs.mask_logprobs_N is not None and not path.compacts_rows
    if not may_lose_rows or expected_dead_share <= TWO_PHASE_DEAD_SHARE:
        return inputs, live, None
    first_phase = live, logprobs_of(live)
    return *_masked_rows(path, rule, inputs, *first_phase), first_phase


def _live_rows(
    path: LmHeadPath, rule: LossRule, tokens: TokenInputs, live: Tensor | None = None
) -> tuple[TokenInputs, Tensor]:
    """Keep the tokens that have a loss; return them and their row numbers."""
    advantages_N = tokens.advantages_N
    rows = _index(
        path, torch.ones_like(advantages_N) if rule.acts_without_advantage else advantages_N, tokens.weights_N
    )
    return tokens.select(rows), rows if live is None else live[rows]


def _masked_rows(
    path: LmHeadPath, rule: LossRule, tokens: TokenInputs, live: Tensor, logprobs_N: Tensor
) -> tuple[TokenInputs, Tensor]:
    """Apply the context mask that the log-probs of a first phase decide, and drop the rows it kills."""
    assert tokens.mask_logprobs_N is not None and tokens.is_templated_N is not None
    masked = tokens.mask_logprobs_N, tokens.is_templated_N, tokens.advantages_N
    weights_N = context_weighted(rule, tokens.weights_N, logprobs_N, *masked)
    masked = replace(tokens, weights_N=weights_N, old_logprobs_N=logprobs_N, mask_logprobs_N=None, is_templated_N=None)
    return _live_rows(path, rule, masked, live)


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VpD: Tensor, targets_T: Tensor, call: _Call) -> tuple[Tensor, ...]:
        outputs = _Outputs.empty(len(hidden_TD), call)
        gradients = _Gradients.zero(hidden_TD, weight_VpD, call)
        path, shard = call.path, call.shard
        chunk_rows = path.num_chunk_rows(shard, len(call.live))
        buffer = path.exponentials_buffer(shard, chunk_rows, for_gradient=gradients.are_wanted)
        token_losses = _token_losses(path, call.rule)
        for start in range(0, len(call.live), chunk_rows):
            rows = call.live[start : start + chunk_rows]
            hidden_CD, targets_C = hidden_TD[rows], targets_T[rows]
            chunk = path.softmax_chunk(shard, hidden_CD, targets_C, buffer, with_entropy=call.with_entropy)
            tokens = call.tokens.select(torch.arange(start, start + len(rows), device=rows.device))
            losses = token_losses(call.rule, chunk.logprobs_C, tokens)
            outputs.put(rows, chunk, losses)
            if call.rule.entropy_coefficient > 0:
                outputs.add_entropy_term(rows, chunk, call.rule.entropy_coefficient)
            gradients.add(rows, hidden_CD, targets_C, chunk, losses)
        ctx.gradients = gradients
        result = outputs.result(call.loss_scale)
        ctx.mark_non_differentiable(*(values_T for values_T in result if values_T is not result.loss))
        return tuple(result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_grad: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError("linear_policy_loss: backward ran already; its gradients are gone, call it again")
        gradients: _Gradients = ctx.gradients
        ctx.gradients = None
        return *gradients.scaled(loss_grad), None, None


def _token_losses(path: LmHeadPath, rule: LossRule) -> Callable[[LossRule, Tensor, TokenInputs], TokenLosses]:
    if not path.is_triton or callable(rule.surrogate):
        return token_losses_torch
    from p2o_kernels.policy_loss.triton_path import token_losses_triton

    return token_losses_triton


@dataclass(frozen=True, slots=True)
class _Outputs:
    """Values per token of the whole batch, filled chunk by chunk."""

    losses_T: Tensor
    logprobs_T: Tensor
    entropy_T: Tensor
    weights_T: Tensor
    ratio_T: Tensor
    is_clipped_T: Tensor
    is_live_T: Tensor

    @staticmethod
    def empty(num_tokens: int, call: _Call) -> "_Outputs":
        losses, logprobs, entropy, weights = call.shard.weight_VD.new_zeros(
            4, num_tokens, dtype=call.shard.compute_dtype
        ).unbind()
        is_clipped, is_live = call.live.new_zeros(2, num_tokens, dtype=torch.bool).unbind()
        is_live.index_fill_(0, call.live, True)  # assigned by an index, the value would be copied from the host
        if call.first_phase is not None:
            logprobs.index_copy_(0, *call.first_phase)
        return _Outputs(losses, logprobs, entropy, weights, torch.ones_like(losses), is_clipped, is_live)

    def put(self, rows: Tensor, chunk: SoftmaxChunk, losses: TokenLosses) -> None:
        self.losses_T[rows] = losses.losses_N
        self.logprobs_T[rows] = chunk.logprobs_C
        self.weights_T[rows] = losses.weights_N
        self.ratio_T[rows] = losses.ratio_N
        self.is_clipped_T[rows] = losses.is_clipped_N
        if chunk.entropy_C is not None:
            self.entropy_T[rows] = chunk.entropy_C

    def add_entropy_term(self, rows: Tensor, chunk: SoftmaxChunk, coefficient: float) -> None:
        """Take the weighted entropies from the losses of a chunk that has been put."""
        assert chunk.entropy_C is not None
        weights_C = self.weights_T[rows]
        # A weight of 0 keeps out an entropy that is nan.
        self.losses_T[rows] -= torch.where(weights_C != 0, coefficient * weights_C * chunk.entropy_C, 0.0)

    def result(self, loss_scale: float) -> PolicyLoss:
        """Return the outcome of the call; each tensor has memory of its own."""
        return PolicyLoss(
            loss=self.losses_T.sum() * loss_scale,
            logprobs_T=self.logprobs_T.clone(),
            entropy_T=self.entropy_T.clone(),
            weights_T=self.weights_T.clone(),
            ratio_T=self.ratio_T.clone(),
            is_clipped_T=self.is_clipped_T.clone(),
            is_live_T=self.is_live_T.clone(),
        )


@dataclass(frozen=True, slots=True)
class _Gradients:
    """Both gradients of the loss, accumulated chunk by chunk; None where nobody asked."""

    call: _Call
    hidden_TD: Tensor | None
    weight_VpD: Tensor | None
    """The main gradient itself when there is one."""
    weight_dtype: torch.dtype

    @staticmethod
    def zero(hidden_TD: Tensor, weight_VpD: Tensor, call: _Call) -> "_Gradients":
        hidden_grad_TD = torch.zeros_like(hidden_TD) if call.wants_hidden_grad else None
        weight_grad_VpD = None
        if call.wants_weight_grad:
            weight_grad_VpD = call.weight_main_grad_VpD
            if weight_grad_VpD is None:
                weight_grad_VpD = torch.zeros_like(weight_VpD, dtype=call.shard.compute_dtype)
        return _Gradients(call, hidden_grad_TD, weight_grad_VpD, weight_VpD.dtype)

    @property
    def are_wanted(self) -> bool:
        return self.hidden_TD is not None or self.weight_VpD is not None

    def add(self, rows: Tensor, hidden_CD: Tensor, targets_C: Tensor, chunk: SoftmaxChunk, losses: TokenLosses) -> None:
        """Add a chunk; rows that clipping or the context mask left without gradient are dropped where that is cheap."""
        if not self.are_wanted:
            return
        path, shard, call = self.call.path, self.call.shard, self.call
        logprob_grad_C = losses.logprob_grad_N * call.loss_scale
        entropy_grad_C = losses.weights_N * (-call.rule.entropy_coefficient * call.loss_scale)
        if path.compacts_rows:
            kept = (logprob_grad_C.abs() + entropy_grad_C.abs() != 0).nonzero().squeeze(1)
            if len(kept) < len(rows):
                chunk, rows, hidden_CD = chunk.select(kept), rows[kept], hidden_CD[kept]
                targets_C, logprob_grad_C, entropy_grad_C = targets_C[kept], logprob_grad_C[kept], entropy_grad_C[kept]
        if call.rule.entropy_coefficient > 0:
            chunk = with_entropy_gradient(chunk, logprob_grad_C, entropy_grad_C)
            logprob_grad_C = torch.ones_like(logprob_grad_C)
        if self.hidden_TD is not None:
            grad_CD = path.hidden_grad(shard, chunk, targets_C, logprob_grad_C)
            self.hidden_TD[rows] = grad_CD.to(self.hidden_TD.dtype)
        if self.weight_VpD is not None:
            path.add_weight_grad_(self.weight_VpD, shard, chunk, hidden_CD, targets_C, logprob_grad_C)

    def scaled(self, loss_grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients times the one of the loss, in the inputs' dtypes. Uses their memory up."""
        hidden_TD = None if self.hidden_TD is None else self.hidden_TD.mul_(loss_grad)
        if self.call.weight_main_grad_VpD is None:
            weight = None if self.weight_VpD is None else self.weight_VpD.mul_(loss_grad).to(self.weight_dtype)
            return hidden_TD, weight
        if loss_grad.is_cuda:
            torch.ops.aten._assert_async.msg(loss_grad == 1, _MAIN_GRAD_RULE)
        elif loss_grad != 1:
            raise ValueError(f"{_MAIN_GRAD_RULE}, not {loss_grad.item():g}")
        return hidden_TD, None


def _check_tokens(targets_T: Tensor, tokens: LossTokens) -> None:
    unknown = tokens.keys() - LossTokens.__annotations__.keys()
    missing = LossTokens.__required_keys__ - tokens.keys()
    if unknown or missing:
        raise TypeError(f"linear_policy_loss: unknown {sorted(unknown)}, missing {sorted(missing)}")
    for name, value in tokens.items():
        if not isinstance(value, Tensor) or name == "sequence_T":
            continue
        if value.shape != targets_T.shape or value.device != targets_T.device:
            raise ValueError(
                f"{name} {tuple(value.shape)} on {value.device}: must be {tuple(targets_T.shape)} on {targets_T.device}"
            )
        if (value.dtype == torch.bool) != (name == "is_templated_T"):
            raise ValueError(f"{name} is {value.dtype}: is_templated_T must be bool, the others floating point")


def _check_main_grad(main_grad_VpD: Tensor | None, weight_VpD: Tensor, shard: HeadShard) -> None:
    if main_grad_VpD is None:
        return
    if main_grad_VpD.shape != weight_VpD.shape or main_grad_VpD.dtype != shard.compute_dtype:
        raise ValueError(
            f"weight_main_grad_VpD {tuple(main_grad_VpD.shape)} {main_grad_VpD.dtype}: must be "
            f"{tuple(weight_VpD.shape)} {shard.compute_dtype}"
        )
    if not main_grad_VpD.is_contiguous():
        raise ValueError(f"weight_main_grad_VpD has strides {main_grad_VpD.stride()}: must be contiguous")
