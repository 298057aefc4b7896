"""Which function of the policy ratio `objective.surrogate` names: a kernel's, cloning, or one of the user's own."""

from collections.abc import Mapping
from functools import cache
from typing import cast, get_args

import torch
from torch import Tensor

from megatron_p2o.config.callables import CallableKind, check_call, load_callable
from megatron_p2o.config.tree import ObjectiveConfig
from p2o_kernels import LossRule, OwnSurrogate, Surrogate


def negative_log_likelihood(ratio: Tensor, logprobs: Tensor, advantages: Tensor, rule: LossRule) -> Tensor:
    """Return minus the log-prob of each token, times its advantage: behavioural cloning (`clone`), where that is 1."""
    return -advantages * logprobs


BUILT_IN: Mapping[str, Surrogate | OwnSurrogate] = {
    **{name: name for name in get_args(Surrogate)},
    "clone": negative_log_likelihood,
}

KIND = CallableKind(parameters=("ratio", "logprobs", "advantages", "rule"), other_names=tuple(BUILT_IN))
"""What `objective.surrogate` may name beside them: see `p2o_kernels.OwnSurrogate`."""


@cache
def surrogate_named(name: str) -> Surrogate | OwnSurrogate:
    """Return what the loss is made by, as `LossRule` takes it.

    Raises:
        ValueError: it is none of ours, and no callable that takes what `KIND` says.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    found = load_callable(name, KIND, _subject(name))
    check_call(found, KIND.parameters, {}, subject=_subject(name), rule=f"be callable as {KIND.signature}")
    return cast(OwnSurrogate, found)


def check_surrogate(objective: ObjectiveConfig, rule: LossRule) -> None:
    """Try a function of the user's on two tokens that have moved apart.

    Raises:
        ValueError: as `surrogate_named`; or it raises, returns no differentiable loss per token, one that is not
            finite, or one that depends on another token.
    """
    surrogate = surrogate_named(objective.surrogate)
    if objective.surrogate in BUILT_IN or not callable(surrogate):
        return
    logprobs = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    ratio = (logprobs - torch.tensor([-1.1, -1.8], dtype=torch.float64)).exp()
    subject = _subject(objective.surrogate)
    try:
        losses = surrogate(ratio, logprobs, torch.tensor([1.0, -1.0], dtype=torch.float64), rule)
        has_shape = losses.shape == logprobs.shape
        gradients = [torch.autograd.grad(loss, logprobs, retain_graph=True)[0] for loss in losses] if has_shape else []
    except Exception as error:  # whatever code of others does
        raise ValueError(f"{subject} cannot be used ({type(error).__name__}: {error})") from error
    if not has_shape:
        raise ValueError(f"{subject} returned a shape of {tuple(losses.shape)} for two tokens: return a loss for each")
    if not torch.stack([losses.detach(), *gradients]).isfinite().all():
        raise ValueError(f"{subject} returned losses or gradients that are not finite for log-probs of -1 and -2")
    if gradients[0][1] != 0 or gradients[1][0] != 0:
        raise ValueError(
            f"{subject} returned the loss of a token that depends on another: packs hold tokens of many responses, so "
            "the loss of each must follow from its own ratio, log-prob and advantage"
        )


def _subject(name: str) -> str:
    return f"objective.surrogate={name}"
