"""Weights, optimizer state and schedule on disk, by megatron-core's distributed checkpointing."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.optimizer import distrib_optimizer
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_p2o.policy.model import PolicyModel
from megatron_p2o.policy.optimizer import Optimization


class InProcessSave(TorchDistSaveShardedStrategy):
    """Writes megatron-core's "torch_dist" format with torch's own writer.

    megatron-core's writer starts a process that imports the main module again and others that inherit our sockets; when
    one of them fails, the caller waits forever.
    """

    def __init__(self, control: ProcessGroup) -> None:
        super().__init__("torch_dist", 1)
        self._control = control

    def save(self, sharded_state_dict: Any, checkpoint_dir: Path) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        renamed, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        save(
            mcore_to_pyt_state_dict(renamed, False),
            storage_writer=FileSystemWriter(checkpoint_dir),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
            process_group=self._control,
        )


def save_checkpoint(model: PolicyModel, optimization: Optimization, directory: Path, control: ProcessGroup) -> None:
    """Write the state into `directory`, which is created. Collective; `control` is a gloo group of all ranks."""
    if dist.get_rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
    dist.barrier(group=control)
    _fill_adam_state(optimization)
    state = _state(model, optimization, is_loading=False)
    _name_step_zero(state["optimizer"])
    dist_checkpointing.save(state, str(directory), sharded_strategy=InProcessSave(control))


def check_checkpoint(directory: Path) -> None:
    """Raise `ValueError` when `directory` holds no checkpoint. Local."""
    if not dist_checkpointing.check_is_distributed_checkpoint(str(directory)):
        raise ValueError(f"{directory} holds no checkpoint of the policy: name a directory that its `save` has written")


def load_checkpoint(model: PolicyModel, optimization: Optimization, directory: Path) -> None:
    """Restore what `save_checkpoint` wrote, under any parallel sizes. Collective."""
    _fill_adam_state(optimization)
    for sharded in _sharded_optimizers(optimization):
        # The loader asks the checkpoint for a step per parameter, which it never saved.
        sharded._set_main_param_and_optimizer_states = _with_step(sharded)
    state = dist_checkpointing.load(_state(model, optimization, is_loading=True), str(directory))
    assert isinstance(state, dict)
    model.load_state_dict(state["model"])
    with torch.no_grad():
        optimization.optimizer.load_state_dict(state["optimizer"])
    _unshare_adam_steps(optimization)
    optimization.scheduler.load_state_dict(state["scheduler"])


def _state(model: PolicyModel, optimization: Optimization, *, is_loading: bool) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    weights = model.sharded_state_dict(metadata=metadata)
    optimizer = optimization.optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata)
    return {"model": weights, "optimizer": optimizer, "scheduler": optimization.scheduler.state_dict()}


def _torch_adam_optimizers(optimization: Optimization) -> list[Any]:
    """Return Megatron's optimizers that run torch's Adam; empty where Transformer Engine or Apex has a fused one."""
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return []
    return list(getattr(optimization.optimizer, "chained_optimizers", [optimization.optimizer]))


def _sharded_optimizers(optimization: Optimization) -> list[distrib_optimizer.DistributedOptimizer]:
    """Return the distributed ones among them, whose state megatron-core does not fully load."""
    optimizers = _torch_adam_optimizers(optimization)
    return [optimizer for optimizer in optimizers if isinstance(optimizer, distrib_optimizer.DistributedOptimizer)]


def _fill_adam_state(optimization: Optimization) -> None:
    """Give torch's Adam the state it makes at its first step.

    A run whose rollouts were all alike has not stepped yet; megatron-core would save nothing for it and then miss it.
    """
    for optimizer in _torch_adam_optimizers(optimization):
        state = optimizer.optimizer.state
        for group in optimizer.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter not in state:
                    state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }


def _name_step_zero(state: dict[str, Any]) -> None:
    """Add the step all parameters share where megatron-core left it out because it is 0, but will ask for it."""
    adam = state.get("optimizer", state)
    if isinstance(adam.get("state"), dict) and adam["state"]:
        adam["state"].setdefault("common_step", torch.tensor(0.0))


def _with_step(sharded: distrib_optimizer.DistributedOptimizer) -> Any:
    """Return the optimizer's setter, given the parameter's present step with the tensors of the checkpoint."""
    original = type(sharded)._set_main_param_and_optimizer_states

    def set_states(model_parameter: torch.nn.Parameter, tensors: dict[str, Any]) -> None:
        group, order = sharded.model_param_group_index_map[model_parameter]
        parameter = sharded.optimizer.param_groups[group]["params"][order]
        original(sharded, model_parameter, {**tensors, "step": sharded.optimizer.state[parameter]["step"]})

    return set_states


def _unshare_adam_steps(optimization: Optimization) -> None:
    """Give each parameter its own step: loaded as one tensor, it would count once per parameter and step."""
    for sharded in _sharded_optimizers(optimization):
        for state in sharded.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()
