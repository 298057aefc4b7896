"""Weights left on every rank's own device: here in memory files, for engines of this process. Two trainer ranks."""

import os
import resource
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_p2o.config.tree import Config, ParallelConfig
from megatron_p2o.interfaces import NamedWeights
from megatron_p2o.policy.rank_channel import PolicyError
from megatron_p2o.policy.training.ranks import build_policy
from megatron_p2o.rollout.buckets.weight_message import LoadMessage, parse
from megatron_p2o.rollout.refresh.outlet import WeightOutlet, engine_devices, open_outlet
from megatron_p2o.rollout.refresh.refresh_verdict import RefreshFailed
from megatron_p2o.rollout.refresh.weight_sync import WeightSync
from megatron_p2o.rollout.servers.answers import EngineRefused
from megatron_p2o.testing.distributed import run_gloo_ranks
from megatron_p2o.testing.engines.sglang_server import FusedModel
from megatron_p2o.testing.engines.sglang_server import fused_model_weights as weights
from megatron_p2o.testing.fakes import fake_config
from megatron_p2o.testing.policy_oracle import policy_config
from megatron_p2o.testing.tiny_model import write_tiny_qwen3
from megatron_p2o.testing.weight_fleet import InProcessClient, InProcessFleet, assert_holds

BUCKET_BYTES = 48
"""The weights of `FusedModel` make three buckets."""

CONFIG = fake_config({"rollout.weight_transfer": "device", "rollout.num_engines": 2})


class Engine(InProcessClient):
    """Notes where it was sent to; refuses the second bucket when told to."""

    def __init__(self) -> None:
        super().__init__(FusedModel())
        self.is_refusing = False
        self.paths: set[str] = set()

    def load(self, named_tensors: list[tuple[str, Tensor]]) -> None:
        message = parse(named_tensors[0][0])
        if isinstance(message, LoadMessage):
            self.paths.add(message.address.path)
            if self.is_refusing and message.index == 1:
                raise EngineRefused("not now")
        super().load(named_tensors)


def opened(config: Config) -> WeightOutlet:
    outlet = open_outlet(config, largest_weight_bytes=60)
    assert outlet is not None
    outlet._bucket_bytes = BUCKET_BYTES  # the setting counts in MiB
    return outlet


def conducted(outlet: WeightOutlet, engines: list[Engine], folder: Path) -> WeightSync:
    fleet = InProcessFleet(*engines)
    sizes: Any = {"tensor_parallel": 1, "answer_timeout_s": 5, "bucket_bytes": BUCKET_BYTES}
    return WeightSync(fleet, folder, outlet=outlet, **sizes)


def process_of(path: str) -> int:
    return int(path.split("/")[2])


def gathered(sent: Sequence[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield weights as a policy does: all ranks together."""
    for name, weight in sent:
        dist.barrier()
        yield name, weight.clone()


def given_back(sent: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield weights and check that none is held at the end, when a policy gives their memory back to the GPU."""
    held: list[weakref.ref[Tensor]] = []
    for name, weight in sent:
        held.append(weakref.ref(weight))
        yield name, weight
        del weight
    assert not [reference for reference in held if reference() is not None]


def refresh_three_times(folder: Path) -> Any:
    outlet = opened(CONFIG)
    if dist.get_rank() != 0:
        for version in (1, 2, 3):
            outlet.take(given_back(gathered(weights(version))))
            dist.barrier()  # as rank 0's next command does
        return os.getpid()
    engines = [Engine(), Engine()]
    sync = conducted(outlet, engines, folder)
    for version in (1, 2, 3):
        sync.refresh(given_back(gathered(weights(version))), version, verify=True)
        for engine in engines:
            assert_holds(engine.model, weights(version))
            assert engine.version == version
        dist.barrier()
    newcomer = Engine()
    with pytest.raises(StopIteration):
        sync.restore("engine 1", newcomer, verify=True).send(None)  # pyright: ignore[reportArgumentType]
    assert_holds(newcomer.model, weights(3))
    return os.getpid(), [{process_of(path) for path in engine.paths} for engine in engines], len(engines[1].paths)


def test_every_engine_takes_the_weights_that_its_own_rank_left(tmp_path: Path) -> None:
    (first, sources, num_paths), second = run_gloo_ranks(refresh_three_times, 2, tmp_path)
    assert sources == [{first}, {second}]
    assert num_paths == 2, "three buckets take turns in two spans"


def refuse_then_fail_then_accept(folder: Path) -> None:
    outlet = opened(CONFIG)
    more = [*weights(3), *((f"more.{number}", torch.ones(10)) for number in range(3))]
    if dist.get_rank() != 0:
        for sent in (weights(1), weights(2), more, weights(4)):
            outlet.take(gathered(sent))
            dist.barrier()
        return
    engines = [Engine(), Engine()]
    engines[0].is_refusing = True
    sync = conducted(outlet, engines, folder)
    remaining = gathered(weights(1))
    with pytest.raises(RefreshFailed, match="version 1: not now"):
        sync.refresh(remaining, 1, verify=True)
    assert next(remaining, None) is None
    engines[0].is_refusing = False
    dist.barrier()
    sync.refresh(gathered(weights(2)), 2, verify=True)
    for engine in engines:
        assert_holds(engine.model, weights(2))
    dist.barrier()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(first_free := os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (first_free, limits[1]))
    with pytest.raises(OSError, match="Too many open files"):  # the fourth bucket is the first that has no memory yet
        sync.refresh(gathered(more), 3, verify=True)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    dist.barrier()
    sync.refresh(gathered(weights(4)), 4, verify=True)
    for engine in engines:
        assert_holds(engine.model, weights(4))
    dist.barrier()


def test_a_refresh_that_fails_at_an_engine_or_here_leaves_the_ranks_in_step(tmp_path: Path) -> None:
    run_gloo_ranks(refuse_then_fail_then_accept, 2, tmp_path)


def put_out_of_reach(folder: Path) -> list[str]:
    outlet = opened(CONFIG)
    if dist.get_rank() != 0:
        for version in (1, 2, 3):
            outlet.take(gathered(weights(version)))
            dist.barrier()
        return []
    lost = replace(outlet.addresses("engine 1", 0)[0], path="/proc/self/fd/none")
    outlet._addresses = {**outlet._addresses, "engine 1": [[lost, lost]]}
    engines = [Engine(), Engine()]
    sync = conducted(outlet, engines, folder)
    with pytest.raises(RefreshFailed, match=r"version 1: engine 1 \(rank 0\) could not open a bucket: .*/fd/none"):
        sync.refresh(gathered(weights(1)), 1, verify=True)
    assert not engines[0].version and not engines[1].version
    dist.barrier()
    outlet.is_only_way = False
    for version in (2, 3):
        sync.refresh(gathered(weights(version)), version, verify=True)
        for engine in engines:
            assert_holds(engine.model, weights(version))
            assert engine.version == version
        dist.barrier()
    return sorted(engines[1].paths - engines[0].paths)


def test_engines_that_cannot_open_the_memory_take_the_host_s_if_the_way_is_not_set(tmp_path: Path) -> None:
    assert run_gloo_ranks(put_out_of_reach, 2, tmp_path)[0] == ["/proc/self/fd/none"]


def fail_while_taking(folder: Path) -> None:
    config = policy_config(write_tiny_qwen3(folder / str(os.getpid())), parallel=ParallelConfig(data=2, timeout_s=30))
    policy = build_policy(replace(config, rollout=CONFIG.rollout))
    outlet = open_outlet(CONFIG, policy.largest_weight_bytes, policy.meeting)
    assert outlet is not None

    def take(weights: NamedWeights) -> None:
        raise MemoryError("a GPU is full")

    policy.deliver_to(take)
    told = r"policy\.deliver failed on rank 1: MemoryError: a GPU is full"
    if not policy.is_conductor:
        with pytest.raises(PolicyError, match=told):
            policy.serve()
        return
    remaining = policy.weights()
    next(remaining)
    with pytest.raises(PolicyError, match=told):
        outlet.meet()
    with pytest.raises(PolicyError, match=told):
        next(remaining)
    policy.close()  # without those who are gone


def test_a_rank_that_fails_while_it_takes_weights_is_named_where_ranks_meet(tmp_path: Path) -> None:
    run_gloo_ranks(fail_while_taking, 2, tmp_path)


def drift(folder: Path) -> None:
    outlet = opened(CONFIG)

    def drifted() -> Iterator[tuple[str, Tensor]]:
        for name, weight in weights(1):
            yield name, weight * (1 + 2**-20) if name == "norm.weight" else weight

    if dist.get_rank() != 0:
        outlet.take(drifted())
        return
    sync = conducted(outlet, [Engine(), Engine()], folder)
    with pytest.raises(RefreshFailed, match=r"engine 1 .*1 weights that differ from the trainer's: norm\.weight$"):
        sync.refresh(weights(1), 1, verify=True)


def test_a_rank_whose_weights_are_not_rank_0_s_is_found_out(tmp_path: Path) -> None:
    run_gloo_ranks(drift, 2, tmp_path)


def open_without_enough_ranks() -> bool:
    os.environ["GROUP_WORLD_SIZE"] = "2"  # the second node's ranks have not been started
    with pytest.raises(ValueError, match="no trainer rank is on node 1's device 0, where engines are"):
        open_outlet(CONFIG, largest_weight_bytes=60)
    return open_outlet(fake_config(), largest_weight_bytes=60) is None


def test_an_engine_without_a_trainer_rank_on_its_device_is_an_error() -> None:
    assert run_gloo_ranks(open_without_enough_ranks, 1) == [True]


@pytest.mark.parametrize(
    ("num_nodes", "local_ranks", "tensor_parallel", "expected"),
    [
        (1, 4, 2, [[(0, 0), (0, 1)], [(0, 2), (0, 3)]]),
        (2, 8, 4, [[(0, 0), (0, 1), (0, 2), (0, 3)], [(1, 0), (1, 1), (1, 2), (1, 3)]]),
        (1, 1, 1, [[(0, 0)], [(0, 0)]]),
    ],
)
def test_engine_ranks_take_the_devices_of_their_node_in_turn(
    num_nodes: int, local_ranks: int, tensor_parallel: int, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GROUP_WORLD_SIZE", str(num_nodes))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_ranks))
    config = fake_config({"rollout.num_engines": 2, "rollout.tensor_parallel": tensor_parallel})
    assert list(engine_devices(config).values()) == expected
