"""Adam that keeps its step with the group, and the arithmetic over lists of tensors that Megatron's optimizers call."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class FusedAdam(torch.optim.Optimizer):
    """AdamW; state of a parameter: `exp_avg` and `exp_avg_sq`, made at the first step."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        assert adam_w_mode and not capturable
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
                state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
                mean = state["exp_avg"] / (1 - beta1 ** group["step"])
                square = state["exp_avg_sq"] / (1 - beta2 ** group["step"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.addcdiv_(mean, square.sqrt() + group["eps"], value=-group["lr"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        known = {"exp_avg", "exp_avg_sq"}
        unknown = {name for state in state_dict["state"].values() for name in state} - known
        if unknown:
            raise KeyError(*unknown)
        super().load_state_dict(state_dict)


class FusedSGD(torch.optim.Optimizer):
    """Imported beside Adam, never made."""


def multi_tensor_applier(operation: Callable[..., Any], flags: Tensor, lists: list[list[Tensor]], *rest: Any) -> Any:
    return operation(1 << 16, flags, lists, *rest)


def multi_tensor_scale(chunk_size: int, flags: Tensor, lists: list[list[Tensor]], scale: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_l2norm(
    chunk_size: int, flags: Tensor, lists: list[list[Tensor]], per_tensor: bool
) -> tuple[Tensor, None]:
    return torch.stack([tensor.norm() for tensor in lists[0]]).norm()[None], None
