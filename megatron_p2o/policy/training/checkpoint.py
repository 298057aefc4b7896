"""Weights, optimizer state and schedule on disk, by megatron-core's distributed checkpointing."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.optimizer import distrib_optimizer
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_p2o.files import FileDigest, digest_of
from megatron_p2o.policy.model.cpu_compat import cuda_stand_ins
from megatron_p2o.policy.model.model import PolicyModel
from megatron_p2o.policy.training.lending import Lending
from megatron_p2o.policy.training.optimizer import Optimization
from megatron_p2o.policy.training.random_state import load_random_state, random_state_path, save_random_state
from megatron_p2o.policy.training.safe_pickle import check_pickle, weights_only_loading

RANK_WRITE_TIMEOUT_S = 3600.0
"""Longest wait for this rank's files of one checkpoint."""

METADATA_FILE = ".metadata"
COMMON_FILES = (COMMON_STATE_FNAME, "metadata.json", METADATA_FILE)
"""Written by rank 0 for all."""

DigestsByName = Mapping[str, FileDigest]
"""File name within the checkpoint's folder to what the file must be."""


class Staged(TorchDistSaveShardedStrategy):
    """Takes a copy in host memory of what megatron-core would write in its "torch_dist" format; `write_staged` does.

    megatron-core's own asynchronous writer starts a process that imports the main module again and others that inherit
    our sockets; when one of them fails, the caller waits forever.
    """

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)
        self.state: dict[str, Any] = {}

    def save(self, sharded_state_dict: Any, checkpoint_dir: Path) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        # Later versions than 0.16.1 pass what is common to all ranks too. A file of its own is what all versions read.
        common = sharded_state_dict.pop("common_state", None)
        if common is not None and dist.get_rank() == 0:
            torch.save(common.data, Path(checkpoint_dir, COMMON_STATE_FNAME))
        renamed, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        for shards in renamed.values():
            for shard in shards:
                if isinstance(shard, ShardedTensor):
                    assert shard.data is not None, "a saved tensor has data"
                    shard.data = shard.data.detach().to("cpu", copy=True)
        self.state = mcore_to_pyt_state_dict(renamed, False)


class CheckpointWriter:
    """Writes this rank's share of the policy's state beside training, one checkpoint at a time."""

    def __init__(self, timeout_s: float) -> None:
        """Collective. `timeout_s` bounds what ranks wait for one another while they write."""
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        assert isinstance(group, ProcessGroup)
        self._group = group
        self._writing: Future[DigestsByName] | None = None

    def begin(
        self, models: Sequence[PolicyModel], optimization: Optimization, directory: Path, control: ProcessGroup
    ) -> None:
        """Copy the state to host memory and return; a thread then writes it into `directory`, which is created.

        Collective; waits for the checkpoint before. `control` is a gloo group of all ranks.
        """
        self.wait()
        staged = stage(models, optimization, directory, control)
        self._writing = writing = Future()
        threading.Thread(target=self._write, args=(staged, directory, writing), daemon=True).start()

    @property
    def written(self) -> "Future[DigestsByName]":
        """The result of the last `begin`: on rank 0 the digest of every file, or why there is no checkpoint."""
        assert self._writing is not None, "nothing was written"
        return self._writing

    def wait(self) -> None:
        """Wait until nothing is being written, whatever the result. Raises `TimeoutError`."""
        if self._writing is not None and not futures.wait([self._writing], RANK_WRITE_TIMEOUT_S).done:
            raise TimeoutError(f"rank {dist.get_rank()} has been writing a checkpoint for {RANK_WRITE_TIMEOUT_S:g} s")

    def _write(self, staged: dict[str, Any], directory: Path, writing: "Future[DigestsByName]") -> None:
        try:
            replies: list[Any] = [None] * dist.get_world_size()
            is_first = dist.get_rank() == 0
            dist.gather_object(self._reply(staged, directory), replies if is_first else None, dst=0, group=self._group)
            failures = [f"rank {rank}: {reply}" for rank, reply in enumerate(replies) if isinstance(reply, str)]
            if failures:
                raise OSError(f"{directory} could not be written: {failures[0]}")
            writing.set_result({name: digest for reply in replies if reply for name, digest in reply.items()})
        except Exception as error:  # raised again where `written` is read
            writing.set_exception(error)

    def _reply(self, staged: dict[str, Any], directory: Path) -> "DigestsByName | str":
        """Write this rank's files; return their digests, or what went wrong, which rank 0 must be told too."""
        try:
            write_staged(staged, directory, self._group)
            return {path.name: digest_of(path) for path in own_files(directory)}
        except CheckpointException as error:
            return causes_of(error)
        except Exception as error:
            return f"{type(error).__name__}: {error}"


def stage(
    models: Sequence[PolicyModel], optimization: Optimization, directory: Path, control: ProcessGroup
) -> dict[str, Any]:
    """Return this rank's share of the state in host memory; write small parts into `directory`. Collective."""
    if dist.get_rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
    dist.barrier(group=control)
    # A run whose rollouts were all alike has not stepped yet; Megatron would save no state and then miss it.
    optimization.fill_state()
    staged = Staged()
    with optimization.lending.read_on_host():
        state = _state(models, optimization, is_loading=False)
        _name_step_zero(state["optimizer"])
        _read_lent_weights(state["model"], optimization.lending)
        dist_checkpointing.save(
            state,
            str(directory),
            sharded_strategy=staged,
            preprocess_common_before_consistancy_check=_without_gathered_elsewhere,
        )
    # After megatron-core, which warns of a folder that is not empty.
    save_random_state(random_state_path(directory, dist.get_rank()))
    return staged.state


def write_staged(staged: dict[str, Any], directory: Path, group: ProcessGroup) -> None:
    """Write what `stage` returned. Collective over `group`, on any thread."""
    with cuda_stand_ins():
        save(
            staged,
            # Nothing to copy ahead: it is on the host. With a GPU torch would wait for the stream of the thread's
            # current device at every tensor, and make a context on the first GPU for it in every process.
            storage_writer=FileSystemWriter(directory, per_thread_copy_ahead=0),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
            process_group=group,
        )


def causes_of(error: CheckpointException) -> str:
    """Return what went wrong on each rank that failed. The exception itself is not an `Exception` for Python."""
    return "; ".join(f"{type(failure).__name__}: {failure}" for failure, _ in error.failures.values())


def own_files(directory: Path) -> list[Path]:
    """Return the files of `directory` that this rank hashes: its own, and on rank 0 the common ones."""
    rank = dist.get_rank()
    own = [*directory.glob(f"__{rank}_*.distcp"), random_state_path(directory, rank)]
    return own if rank else own + [directory / name for name in COMMON_FILES]


def check_checkpoint(directory: Path) -> None:
    """Raise `ValueError` when `directory` holds no checkpoint, or one that would run code when loaded. Local."""
    if not dist_checkpointing.check_is_distributed_checkpoint(str(directory)):
        raise ValueError(f"{directory} holds no checkpoint of the policy: name a directory that its `save` has written")
    check_pickle(directory / METADATA_FILE)


def load_checkpoint(models: Sequence[PolicyModel], optimization: Optimization, directory: Path) -> None:
    """Restore what a `CheckpointWriter` wrote, under any parallel sizes. Collective.

    Weights, moments and the number of steps are the checkpoint's; learning rate, warm-up, decay, betas and eps those
    that `optimization` was built with.

    Raises:
        ValueError: the checkpoint's metadata names something that has no place in it.
        RuntimeError: it cannot be read, or an object in it is more than weights and numbers.
    """
    settings = optimization.settings()
    optimization.fill_state()
    for sharded in _torch_sharded_optimizers(optimization):
        # The loader asks the checkpoint for a step per parameter, which it never saved.
        sharded._set_main_param_and_optimizer_states = _with_step(sharded)
    state = _read(_state(models, optimization, is_loading=True), directory)
    _load_models(models, state)
    _place_step(state["optimizer"])
    with torch.no_grad():
        optimization.optimizer.load_state_dict(state["optimizer"])
    _unshare_adam_steps(optimization)
    optimization.resume(settings, num_steps=int(state["scheduler"]["num_steps"]))
    path = random_state_path(directory, dist.get_rank())
    if path.exists():  # under another layout there may be more ranks now
        load_random_state(path)


def load_weights(models: Sequence[PolicyModel], directory: Path) -> None:
    """Restore the weights alone, under any parallel sizes; the optimizer state is not read. Collective.

    Raises what `load_checkpoint` raises.
    """
    _load_models(models, _read({"model": _weights(models)}, directory))


def _load_models(models: Sequence[PolicyModel], state: Mapping[str, Any]) -> None:
    for chunk, model in enumerate(models):
        weights = state["model"][str(chunk)]
        # Transformer Engine would unpickle the bytes of its FP8 state, which nothing here has.
        model.load_state_dict({name: None if name.endswith("_extra_state") else weights[name] for name in weights})


def _read(sharded: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Return `sharded` with the values of the checkpoint. Other parts are not read."""
    check_pickle(directory / METADATA_FILE)
    try:
        with weights_only_loading():
            state = dist_checkpointing.load(sharded, str(directory))
    except CheckpointException as error:
        raise RuntimeError(f"{directory} could not be loaded: {causes_of(error)}") from error
    assert isinstance(state, dict)
    return state


def _state(models: Sequence[PolicyModel], optimization: Optimization, *, is_loading: bool) -> dict[str, Any]:
    weights = _weights(models)
    with _without_padding(optimization):
        optimizer = optimization.optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=_metadata())
    return {"model": weights, "optimizer": optimizer, "scheduler": optimization.scheduler.state_dict()}


@contextmanager
def _without_padding(optimization: Optimization) -> Iterator[None]:
    """Have a parameter's place in its buffer count no padding of the buckets before it.

    megatron-core gathers what the ranks hold of a buffer without the padding, but takes a parameter's part by its place
    with it: behind a padded bucket Adam would be given the state of others after a resume.
    """
    padded = [(buffer, buffer.param_index_map) for each in _sharded_optimizers(optimization) for buffer in each.buffers]
    for buffer, places in padded:
        shifts, num_before = [], 0
        for bucket in buffer.buckets:
            shifts.append(bucket.offset - num_before)
            num_before += bucket.numel_unpadded
        buffer.param_index_map = {
            parameter: (start - shifts[bucket], end - shifts[bucket], bucket)
            for parameter, (start, end, bucket) in places.items()
        }
    try:
        yield
    finally:
        for buffer, places in padded:
            buffer.param_index_map = places


def _weights(models: Sequence[PolicyModel]) -> dict[str, Any]:
    return {str(chunk): model.sharded_state_dict(metadata=_metadata()) for chunk, model in enumerate(models)}


def _read_lent_weights(weights: dict[str, Any], lending: Lending) -> None:
    """Have the parts of a state dict point to host memory where their own is lent."""

    def read(part: Any) -> Any:
        if isinstance(part, (ShardedTensor, ShardedTensorFactory)) and isinstance(part.data, torch.Tensor):
            part.data = lending.on_host(part.data)
        return part

    dict_list_map_inplace(read, weights)


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        # By gloo to the host of the one rank that writes it. Otherwise every rank gathers the whole state, on its GPU:
        # 4 bytes per parameter at a time, where the engines have all that training leaves.
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _sharded_optimizers(optimization: Optimization) -> list[distrib_optimizer.DistributedOptimizer]:
    """Return those of which each data-parallel rank has a share."""
    return [each for each in optimization.optimizers if isinstance(each, distrib_optimizer.DistributedOptimizer)]


def _torch_sharded_optimizers(optimization: Optimization) -> list[distrib_optimizer.DistributedOptimizer]:
    """Return the distributed ones that run torch's Adam, whose state megatron-core does not fully load.

    Empty where Transformer Engine or Apex has a fused one.
    """
    return [] if distrib_optimizer.HAVE_APEX_OR_TE else _sharded_optimizers(optimization)


def _without_gathered_elsewhere(common: dict[str, Any]) -> dict[str, Any]:
    """Return what every rank should hold alike.

    The first rank of a data-parallel group gathers what the distributed optimizer holds of it; the others have None
    there, which megatron-core would take for a difference and warn of at each checkpoint.
    """
    return {
        name: _without_gathered_elsewhere(value) if isinstance(value, dict) else value
        for name, value in common.items()
        if not (name == "param_state" and value is None)
    }


def _name_step_zero(state: dict[str, Any]) -> None:
    """Add the step all parameters share where megatron-core left it out because it is 0, but will ask for it.

    For torch's Adam: a fused one keeps the step with its groups, and takes no other.
    """
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    adam = state.get("optimizer", state)
    if isinstance(adam.get("state"), dict) and adam["state"]:
        adam["state"].setdefault("common_step", torch.tensor(0.0))


def _place_step(state: dict[str, Any]) -> None:
    """Put Adam's step where this machine's Adam keeps it: torch's per parameter, a fused one per group. The checkpoint
    may be from a machine with the other kind, such as one without a GPU.
    """
    adam = state.get("optimizer", state)
    groups, shared = adam["param_groups"], adam.get("state")
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        for group in groups:
            group.setdefault("step", 0)
        if isinstance(shared, dict):
            shared.setdefault("common_step", torch.tensor(float(groups[0]["step"])))
    elif isinstance(shared, dict) and "common_step" in shared:
        step = int(shared.pop("common_step"))
        for group in groups:
            group["step"] = step


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
    for sharded in _torch_sharded_optimizers(optimization):
        for state in sharded.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()
