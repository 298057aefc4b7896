"""Measures the memory of a policy's rank, to which tests compare the memory plan."""

from typing import Any

import torch

from megatron_p2o.policy.training.ranks import MegatronPolicy


def held_bytes(policy: MegatronPolicy) -> dict[str, int]:
    """Return the bytes of this rank's parameters, gradient buffers and optimizer state, after an update."""
    optimization = policy._shard.optimization
    parameters = {id(parameter): parameter for model in policy._shard.models for parameter in model.parameters()}
    storages = {parameter.untyped_storage().data_ptr() for parameter in parameters.values()}
    inner = [part.optimizer for part in getattr(optimization.optimizer, "chained_optimizers", [optimization.optimizer])]
    updated = [parameter for each in inner for group in each.param_groups for parameter in group["params"]]
    # Megatron's data-parallel wrapper has a list of this name where torch's modules have a method.
    buffers: list[Any] = [buffer for module in optimization.modules for buffer in vars(module)["buffers"]]
    states = [value for each in inner for state in each.state.values() for value in state.values()]
    return {
        "parameters": sum(parameter.nbytes for parameter in parameters.values()),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        # What the optimizer updates is a view of the model, or a float32 copy.
        "masters": sum(each.nbytes for each in updated if each.untyped_storage().data_ptr() not in storages),
        "moments": sum(value.nbytes for value in states if isinstance(value, torch.Tensor) and value.dim()),
    }
