"""Every pass of the policy on fake CUDA tensors: prints its waits, collectives and Triton launches as JSON.

    python passes.py FOLDER LAYOUT...

Every tensor is fake and on cuda:0 (`hopper`), and a rank is without the others (`ranks`); `LAYOUTS` are ranks.
FOLDER holds a model and checkpoints of it, `whole` and, of the distributed optimizer, `sharded`. Samples are packed by
the CPU before: what a pack looks like decides the shapes.
"""

import gc
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from fake_gpu.hopper import CUDA, LAUNCHES, pretend_hopper
from fake_gpu.ranks import COLLECTIVES, join, stand_alone
from fake_gpu.waits import PINNED, Device, FromHost, taken
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

TOKENS = (30, 170, 1, 200, 90, 7, 8)
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One rank of a run."""

    rank: int = 0
    parallel: dict[str, Any] = field(default_factory=dict)
    megatron: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)
    is_later: bool = False
    """Whether the samples come with old log-probs, as in a step's second update."""
    lend: str = "gradients"
    """`optimizer.lend`."""


LAYOUTS = {
    "one GPU": Layout(),
    "recomputed, later": Layout(megatron=RECOMPUTE, is_later=True),
    "with a reference": Layout(objective={"kl_coefficient": 0.1}),
    "gspo, later": Layout(objective={"surrogate": "gspo"}, is_later=True),
    "cispo": Layout(objective={"surrogate": "cispo"}),
    "sharded": Layout(parallel={"distributed_optimizer": True}),
    "tensor": Layout(rank=1, parallel={"tensor": 2}),
    "first stage": Layout(rank=0, parallel={"pipeline": 2}),
    "last stage": Layout(rank=1, parallel={"pipeline": 2}),
    "context": Layout(rank=1, parallel={"context": 2}),
    "data": Layout(rank=1, parallel={"data": 2, "distributed_optimizer": True}),
    "lends nothing": Layout(lend="none"),
    "lends optimizer, sharded": Layout(parallel={"distributed_optimizer": True}, lend="optimizer"),
    "lends all": Layout(lend="all"),
    "lends all, sharded": Layout(parallel={"distributed_optimizer": True}, lend="all"),
}


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    # In a build without CUDA not everything that belongs to a device can be freed: cycles stay until the process ends.
    gc.disable()
    gc.collect = lambda generation=2: 0  # Megatron asks for it
    pretend_hopper()
    stand_alone()
    stand_in_for_the_host()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        reports = {name: run(LAYOUTS[name], folder, mode) for name in names}
    print(json.dumps(reports), flush=True)
    os._exit(0)


def stand_in_for_the_host() -> None:
    """Replace what reads or counts on the CPU's own numbers."""
    from megatron.core.dist_checkpointing import state_dict_utils, validation
    from megatron.core.optimizer import optimizer
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    from megatron_p2o.policy.model.layer_choice import machine_capabilities
    from megatron_p2o.policy.training import checkpoint
    from megatron_p2o.policy.weights.hf_directory import WeightFiles
    from megatron_p2o.rollout.buckets import staging

    exchange = P2PCommunicator._communicate_shapes

    def exchange_shapes(self: Any, *tensors: Any, **named: Any) -> Any:
        exchange(self, *tensors, **named)
        return STAGE_SHAPE, STAGE_SHAPE

    P2PCommunicator._communicate_shapes = exchange_shapes
    WeightFiles.read = of_real_numbers(WeightFiles.read)
    checkpoint.save_random_state = of_real_numbers(checkpoint.save_random_state)
    checkpoint.load_random_state = of_real_numbers(checkpoint.load_random_state)
    # It would find that all ranks write the same.
    for module in (state_dict_utils, validation):
        module.validate_sharding_integrity = lambda *args, **kwargs: None
    optimizer.MegatronOptimizer._extract_common_per_param_step = staticmethod(lambda state: 1.0)
    if machine_capabilities().transformer_engine_problem is None:
        from transformer_engine.pytorch import DotProductAttention, _Module

        DotProductAttention.forward = attention_shape
        _Module.get_extra_state = of_real_numbers(_Module.get_extra_state)
    staging.pinned_file = lambda num_bytes: SimpleNamespace(
        content=torch.empty(num_bytes, dtype=torch.uint8), address=SimpleNamespace(num_bytes=num_bytes)
    )


def of_real_numbers(function: Any) -> Any:
    """Return a function that reads or writes files as ever."""

    def call(*args: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args)

    return call


def attention_shape(self: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **options: Any) -> Tensor:
    """In the place of Transformer Engine's attention: [T, H*K] from query [T, H, K] and key, value [T, G, K]."""
    boundaries = [options["cu_seqlens_q"], options["cu_seqlens_kv"]]
    assert {each.device for each in (query, key, value, *boundaries)} == {CUDA}
    assert query.dtype == key.dtype == value.dtype == torch.bfloat16 and boundaries[0].dtype == torch.int32
    assert options["qkv_format"] == "thd" and options["attn_mask_type"] == "padding_causal"
    return (query + (key + value).mean()).flatten(1)


STAGE_SHAPE: list[int] = []
"""Of what pipeline stages pass on: [T, 1, D]."""


def run(layout: Layout, folder: Path, mode: FakeTensorMode) -> dict[str, Any]:
    """Return what each pass of one rank did."""
    from megatron_p2o.config.tree import ObjectiveConfig, OptimizerConfig, ParallelConfig
    from megatron_p2o.policy.model.parallel import end_parallel, initialize_parallel
    from megatron_p2o.testing.policy_oracle import policy_config

    parallel = ParallelConfig(**layout.parallel)
    config = replace(
        policy_config(
            folder / "model",
            parallel=parallel,
            dtype="bfloat16",
            objective=ObjectiveConfig(**layout.objective),
            optimizer=OptimizerConfig(lend=layout.lend),
        ),
        megatron=layout.megatron,
    )
    with unset_fake_temporarily():
        join(layout.rank, parallel.world_size)
        ranks = initialize_parallel(parallel, seed=0)
    report: dict[str, Any] = {}
    with FromHost(), Device() as device:
        for name in passes(config, ranks, device, mode, folder, layout.is_later):
            counts = {"collectives": COLLECTIVES, "launches": LAUNCHES, "pinned": PINNED}
            report[name] = {"waits": taken(), **{kind: counted(counter) for kind, counter in counts.items()}}
    with unset_fake_temporarily():
        end_parallel(ranks)
        torch.distributed.destroy_process_group()
    return report


def counted(counter: Any) -> dict[str, int]:
    """Return the counts since the last call."""
    counts = {key if isinstance(key, str) else " in ".join(key): count for key, count in sorted(counter.items())}
    counter.clear()
    return counts


def passes(
    config: Any, ranks: Any, device: Device, mode: FakeTensorMode, folder: Path, is_later: bool
) -> Iterator[str]:
    """Make each pass and yield its name."""
    from megatron_p2o.policy.model.layer_choice import machine_capabilities
    from megatron_p2o.policy.training.checkpoint import stage
    from megatron_p2o.policy.training.rank_samples import split_over_ranks
    from megatron_p2o.policy.training.shard import PolicyShard
    from megatron_p2o.testing.policy_oracle import random_samples

    shard = PolicyShard(config, ranks, machine_capabilities())
    check_parameters(shard)
    yield "build"
    samples = random_samples(TOKENS, vocab_size=1000)
    if config.objective.kl_coefficient:
        samples = [replace(sample, reference_logprobs=sample.sampling_logprobs) for sample in samples]
    old = [sample.sampling_logprobs for sample in samples] if is_later else None
    part = split_over_ranks(samples, old, config.parallel, 10**6, shard.architecture)[ranks.data_rank]
    shard._micro_batches = lambda rank_samples: [packed_batch(shard, rank_samples, device, mode)]
    reply = shard.update(part, sum(TOKENS), len(samples))
    assert reply.outcome.outcome == "applied" and (reply.result is not None) == shard.speaks
    check_parameters(shard)
    yield "update"
    assert set(shard.logprobs(part)) == (set(part.indices) if shard.speaks else set())
    yield "logprobs"
    if config.objective.kl_coefficient:
        assert set(shard.reference_logprobs(part)) == set(part.indices)
        yield "reference_logprobs"
    assert shard.diverged() == []
    yield "diverged"
    yield from refreshes(shard, folder)
    (folder / "staged").mkdir(exist_ok=True)
    staged = stage(shard.models, shard.optimization, folder / "staged", ranks.control).values()
    tensors = [part.tensor for entry in staged for part in getattr(entry, "local_shards", list)()]
    # The first of the ranks with the same part of the model writes all of it.
    is_writer = ranks.data_rank == ranks.context_rank == 0
    assert {tensor.device.type for tensor in tensors} == ({"cpu"} if is_writer else set())
    yield "stage"
    check_lent(shard, config.optimizer)
    assert shard.update(part, sum(TOKENS), len(samples)).outcome.outcome == "applied"
    check_parameters(shard)
    yield "update of what was lent"
    if ranks.rank == 0:
        shard.load(folder / ("sharded" if config.parallel.distributed_optimizer else "whole"))
        check_parameters(shard)
        yield "load"


def check_parameters(shard: Any) -> None:
    """Every parameter, gradient and state of Adam is on the GPU, in its type."""
    for model in shard.models:
        for name, parameter in model.named_parameters():
            assert parameter.device == parameter.main_grad.device == CUDA, name
            assert (parameter.dtype, parameter.main_grad.dtype) == (torch.bfloat16, torch.float32), name
    for optimizer in getattr(shard.optimization.optimizer, "chained_optimizers", [shard.optimization.optimizer]):
        for parameter, state in optimizer.optimizer.state.items():
            moments = [parameter, state["exp_avg"], state["exp_avg_sq"]]
            assert {(tensor.device, tensor.dtype) for tensor in moments} == {(CUDA, torch.float32)}


def check_lent(shard: Any, settings: Any) -> None:
    """Only what is not lent has memory on the GPU."""
    parameters = [parameter for model in shard.models for parameter in model.parameters()]
    (state,) = [each.optimizer.state for each in shard.optimization.optimizers]
    moments = [tensor for each in state.values() for tensor in (each["exp_avg"], each["exp_avg_sq"])]
    kinds = [
        (settings.lends_parameters, parameters),
        (settings.lends_gradients, [parameter.main_grad for parameter in parameters]),
        (settings.lends_state, [*state, *moments]),
    ]
    for is_lent, tensors in kinds:
        assert all((tensor.untyped_storage().nbytes() == 0) == is_lent for tensor in tensors)


def refreshes(shard: Any, folder: Path) -> Iterator[str]:
    """Send the weights through host memory with checksums, then over the device."""
    from megatron_p2o.rollout.refresh.outlet import WeightOutlet
    from megatron_p2o.rollout.refresh.weight_sync import WeightSync

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in shard.export():
            assert tensor.device == CUDA and tensor.dtype == torch.bfloat16, name
            yield name, tensor

    options = {"tensor_parallel": 1, "answer_timeout_s": 1.0, "bucket_bytes": 1 << 20}
    stats = WeightSync(NoEngines(), folder, **options).refresh(weights(), 1, verify=True)
    assert stats.num_bytes > 0
    yield "refresh through the host"
    spans = [SimpleNamespace(content=torch.empty(8 << 20, dtype=torch.uint8, device=CUDA)) for _ in range(2)]
    WeightOutlet(shard.ranks.control, spans, {}, 1 << 20, is_only_way=True).take(weights())
    yield "refresh over the device"


class NoEngines:
    """A fleet of none: every call has been answered by all of them."""

    def call_every_engine(self, call: Any) -> Any:
        from concurrent.futures import Future

        answers: Future[Any] = Future()
        answers.set_result({})
        return answers


def packed_batch(shard: Any, rank_samples: Any, device: Device, mode: FakeTensorMode) -> Any:
    """Return a rank's samples in one pack on the device."""
    from megatron_p2o.policy.training.forward import length_multiple, make_micro_batches

    config = shard.models[0].config
    with unset_fake_temporarily():
        (batch,) = make_micro_batches(rank_samples, torch.device("cpu"), length_multiple(config))
        device.num_masked = int(batch.part.loss_mask_T.sum())
        STAGE_SHAPE[:] = [len(batch.token_ids_T), 1, config.hidden_size]
    layout = batch.layout
    # As `pack_layout` leaves them on a GPU.
    layout.order_T = layout.rank_T = None
    layout.key_rows = layout.key_rows if shard.ranks.context_rank else None
    packed = on_device(batch, mode)
    taken()  # a pass begins with it, when the device has no work
    return packed


def on_device(value: Any, mode: FakeTensorMode) -> Any:
    """Return a record whose tensors are on the GPU."""
    if isinstance(value, Tensor):
        return mode.from_tensor(value).to(CUDA)
    if not is_dataclass(value):
        return value
    return replace(value, **{each.name: on_device(getattr(value, each.name), mode) for each in fields(value)})


if __name__ == "__main__":
    main()
