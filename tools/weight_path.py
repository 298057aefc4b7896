"""The weight refresh without engines, for bench_refresh.py: weights gathered, converted, in buckets with checksums."""

import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import torch

from megatron_p2o.config.tree import RolloutConfig
from megatron_p2o.interfaces import NamedWeights
from megatron_p2o.policy.training.ranks import MegatronPolicy
from megatron_p2o.rollout.buckets.device_memory import BINDINGS, can_share_device_memory, checksum, finish_copies
from megatron_p2o.rollout.buckets.staging import laid_out
from megatron_p2o.rollout.refresh.outlet import NUM_SPANS, WeightOutlet, open_outlet
from megatron_p2o.rollout.refresh.weight_sync import WeightSync
from megatron_p2o.rollout.servers.client import EngineClient

T = TypeVar("T")
Seconds = dict[str, float]


class NoEngines:
    """A fleet of none: every call has been answered by all of them."""

    def call_every_engine(self, call: Callable[[str, EngineClient], Awaitable[T]]) -> Future[dict[str, T]]:
        answers: Future[dict[str, T]] = Future()
        answers.set_result({})
        return answers


def measure_path(
    policy: MegatronPolicy, bucket_mib: Sequence[int], repeats: int, folder: Path
) -> tuple[list[dict[str, Any]], str]:
    """Check that each way leaves the weights as they are, then time all in turns.

    Returns:
        (way, bucket_mib, is_verified, first, later: a list of seconds) of each, and why a way is missing or "".
    """
    missing = device_way_problem()
    with ExitStack() as stack:
        outlet = None if missing else opened_outlet(policy, max(bucket_mib))
        arms: list[dict[str, Any]] = [{"way": "gather", "bucket_mib": None, "is_verified": False}]
        sends: list[Callable[[NamedWeights, int], Seconds]] = [gathered]
        for mib in bucket_mib:
            ways = {"ours, host": None} | ({"ours, device": outlet} if outlet is not None else {})
            for name, way in ways.items():
                sync = WeightSync(
                    NoEngines(), folder, tensor_parallel=1, answer_timeout_s=1.0, bucket_bytes=mib << 20, outlet=way
                )
                stack.callback(sync.close)
                for is_verified in (True, False):
                    arms.append({"way": name, "bucket_mib": mib, "is_verified": is_verified})
                    sends.append(partial(send_ours, sync, is_verified))
                # The checks run on memory of their own size only: every weight, as a run of this bucket size puts it.
                check_host(sync, policy.weights())
                if way is not None:
                    check_device(way, policy.weights(), max(bucket_mib) << 20)
        versions = count(1)
        firsts = [send(policy.weights(), next(versions)) for send in sends]
        laters = [[send(policy.weights(), next(versions)) for send in sends] for _ in range(repeats)]
    return [
        arm | {"first": first, "later": list(later)}
        for arm, first, later in zip(arms, firsts, zip(*laters, strict=True), strict=True)
    ], missing


def device_way_problem() -> str:
    """Return why this machine's GPU cannot take buckets, or ""; without CUDA memory files stand in."""
    if not torch.cuda.is_available() or can_share_device_memory():
        return ""
    return f"ours, device: needs the package {BINDINGS}, which is not installed"


def opened_outlet(policy: MegatronPolicy, bucket_mib: int) -> WeightOutlet:
    """Return the way over the device, to the engine that would be there."""
    transfer = RolloutConfig(weight_transfer="device", num_engines=1, refresh_bucket_mib=bucket_mib)
    outlet = open_outlet(replace(policy._config, rollout=transfer), policy.largest_weight_bytes)
    assert outlet is not None
    return outlet


def gathered(weights: NamedWeights, version: int) -> Seconds:
    """Gather and convert alone."""
    start = time.monotonic()
    for _ in weights:
        pass
    finish_copies()
    return {"total_s": time.monotonic() - start}


def send_ours(sync: WeightSync, is_verified: bool, weights: NamedWeights, version: int) -> Seconds:
    stats = asdict(sync.refresh(weights, version, verify=is_verified))
    return {key: value for key, value in stats.items() if key.endswith("_s")}


def check_host(sync: WeightSync, weights: NamedWeights) -> None:
    """Exit unless the copies in host memory have the checksums of the trainer's own weights."""
    for bucket in sync.stage(weights, verify=True):
        message = bucket.message(0, bucket.address, verify=True)
        assert message.checksums is not None
        for entry, expected in zip(message.entries, message.checksums, strict=True):
            if checksum(entry.view(bucket.content)) != expected:
                raise SystemExit(f"{entry.name} lies in host memory otherwise than in the trainer: nothing was timed")


def check_device(outlet: WeightOutlet, weights: NamedWeights, bucket_bytes: int) -> None:
    """Exit unless every weight lies on the device as in the trainer."""
    for index, entry, tensor in laid_out(weights, bucket_bytes):
        outlet.put(index, entry, tensor)
        finish_copies()
        if checksum(entry.view(outlet._spans[index % NUM_SPANS].content)) != checksum(tensor):
            raise SystemExit(f"{entry.name} lies on the device otherwise than in the trainer: nothing was timed")
        del tensor
