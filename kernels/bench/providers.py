"""Ways to compute the policy loss and its gradients: ours, plain torch, and every peer that is installed.

A provider runs one case forward and backward. Those that only know cross-entropy ("cross_entropy") run with every live
advantage at 1: ratios, clips and a weight per token, which ours computes as well, they cannot do.
"""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from bench.cases import Case
from torch import Tensor

from p2o_kernels import HeadOptions, LossRule, linear_logprob, linear_policy_loss
from p2o_kernels.lm_head import path_for

IGNORE = -100

Kernel = Literal["warp_specialized", "plain"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a provider computed; None where its interface does not give it."""

    logprobs_T: Tensor | None
    hidden_grad_TD: Tensor | None = None
    weight_grad_VD: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Provider:
    """One implementation."""

    name: str
    run: Callable[[Case], Outcome]
    contract: Literal["policy", "cross_entropy"] = "policy"
    max_logprob_error: float | None = 0.1
    """Correctness gate, in nats against float64; bfloat16 logits of a peer are off by some hundredths. None: twice the
    error of the device's own product with float32 sums on the same inputs, plus `measure.FLOAT32_LOGPROB_ERROR`."""
    max_gradient_error: float = 3e-2
    """Correctness gate, relative against float64."""
    is_peer: bool = False


OWN_NAMES: dict[Kernel, str] = {"warp_specialized": "ours", "plain": "ours, no warp specialization"}


def own_policy_providers(device: torch.device, kernels: Sequence[Kernel] = ("plain",)) -> list[Provider]:
    """Return our `linear_policy_loss` (on CUDA by each of `kernels`) and plain torch."""
    chosen = {"ours": HeadOptions()}
    if device.type == "cuda":
        chosen = {OWN_NAMES[kernel]: HeadOptions(kernel=kernel) for kernel in kernels}
        chosen["ours, precise weight gradient"] = HeadOptions(kernel=kernels[0], weight_grad="precise")
    own = Provider(name="ours", run=_ours, max_logprob_error=None, max_gradient_error=3e-3)
    return [
        *(replace(own, name=name, run=partial(_ours, options=options)) for name, options in chosen.items()),
        Provider(name="plain", run=_plain),
    ]


def own_scoring_providers(device: torch.device, kernels: Sequence[Kernel] = ("plain",)) -> list[Provider]:
    """Return our `linear_logprob` (on CUDA by each of `kernels`) and plain torch, all without gradient."""
    chosen = {"ours": HeadOptions()}
    if device.type == "cuda":
        chosen = {OWN_NAMES[kernel]: HeadOptions(kernel=kernel) for kernel in kernels}
    own = [
        Provider(name=name, run=partial(_ours_scoring, options=options), max_logprob_error=None)
        for name, options in chosen.items()
    ]
    return [*own, Provider(name="plain", run=_plain_scoring)]


def peers(device: torch.device, verl: Path | None, *, is_scoring: bool) -> Mapping[str, Callable[[], Provider]]:
    """Return what makes each peer that a device can run; making one that is not installed raises `ImportError`."""
    if is_scoring:
        makers = {"liger-scaled-ce": _liger_scaled_ce_scoring, "verl": lambda: _verl_scoring(verl)}
        return makers if device.type == "cuda" else {"liger-scaled-ce": _liger_scaled_ce_scoring}
    makers: dict[str, Callable[[], Provider]] = {
        "liger-grpo": lambda: _liger_grpo(device),
        "liger-scaled-ce": _liger_scaled_ce,
    }
    if device.type == "cuda":
        makers |= {
            "verl": lambda: _verl(verl),
            "liger-ce": _liger_ce,
            "torch.compile": lambda: Provider(name="torch.compile", run=_compiled()),
            "quack": lambda: _quack(None),
            "quack-base": lambda: _quack(False),
            "cce": lambda: _cce("high"),
            "cce-exact": lambda: _cce(None),
        }
    return makers


def _backward(case: Case, loss: Tensor, logprobs_T: Tensor | None) -> Outcome:
    """Run backward and take the gradients off the leaves."""
    loss.backward()
    hidden_grad, weight_grad = case.hidden_TD.grad, case.weight_VD.grad
    case.hidden_TD.grad = case.weight_VD.grad = None
    return Outcome(
        logprobs_T=None if logprobs_T is None else logprobs_T.detach(),
        hidden_grad_TD=hidden_grad,
        weight_grad_VD=weight_grad if case.main_grad_VD is None else case.main_grad_VD,
    )


def _ours(case: Case, options: HeadOptions | None = None) -> Outcome:
    output = linear_policy_loss(
        case.hidden_TD,
        case.weight_VD,
        case.targets_T,
        advantages_T=case.advantages_T,
        weights_T=torch.ones_like(case.advantages_T),
        rule=LossRule(context="replace"),
        loss_scale=1 / len(case.targets_T),
        weight_main_grad_VpD=case.main_grad_VD,
        path=path_for(case.hidden_TD, options) if case.path is None else case.path,
    )
    return _backward(case, output.loss, output.logprobs_T)


def _ours_scoring(case: Case, options: HeadOptions | None = None) -> Outcome:
    path = path_for(case.hidden_TD, options)
    with torch.no_grad():
        return Outcome(logprobs_T=linear_logprob(case.hidden_TD, case.weight_VD, case.targets_T, path=path)[0])


def _plain_logprobs(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    logprobs_TV = torch.log_softmax((hidden_TD @ weight_VD.T).float(), -1)
    entropy_T = -(logprobs_TV.detach().exp() * logprobs_TV.detach()).sum(-1)
    return logprobs_TV.gather(1, targets_T[:, None]).squeeze(1), entropy_T


def _ratio_loss(case: Case, logprobs_T: Tensor) -> Tensor:
    ratio_T = (logprobs_T - logprobs_T.detach()).exp()
    return -(ratio_T * case.advantages_T).sum() / len(case.targets_T)


def _plain(case: Case) -> Outcome:
    logprobs_T, _ = _plain_logprobs(case.hidden_TD, case.weight_VD, case.targets_T)
    return _without_main_grad(case, _ratio_loss(case, logprobs_T), logprobs_T)


def _compiled() -> Callable[[Case], Outcome]:
    compiled = torch.compile(_plain_logprobs)

    def run(case: Case) -> Outcome:
        logprobs_T, _ = compiled(case.hidden_TD, case.weight_VD, case.targets_T)
        return _without_main_grad(case, _ratio_loss(case, logprobs_T), logprobs_T)

    return run


def _plain_scoring(case: Case) -> Outcome:
    with torch.no_grad():
        logprobs_TV = torch.log_softmax((case.hidden_TD @ case.weight_VD.T).float(), -1)
        return Outcome(logprobs_T=logprobs_TV.gather(1, case.targets_T[:, None]).squeeze(1))


def _without_main_grad(case: Case, loss: Tensor, logprobs_T: Tensor | None) -> Outcome:
    return _backward(replace(case, main_grad_VD=None), loss, logprobs_T)


def _liger_grpo(device: torch.device) -> Provider:
    module = importlib.import_module("liger_kernel.chunked_loss")

    def run(case: Case) -> Outcome:
        length = case.rollout_tokens
        rollouts = len(case.targets_T) // length
        loss_fn = module.LigerFusedLinearGRPOLoss(
            beta=0.0,
            use_ref_model=False,
            loss_type="dr_grpo",
            max_completion_length=length,
            compiled=device.type == "cuda",
        )
        loss, *_ = loss_fn(
            case.hidden_TD.view(rollouts, length, -1),
            case.weight_VD,
            case.targets_T.view(rollouts, length),
            torch.ones(rollouts, length, device=device),
            case.advantages_T[::length].contiguous(),
        )
        return _without_main_grad(case, loss, None)

    return Provider(name="liger-grpo", run=run)


def _liger_scaled_ce() -> Provider:
    function = _liger_scaled_function()

    def run(case: Case) -> Outcome:
        nll_T, _ = function.apply(case.hidden_TD, case.weight_VD, case.targets_T, 1.0, IGNORE, 1, True)
        return _without_main_grad(case, _ratio_loss(case, -nll_T), -nll_T)

    return Provider(name="liger-scaled-ce", run=run)


def _liger_scaled_ce_scoring() -> Provider:
    function = _liger_scaled_function()

    def run(case: Case) -> Outcome:
        with torch.no_grad():
            nll_T, _ = function.apply(case.hidden_TD, case.weight_VD, case.targets_T, 1.0, IGNORE, 1, True)
        return Outcome(logprobs_T=-nll_T)

    return Provider(name="liger-scaled-ce", run=run)


def _liger_scaled_function() -> Any:
    module = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    return module.LigerFusedLinearScaledCrossEntropyFunction


def _liger_ce() -> Provider:
    module = importlib.import_module("liger_kernel.transformers.functional")

    def run(case: Case) -> Outcome:
        loss = module.liger_fused_linear_cross_entropy(
            case.hidden_TD,
            case.weight_VD,
            _labels(case),
            ignore_index=IGNORE,
            reduction="sum",
            accum_dtype=torch.float32,
        )
        return _without_main_grad(case, loss / len(case.targets_T), None)

    return Provider(name="liger-ce", run=run, contract="cross_entropy")


def _quack(use_scaled_exp: bool | None) -> Provider:
    module = importlib.import_module("quack.linear_cross_entropy")

    def run(case: Case) -> Outcome:
        loss = module.chunked_linear_cross_entropy(
            case.hidden_TD,
            case.weight_VD,
            _labels(case),
            ignore_index=IGNORE,
            reduction="sum",
            tuned=False,
            use_scaled_exp=use_scaled_exp,
        )
        return _without_main_grad(case, loss / len(case.targets_T), None)

    name = "quack" if use_scaled_exp is None else "quack-base"
    return Provider(name=name, run=run, contract="cross_entropy")


def _cce(filter_eps: str | None) -> Provider:
    module = importlib.import_module("cut_cross_entropy")

    def run(case: Case) -> Outcome:
        loss = module.linear_cross_entropy(
            case.hidden_TD,
            case.weight_VD,
            _labels(case),
            ignore_index=IGNORE,
            reduction="sum",
            filter_eps=filter_eps,
        )
        return _without_main_grad(case, loss / len(case.targets_T), None)

    name = "cce" if filter_eps is not None else "cce-exact"
    return Provider(name=name, run=run, contract="cross_entropy")


def _verl(checkout: Path | None) -> Provider:
    function = _verl_function(checkout)

    def run(case: Case) -> Outcome:
        logprobs_T, _ = function(case.hidden_TD, case.weight_VD, case.targets_T, 1.0, "none")
        return _without_main_grad(case, _ratio_loss(case, logprobs_T), logprobs_T)

    return Provider(name="verl", run=run)


def _verl_scoring(checkout: Path | None) -> Provider:
    function = _verl_function(checkout)

    def run(case: Case) -> Outcome:
        with torch.no_grad():
            return Outcome(logprobs_T=function(case.hidden_TD, case.weight_VD, case.targets_T, 1.0, "none")[0])

    return Provider(name="verl", run=run)


def _verl_function(checkout: Path | None) -> Any:
    if checkout is not None and str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    return importlib.import_module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy


def _labels(case: Case) -> Tensor:
    return torch.where(case.is_live_T, case.targets_T, IGNORE)
