"""A policy under test: the samples of the tiny models, its weights, and the memory that a rank holds."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import torch

from megatron_p2o.config.tree import Config
from megatron_p2o.policy.training.ranks import MegatronPolicy, build_policy
from megatron_p2o.testing.policy_oracle import random_samples

VOCAB_SIZE = 131
LENGTHS = (3, 17, 1, 20, 30, 9, 9)
"""Response lengths of `SAMPLES`."""

SAMPLES = random_samples(LENGTHS, vocab_size=VOCAB_SIZE)


@contextmanager
def policy_of(config: Config) -> Iterator[MegatronPolicy]:
    """The policy of this process alone; closed at the end."""
    with closing(build_policy(config)) as policy:
        yield policy


def weights_of(policy: MegatronPolicy) -> dict[str, torch.Tensor]:
    """Return the exported weights by Hugging Face name."""
    return dict(policy.weights())


def assert_same_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], atol: float) -> None:
    """Both are by Hugging Face name."""
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def held_bytes(policy: MegatronPolicy) -> dict[str, int]:
    """Return the bytes of this rank's parameters, gradient buffers and optimizer state, after an update."""
    return {part: sum(tensor.nbytes for tensor in tensors) for part, tensors in held_tensors(policy).items()}


def allocated_bytes(policy: MegatronPolicy) -> dict[str, int]:
    """Return the bytes of the storages that `held_tensors` lie in: 0 for what is lent."""
    return {part: storage_bytes(tensors) for part, tensors in held_tensors(policy).items()}


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of all storages that the tensors lie in."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def held_tensors(policy: MegatronPolicy) -> dict[str, Sequence[torch.Tensor]]:
    """Return this rank's parameters, gradient buffers, float32 copies of parameters and moments, after an update."""
    optimization = policy._shard.optimization
    parameters = list({id(each): each for model in policy._shard.models for each in model.parameters()}.values())
    storages = {parameter.untyped_storage()._cdata for parameter in parameters}
    inner = [part.optimizer for part in optimization.optimizers]
    updated = [parameter for each in inner for group in each.param_groups for parameter in group["params"]]
    # Megatron's data-parallel wrapper has a list of this name where torch's modules have a method.
    buffers: list[Any] = [buffer for module in optimization.modules for buffer in vars(module)["buffers"]]
    states = [value for each in inner for state in each.state.values() for value in state.values()]
    return {
        "parameters": parameters,
        "gradients": [buffer.grad_data for buffer in buffers],
        # What the optimizer updates is a view of the model, or a float32 copy.
        "masters": [each for each in updated if each.untyped_storage()._cdata not in storages],
        "moments": [value for value in states if isinstance(value, torch.Tensor) and value.dim()],
    }
