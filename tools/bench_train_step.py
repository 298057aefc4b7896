"""Time an optimizer step of a random-weight policy on packed samples: our LM head beside the plain one.

    python tools/bench_train_step.py --shape qwen3-4b --tokens 16384 --recompute --json tools/results/h200_4b.json
    python tools/bench_train_step.py --shape tiny --tokens 512 --repeats 5

One process, tensor-parallel size 1. The arms take turns in one run: `fused` is the trainer's own update, `plain` the
same update with the logits of all positions and torch's log-softmax, `logprobs` a pass without gradient. Both
updates must give the same loss and gradient norm, or nothing is timed. Model FLOPs count every matrix product of
forward and backward once (no recomputation), the head on response positions only and causal attention by half.

A shape that does not fit the GPU is cut to as many layers as do; the result says how many of how many.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent))  # where PYTHONSAFEPATH leaves it out

from random_policy import SHAPES, bench_config, measured_on, write_config, write_random_model  # isort: skip; makes ours importable

from bench.cases import Shape
from bench.measure import matmul_ceiling, peak_bytes, time_interleaved, write_result

from megatron_p2o.config.tree import Config, HeadConfig
from megatron_p2o.machine.memory.plan import GIB
from megatron_p2o.machine.memory.trainer import trainer_memory
from megatron_p2o.policy.model.architecture import Architecture, read_architecture
from megatron_p2o.policy.model.attention import pack_layout, sample_positions
from megatron_p2o.policy.model.cpu_compat import cuda_stand_ins
from megatron_p2o.policy.training.ranks import MegatronPolicy, build_policy
from megatron_p2o.rl.packing import pack
from megatron_p2o.types import TrainSample

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
"""Dense bfloat16, by a part of the device's name, from the vendor's data sheets; the SXM forms."""

TRAINER_RESERVE_BYTES = 6 * GIB
"""Kept free beside what the memory plan counts: CUDA context, workspaces, the head's chunks."""

RELATIVE_GATE = {"cpu": 1e-4, "cuda": 2e-2}
"""Largest difference in loss and gradient norm of the arms: float32, and eight bits of mantissa."""


def main() -> None:
    arguments = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {"shape": arguments.shape, "tokens": arguments.tokens, "repeats": arguments.repeats}
    result |= {"sample_tokens": arguments.sample_tokens, "prompt_tokens": arguments.prompt_tokens}
    result |= {"recompute": arguments.recompute, "environment": measured_on(device)}
    with tempfile.TemporaryDirectory(prefix="bench_train_step_") as folder:
        num_layers = arguments.num_layers or fitting_layers(arguments, Path(folder), device)
        result |= {"num_layers": num_layers, "num_layers_of_shape": SHAPES[arguments.shape]["num_hidden_layers"]}
        model_path = write_random_model(Path(folder), arguments.shape, device, num_layers)
        architecture = read_architecture(model_path)
        samples = make_samples(arguments.tokens, arguments.sample_tokens, arguments.prompt_tokens, architecture)
        config = config_of(arguments, model_path, device)
        result |= {"megatron": config.megatron}
        planned = asdict(trainer_memory(config, architecture))
        result |= {"lent": sorted(planned.pop("lent")), "planned_bytes": planned}
        with closing(build_policy(config)) as policy:
            result |= {"layers": policy.layers.layers, "attention": policy.layers.attention}
            result |= measure(policy, samples, arguments.repeats, device)
            if arguments.profile:
                result |= {"kernels": kernels_of_an_update(policy, samples, device)}
    result |= rates(result, architecture, samples, arguments.peak_tflops, device)
    print(json.dumps(result, indent=1))
    write_result(arguments.json, result)


def parse_arguments() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-0.6b" if on_gpu else "tiny")
    parser.add_argument("--tokens", type=int, default=16384 if on_gpu else 512, help="of the pack")
    parser.add_argument("--sample-tokens", type=int, default=2048 if on_gpu else 128, help="of one rollout")
    parser.add_argument("--prompt-tokens", type=int, default=256 if on_gpu else 32, help="of them, its prompt")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--num-layers", type=int, help="of the model; default: all of the shape's that fit the device")
    layers = ("auto", "transformer_engine", "local")
    parser.add_argument("--layers", choices=layers, default="auto", help="model.layer_backend")
    kernels = ("warp_specialized", "plain", "torch")
    parser.add_argument("--head-kernel", choices=kernels, default=kernels[0], help="head.kernel, of a GPU")
    parser.add_argument("--recompute", action="store_true", help="activations of every layer, to save memory")
    parser.add_argument("--megatron", nargs="+", default=[], help="settings of `megatron`, as NAME=VALUE")
    parser.add_argument("--profile", action="store_true", help="add the kernels of an update by device time")
    parser.add_argument("--peak-tflops", type=float, help="of the device; default: the data sheet's, if it is known")
    parser.add_argument("--threads", type=int, default=1, help="of torch on CPU")
    parser.add_argument("--json", type=Path, help="where to write the result")
    return parser.parse_args()


def config_of(arguments: argparse.Namespace, model_path: Path, device: torch.device) -> Config:
    config = bench_config(model_path, arguments.tokens, device, recompute=arguments.recompute)
    settings = {name: yaml.safe_load(value) for name, _, value in (each.partition("=") for each in arguments.megatron)}
    return replace(
        config,
        model=replace(config.model, layer_backend=arguments.layers),
        head=HeadConfig(kernel=arguments.head_kernel),
        megatron={**config.megatron, **settings},
    )


def fitting_layers(arguments: argparse.Namespace, folder: Path, device: torch.device) -> int:
    """Return how many layers of the shape fit the device with optimizer and activations; all of them without CUDA."""
    num_layers = SHAPES[arguments.shape]["num_hidden_layers"]
    if device.type != "cuda":
        return num_layers
    available = torch.cuda.get_device_properties(device).total_memory - TRAINER_RESERVE_BYTES
    for count in range(num_layers, 0, -1):
        path = write_config(folder / "planned", arguments.shape, count)
        planned = trainer_memory(config_of(arguments, path, device), read_architecture(path))
        if planned.resident + planned.likely_activations <= available:
            return count
    raise SystemExit(
        f"not one layer of {arguments.shape} fits {available / GIB:.0f} GiB with {arguments.tokens} tokens"
    )


def make_samples(
    num_tokens: int, sample_tokens: int, prompt_tokens: int, architecture: Architecture
) -> list[TrainSample]:
    """Return rollouts of equal length with random tokens and advantages of both signs."""
    if num_tokens % sample_tokens or not 0 < prompt_tokens < sample_tokens:
        raise SystemExit("--tokens must be a multiple of --sample-tokens, and --prompt-tokens below the latter")
    generator = np.random.default_rng(0)
    num_responses = sample_tokens - prompt_tokens + 1  # the last is a target only, not an input
    return [
        TrainSample(
            context_ids=generator.integers(1, architecture.vocab_size, prompt_tokens).astype(np.int32),
            response_ids=generator.integers(1, architecture.vocab_size, num_responses).astype(np.int32),
            advantage=float(generator.normal()),
            sampling_logprobs=np.full(num_responses, -10.0, np.float32),
            is_templated=False,
        )
        for _ in range(num_tokens // sample_tokens)
    ]


def measure(
    policy: MegatronPolicy, samples: Sequence[TrainSample], repeats: int, device: torch.device
) -> dict[str, Any]:
    """Check that the arms agree, then time them and take their peak memory."""
    num_loss_tokens = sum(len(sample.response_ids) for sample in samples)
    arms: dict[str, Callable[[], object]] = {
        "fused": lambda: policy.update(samples, None, num_loss_tokens),
        "plain": lambda: plain_update(policy, samples, num_loss_tokens, device),
        "logprobs": lambda: policy.logprobs(samples),
    }
    fused = policy.update(samples, None, num_loss_tokens)
    try:
        loss, grad_norm = plain_update(policy, samples, num_loss_tokens, device)
    except torch.OutOfMemoryError:
        del arms["plain"]
        torch.cuda.empty_cache()
        gate: dict[str, Any] = {"plain": "out of memory"}
    else:
        gate = {"loss": [fused.loss, loss], "grad_norm": [fused.grad_norm, grad_norm]}
        for name, (ours, theirs) in gate.items():
            if not abs(ours - theirs) <= RELATIVE_GATE[device.type] * max(abs(theirs), 1e-3):
                raise SystemExit(f"the arms disagree: {name} is {ours} fused and {theirs} plain; nothing was timed")
    passes = {name: token_passes(policy, arms[name]) for name in ("fused", "logprobs")}
    times = dict(zip(arms, time_interleaved(list(arms.values()), repeats, device), strict=True))
    num_tokens = sum(sample.num_tokens for sample in samples)
    return {
        "agreement_fused_plain": gate,
        "times_ms": times,
        "median_ms": {name: median(values) for name, values in times.items()},
        "peak_bytes_beyond_state": {name: peak_bytes(call, device) for name, call in arms.items()},
        "state_bytes": torch.cuda.memory_allocated(device) if device.type == "cuda" else None,
        # One update per rollout needs no other pass; each further one has its log-probs computed first.
        "forward_passes_per_rollout_token": {name: count / num_tokens for name, count in passes.items()},
    }


def kernels_of_an_update(
    policy: MegatronPolicy, samples: Sequence[TrainSample], device: torch.device, most: int = 40
) -> dict[str, Any]:
    """Return the time of an update's kernels together, and those that take most of it; operators on a CPU."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        policy.update(samples, None, sum(len(sample.response_ids) for sample in samples))
    rows = [
        {
            "name": event.key[:120],
            "calls": event.count,
            "ms": (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3,
        }
        for event in profiler.key_averages()
        if not on_gpu or event.device_type == DeviceType.CUDA
    ]
    rows.sort(key=lambda row: -row["ms"])
    return {"together_ms": sum(row["ms"] for row in rows), "longest": rows[:most]}


def plain_update(
    policy: MegatronPolicy, samples: Sequence[TrainSample], num_loss_tokens: int, device: torch.device
) -> tuple[float, float]:
    """Take one optimizer step through the logits of all positions; return its loss and gradient norm."""
    optimization = policy._shard.optimization
    module = data_parallel_module(policy)
    batch = pack(samples, None, device)
    optimization.clear_gradients()
    with cuda_stand_ins():
        logits_TV = module(
            batch.token_ids_T[None],
            sample_positions(batch.cu_seqlens)[None],
            None,
            packed_seq_params=pack_layout(batch.cu_seqlens),
        )[0]
        temperature = policy._config.rollout.temperature
        log_softmax_TV = (logits_TV.float() / temperature).log_softmax(-1)
        logprobs_T = log_softmax_TV.gather(1, batch.target_ids_T[:, None]).squeeze(1)
        # Of a first update every ratio is 1, inside the clip range; its gradient is that of the log-prob.
        ratio_T = (logprobs_T - logprobs_T.detach()).exp()
        loss = -(batch.advantages_T * ratio_T)[batch.loss_mask_T].sum() / num_loss_tokens
        loss.backward()
        module.finish_grad_sync()
        outcome = optimization.step()
    return float(loss.detach()), outcome.grad_norm


def data_parallel_module(policy: MegatronPolicy) -> Any:
    return policy._shard.optimization.modules[0]


def token_passes(policy: MegatronPolicy, call: Callable[[], object]) -> int:
    """Return how many token positions `call` runs through the model, forward; a recomputed layer does not count."""
    with counted_tokens(data_parallel_module(policy)) as counts:
        call()
    return sum(counts)


@contextmanager
def counted_tokens(module: torch.nn.Module) -> Iterator[list[int]]:
    counts: list[int] = []

    def count(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        counts.append(inputs[0].numel())

    hook = module.register_forward_pre_hook(count)
    try:
        yield counts
    finally:
        hook.remove()


def rates(
    result: dict[str, Any],
    architecture: Architecture,
    samples: Sequence[TrainSample],
    peak_tflops: float | None,
    device: torch.device,
) -> dict[str, Any]:
    """Return what follows from the times."""
    name = result["environment"]["device"]
    peak = peak_tflops or next((value for part, value in PEAK_TFLOPS.items() if part in name), None)
    shape = Shape(hidden_size=architecture.hidden_size, vocab_size=architecture.vocab_size)
    ceiling = matmul_ceiling(shape, 5, device)
    # Forward, and twice as much backward.
    flops = 3 * sum(architecture.forward_flops(sample.num_tokens, len(sample.response_ids)) for sample in samples)
    seconds = {arm: milliseconds / 1e3 for arm, milliseconds in result["median_ms"].items()}
    tflops = {arm: flops / seconds[arm] / 1e12 for arm in seconds if arm != "logprobs"}
    return {
        "tokens_per_s": {arm: result["tokens"] / value for arm, value in seconds.items()},
        "model_flops_per_step": flops,
        "model_tflops": tflops,
        "peak_tflops": peak,
        "mfu": {arm: value / peak for arm, value in tflops.items()} if peak else None,
        "matmul_ceiling_tflops": ceiling,
        "share_of_matmul_ceiling": {arm: value / ceiling for arm, value in tflops.items()},
        "plain_over_fused": seconds["plain"] / seconds["fused"] if "plain" in seconds else None,
        "logprobs_over_fused": seconds["logprobs"] / seconds["fused"],
    }


if __name__ == "__main__":
    main()
