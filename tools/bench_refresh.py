"""Time how new weights reach SGLang engines: our refresh beside SGLang's own updates, from tensors and from disk.

    python tools/bench_refresh.py --shape qwen3-4b --bucket-mib 512 2048 --json tools/results/h200_refresh_4b.json
    python tools/bench_refresh.py --shape tiny --engines 1 --repeats 3
    python tools/bench_refresh.py --shape qwen3-4b --engines 0     # without SGLang: the trainer's part

One trainer process holds the policy and hands its weights (gathered, converted, named as on Hugging Face) to real
engines beside it. `ours` is the trainer's `WeightSync.refresh`, on the GPU or through host memory
(`rollout.weight_transfer`; without CUDA both are memory files, and `device` fills one more). `sglang tensor` sends
flattened buckets as other trainers do: a bucket is one tensor that both processes share (CUDA IPC on a GPU), the next
one is made when it has been loaded, nothing is compared. `sglang disk` writes a directory, and the engines read it. The
ways take turns within one run; wall clock. Before a way is timed it must restore, from halved weights, the log-probs
that the engine had with the same weights when it was started. Our first run, which maps memory and records copies, is
shown apart.

With `--engines 0` the refresh runs as far as it goes without an engine: weights are gathered (`gather` alone is timed
too), converted and laid out in buckets in host and device memory, with and without checksums. Each way must leave all
weights as they are first.
"""

import argparse
import base64
import io
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from statistics import median, quantiles
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing import set_sharing_strategy

sys.path.insert(0, str(Path(__file__).resolve().parent))  # where PYTHONSAFEPATH leaves it out

from random_policy import SHAPES, bench_config, measured_on, write_random_model  # isort: skip; makes ours importable

from bench.measure import write_result

from weight_path import Seconds, measure_path, send_ours  # isort: skip

from megatron_p2o.config.tree import Config, RolloutConfig
from megatron_p2o.interfaces import NamedWeights
from megatron_p2o.policy.training.ranks import MegatronPolicy, build_policy
from megatron_p2o.policy.weights.hf_directory import write_hf_directory
from megatron_p2o.rollout.broker import Broker
from megatron_p2o.rollout.engines import SglangEngines
from megatron_p2o.rollout.refresh.outlet import open_outlet
from megatron_p2o.rollout.refresh.weight_sync import WeightSync
from megatron_p2o.rollout.servers.client import EngineClient
from megatron_p2o.rollout.start import start_engines
from megatron_p2o.types import SamplingParams

T = TypeVar("T")
TIMEOUT_S = 600.0
PROBES = [np.arange(10 * number + 1, 10 * number + 9, dtype=np.int32) for number in range(4)]
"""Prompts whose next token's log-prob shows which weights an engine holds."""

LOGPROB_GATE = {"cpu": 1e-5, "cuda": 2e-2}
"""Largest difference of the probes' log-probs for the same weights: float32, and eight bits of mantissa."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """How weights reach the engines."""

    name: str
    bucket_mib: int | None
    is_verified: bool
    send: Callable[[NamedWeights, int], Seconds]
    """(weights, version) to what it took, `total_s` among it; the engines serve the version then."""


def main() -> None:
    arguments = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    set_sharing_strategy("file_system")  # SGLang cannot take torch's default from a process that is not its parent
    result: dict[str, Any] = {"shape": arguments.shape, "repeats": arguments.repeats}
    result["environment"] = measured_on(device) | {"clock": "wall clock"}
    with tempfile.TemporaryDirectory(prefix="bench_refresh_") as folder:
        model_path = write_random_model(Path(folder), arguments.shape, device)
        config = bench_config(model_path, 512, device)
        with closing(build_policy(config)) as policy:
            sizes = [tensor.nbytes for _, tensor in policy.weights()]
            result |= {"num_tensors": len(sizes), "num_bytes": sum(sizes), "arms": []}
            for num_engines in arguments.engines:
                if num_engines == 0:
                    result["arms"] += arms_without_engines(policy, Path(folder), arguments, result)
                    continue
                run_dir = Path(folder) / f"{num_engines}-engines"
                with start_engines(engine_config(config, num_engines, device), run_dir, [0]) as engines:
                    arms = measure(engines, policy, run_dir, arguments, device)
                result["arms"] += [{"num_engines": num_engines, **arm} for arm in arms]
    print(table(result))
    write_result(arguments.json, result)


def parse_arguments() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-4b" if on_gpu else "tiny")
    parser.add_argument(
        "--engines", type=int, nargs="+", default=[1] if on_gpu else [1, 2], help="one run for each; 0: none is needed"
    )
    parser.add_argument("--bucket-mib", type=int, nargs="+", default=[512], help="rollout.refresh_bucket_mib, each")
    parser.add_argument("--repeats", type=int, default=20, help="of each way, after the first")
    parser.add_argument("--json", type=Path, help="where to write the result")
    return parser.parse_args()


def arms_without_engines(
    policy: MegatronPolicy, folder: Path, arguments: argparse.Namespace, result: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return the arms of `--engines 0`; `result` is told which is missing."""
    arms, result["missing"] = measure_path(policy, arguments.bucket_mib, arguments.repeats, folder)
    return [
        {
            "num_engines": 0,
            **arm,
            "first": arm["first"] if arm["is_verified"] else None,
            "later": {key: spread([seconds[key] for seconds in arm["later"]]) for key in arm["first"]},
        }
        for arm in arms
    ]


def engine_config(config: Config, num_engines: int, device: torch.device) -> Config:
    """Return the settings of engines that serve nothing but the probes."""
    rollout = RolloutConfig(
        num_engines=num_engines, max_running_requests=8, max_total_tokens=2048, stall_timeout_s=TIMEOUT_S
    )
    return replace(config, rollout=rollout, sglang={"disable_cuda_graph": True} if device.type == "cuda" else {})


def measure(
    engines: SglangEngines, policy: MegatronPolicy, run_dir: Path, arguments: argparse.Namespace, device: torch.device
) -> list[dict[str, Any]]:
    """Check every way, then time them in turns."""
    versions = count(1)
    with ExitStack() as stack:
        ways = ways_to(engines.broker, policy, run_dir, arguments.bucket_mib, stack)
        scramble = next(way for way in ways if way.name == "sglang tensor").send
        probe = partial(probed, engines.broker, engines.broker.num_engines, run_dir / "engines")
        expected = probe()
        firsts: list[Seconds] = []
        for way in ways:
            scramble(((name, tensor / 2) for name, tensor in policy.weights()), next(versions))
            if np.abs(probe() - expected).min() <= LOGPROB_GATE[device.type]:
                raise SystemExit("halved weights give the log-probs of whole ones: the probes show nothing")
            firsts.append(way.send(policy.weights(), next(versions)))
            difference = np.abs(probe() - expected).max()
            if not difference <= LOGPROB_GATE[device.type]:
                raise SystemExit(f"{way.name}: log-probs are off by {difference:g}: the weights did not arrive")
        laters = [[way.send(policy.weights(), next(versions)) for way in ways] for _ in range(arguments.repeats)]
    return [
        {
            "way": way.name,
            "bucket_mib": way.bucket_mib,
            "is_verified": way.is_verified,
            # Nothing else of a way is done once only, and without checks its buckets are those of the way before.
            "first": first if way.name.startswith("ours") and way.is_verified else None,
            "later": {key: spread([seconds[key] for seconds in later]) for key in first},
        }
        for way, first, later in zip(ways, firsts, zip(*laters, strict=True), strict=True)
    ]


def ways_to(
    broker: Broker,
    policy: MegatronPolicy,
    run_dir: Path,
    bucket_mib: Sequence[int],
    stack: ExitStack,
) -> list[Way]:
    """Return the ways into the engines of `broker`; what they hold is given up with `stack`."""
    ways: list[Way] = []
    transfer = RolloutConfig(
        weight_transfer="device", num_engines=broker.num_engines, refresh_bucket_mib=max(bucket_mib)
    )
    outlet = open_outlet(replace(policy._config, rollout=transfer), policy.largest_weight_bytes)
    for mib in bucket_mib:
        by_host, by_device = (
            WeightSync(
                broker,
                run_dir / "engines",
                tensor_parallel=1,
                answer_timeout_s=TIMEOUT_S,
                bucket_bytes=mib << 20,
                outlet=way,
            )
            for way in (None, outlet)
        )
        for name, sync in (("ours, host", by_host), ("ours, device", by_device)):
            stack.callback(sync.close)
            for is_verified in (True, False):
                send = partial(send_ours, sync, is_verified)
                ways.append(Way(name=name, bucket_mib=mib, is_verified=is_verified, send=send))
        send = partial(send_tensors, broker, by_host, mib << 20)
        ways.append(Way(name="sglang tensor", bucket_mib=mib, is_verified=False, send=send))
    send = partial(send_disk, broker, Path(policy._config.model.path), run_dir)
    return [*ways, Way(name="sglang disk", bucket_mib=None, is_verified=False, send=send)]


def send_tensors(broker: Broker, sync: WeightSync, bucket_bytes: int, weights: NamedWeights, version: int) -> Seconds:
    """SGLang's `flattened_bucket`: one tensor and a table of what lies where, loaded by the model's `load_weights`."""
    start = time.monotonic()
    sync.begin()
    groups = grouped(weights, bucket_bytes)
    group: list[tuple[str, Tensor]] | None = next(groups)
    while group is not None:
        bucket, group = flattened(group), next(groups, None)
        is_last = group is None

        async def update(
            name: str, client: EngineClient, bucket: dict[str, Any] = bucket, is_last: bool = is_last
        ) -> None:
            await client.update_weights([serialized(bucket)], "flattened_bucket", is_last)

        finished(broker.call_every_engine(update))
    sync.commit(version)
    return {"total_s": time.monotonic() - start}


def grouped(weights: NamedWeights, num_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Yield runs of weights of at most `num_bytes`, or of one larger weight."""
    group: list[tuple[str, Tensor]] = []
    for name, tensor in weights:
        if group and sum(each.nbytes for _, each in group) + tensor.nbytes > num_bytes:
            yield group
            group = []
        group.append((name, tensor))
    yield group


def flattened(group: Sequence[tuple[str, Tensor]]) -> dict[str, Any]:
    """Return what SGLang's FlattenedTensorBucket is made of."""
    parts = [tensor.detach().contiguous().flatten().view(torch.uint8) for _, tensor in group]
    ends = np.cumsum([part.numel() for part in parts]).tolist()
    table = [
        SimpleNamespace(
            name=name,
            shape=tensor.shape,
            dtype=tensor.dtype,
            start_idx=end - part.numel(),
            end_idx=end,
            numel=part.numel(),
        )
        for (name, tensor), part, end in zip(group, parts, ends, strict=True)
    ]
    return {"flattened_tensor": torch.cat(parts), "metadata": table}


def serialized(bucket: dict[str, Any]) -> str:
    stream = io.BytesIO()
    ForkingPickler(stream).dump(bucket)
    return base64.b64encode(stream.getvalue()).decode()


def send_disk(broker: Broker, source: Path, folder: Path, weights: NamedWeights, version: int) -> Seconds:
    """Write a Hugging Face directory, unsynchronized with the disk, and have the engines read it."""
    directory = folder / f"weights-{version}"

    async def update(name: str, client: EngineClient) -> None:
        request = {"model_path": str(directory), "weight_version": str(version)}
        await client._update("/update_weights_from_disk", request)

    start = time.monotonic()
    write_hf_directory(weights, source, directory)
    finished(broker.call_every_engine(update))
    seconds = {"total_s": time.monotonic() - start}
    shutil.rmtree(directory)
    return seconds


def probed(broker: Broker, num_engines: int, logs: Path) -> np.ndarray:
    """Return [engines, probes] log-probs of the likeliest token after each probe.

    Raises:
        SystemExit: an engine was lost; the message ends with the last lines of the `logs`, which are removed.
    """
    greedy = SamplingParams(temperature=0.0, max_new_tokens=1)

    async def ask(name: str, client: EngineClient) -> list[float]:
        answers = [
            await client.generate(ids, greedy, f"probe-{number}", timeout_s=TIMEOUT_S)
            for number, ids in enumerate(PROBES)
        ]
        return [float(answer.logprobs[0]) for answer in answers]

    answers = finished(broker.call_every_engine(ask))
    if len(answers) != num_engines:
        tails = [f"{log.name}:\n{log_tail(log)}" for log in sorted(logs.glob("*.log"))]
        raise SystemExit("\n".join([f"{num_engines - len(answers)} of {num_engines} engines were lost", *tails]))
    return np.array(list(answers.values()))


def log_tail(log: Path, num_lines: int = 40) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-num_lines:])


def finished(future: Future[T]) -> T:
    return future.result(2 * TIMEOUT_S)


def spread(values: Sequence[float]) -> dict[str, float]:
    fifths = quantiles(values, n=5, method="inclusive") if len(values) > 1 else [values[0]] * 4
    return {"median": median(values), "p20": fifths[0], "p80": fifths[3]}


def table(result: dict[str, Any]) -> str:
    """Return the arms as a Markdown table; all but the rate in ms, medians with their p20-p80."""
    lines = [
        "| engines | way | bucket MiB | checked | first | later | of it: trainer / buckets / engines | GB/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in result["arms"]:
        later = arm["later"]
        total = later["total_s"]
        parts = [later[key]["median"] for key in ("convert_s", "fill_s", "stall_s") if key in later]
        cells = [
            str(arm["num_engines"]),
            arm["way"],
            str(arm["bucket_mib"] or ""),
            "yes" if arm["is_verified"] else "",
            f"{1e3 * arm['first']['total_s']:.0f}" if arm["first"] else "",
            f"{1e3 * total['median']:.0f} ({1e3 * total['p20']:.0f}-{1e3 * total['p80']:.0f})",
            " / ".join(f"{1e3 * part:.0f}" for part in parts),
            f"{result['num_bytes'] / total['median'] / 1e9:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
