"""Time, memory and errors of one provider on one case."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from math import inf, nan
from pathlib import Path
from typing import Any

import torch
from bench.cases import Case, Shape
from bench.providers import Outcome, Provider
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from p2o_kernels.logprob import linear_logprob_reference

PACKAGES = ("torch", "triton", "liger-kernel", "quack-kernels", "cut-cross-entropy", "verl")


FLOAT32_LOGPROB_ERROR = 2e-6
"""Error in nats of one float32 rounding of a log-prob of up to 32 nats (half an ulp is 9.5e-7) and of the sum of
exponentials (a few ulps of 1)."""

ACCUMULATION_FACTOR = 2.0
"""Our kernels' error over that of the device's own float32 product, at most. Tensor cores truncate each partial sum
after every 16 products. Both add D/16 of them, each off by at most one ulp of the partial sum, in another order."""


def time_interleaved(calls: Sequence[Callable[[], object]], repeats: int, device: torch.device) -> list[list[float]]:
    """Return `repeats` times in ms for each call, taken in turns after one warm-up round (three on CUDA).

    CUDA: events around the call. CPU: processor time of this process, which other processes' load does not enter.
    """
    for _ in range(3 if device.type == "cuda" else 1):
        for call in calls:
            call()
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, samples in zip(calls, times, strict=True):
            samples.append(_time_once(call, device))
    return times


def _time_once(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.process_time()
        call()
        return 1e3 * (time.process_time() - started)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end)


def extra_peak_bytes(provider: Provider, case: Case, device: torch.device) -> int:
    """Return the most memory one run holds at a time beyond its inputs and the gradients it returns."""
    outcome: Outcome | None = None

    def run() -> None:
        nonlocal outcome
        outcome = provider.run(case)

    peak = peak_bytes(run, device)
    assert outcome is not None
    gradients = (outcome.hidden_grad_TD, outcome.weight_grad_VD)
    return peak - sum(tensor.nbytes for tensor in gradients if tensor is not None and tensor is not case.main_grad_VD)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Return the most memory a call holds at a time beyond what is held before it."""
    return _peak_bytes_on_cuda(call, device) if device.type == "cuda" else _peak_bytes_on_cpu(call)


def _peak_bytes_on_cuda(call: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_bytes_on_cpu(call: Callable[[], object]) -> int:
    """Sum of torch's own allocations, exact whatever else the machine does."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def errors_against_float64(provider: Provider, case: Case) -> dict[str, float]:
    """Return the largest log-prob error in nats over live rows, and the relative errors of the gradients.

    "product_logprob_max" is the log-prob error that `product_logprobs` has on the same rows.
    """
    case = for_contract(provider, case)
    if case.main_grad_VD is not None:
        case = replace(case, main_grad_VD=torch.zeros_like(case.main_grad_VD))
    outcome = provider.run(case)
    hidden = case.hidden_TD.detach().double().requires_grad_()
    weight = case.weight_VD.detach().double().requires_grad_()
    logprobs_T, _ = linear_logprob_reference(hidden, weight, case.targets_T)
    (-(logprobs_T * case.advantages_T).sum() / len(case.targets_T)).backward()
    live, truth_T = case.is_live_T, logprobs_T.detach()
    errors: dict[str, float] = {}
    if outcome.logprobs_T is not None:
        errors["logprob_max"] = float((outcome.logprobs_T[live] - truth_T[live]).abs().max())
        product_T = product_logprobs(case.hidden_TD.detach(), case.weight_VD.detach(), case.targets_T)
        errors["product_logprob_max"] = float((product_T[live] - truth_T[live]).abs().max())
    for name, value, truth in _gradients(outcome, hidden, weight):
        errors[name] = float((value.double() - truth).norm() / truth.norm())
    return errors


def product_logprobs(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, temperature: float = 1.0, vocab_size: int | None = None
) -> Tensor:
    """Return the log-probs, [T] float64, of logits by the device's own product with float32 sums and result.

    Everything after the product is float64: their error is what the device's accumulation costs (cuBLAS on a GPU).
    Of a padded weight all rows are multiplied, as our kernels do; the first `vocab_size` count. For an odd number of
    columns cuBLAS takes another kernel, with a third of the error of logits (H200, torch 2.11).
    """
    if hidden_TD.is_cuda:
        logits_TV = torch.mm(hidden_TD, weight_VD.T, out_dtype=torch.float32)
    else:
        logits_TV = hidden_TD.float() @ weight_VD.float().T
    logprobs_TV = torch.log_softmax(logits_TV[:, :vocab_size].double() / temperature, -1)
    return logprobs_TV.gather(1, targets_T[:, None]).squeeze(1)


def logprob_error_limit(product_error: float) -> float:
    """Return the log-prob error in nats that our kernels may have where `product_logprobs` has `product_error`."""
    return ACCUMULATION_FACTOR * product_error + FLOAT32_LOGPROB_ERROR


def _gradients(outcome: Outcome, hidden: Tensor, weight: Tensor) -> list[tuple[str, Tensor, Tensor]]:
    pairs = [
        ("hidden_grad_relative", outcome.hidden_grad_TD, hidden.grad),
        ("weight_grad_relative", outcome.weight_grad_VD, weight.grad),
    ]
    return [(name, value, truth) for name, value, truth in pairs if value is not None and truth is not None]


def passes_gate(provider: Provider, errors: dict[str, float]) -> bool:
    """Whether a provider is right enough to be timed. A missing or nan error fails."""
    product_error = errors.get("product_logprob_max", nan)
    limit = provider.max_logprob_error
    limits = {
        "logprob_max": logprob_error_limit(product_error) if limit is None else limit,
        "product_logprob_max": inf,
    }
    return bool(errors) and all(
        error <= limits.get(name, provider.max_gradient_error) for name, error in errors.items()
    )


def for_contract(provider: Provider, case: Case) -> Case:
    """Return the case a provider can run: cross-entropy knows no advantages but 0 and 1."""
    if provider.contract == "policy":
        return case
    return replace(case, advantages_T=case.is_live_T.float())


def matmul_ceiling(shape: Shape, repeats: int, device: torch.device) -> float:
    """Return the TFLOP/s of the plain product hidden @ weight.T on 2,048 rows (8,192 on CUDA), in the inputs' dtype."""
    dtype, num_rows = (torch.bfloat16, 8192) if device.type == "cuda" else (torch.float32, 2048)
    hidden = torch.randn(num_rows, shape.hidden_size, device=device).to(dtype)
    weight = torch.randn(shape.vocab_size, shape.hidden_size, device=device).to(dtype)
    result = torch.empty(num_rows, shape.vocab_size, dtype=dtype, device=device)
    times = time_interleaved([lambda: torch.mm(hidden, weight.T, out=result)], repeats, device)[0]
    return 2 * hidden.numel() * len(weight) / (sorted(times)[len(times) // 2] * 1e-3) / 1e12


def environment(device: torch.device) -> dict[str, str]:
    """Return what a result needs to be compared: device, versions, commit."""
    versions: dict[str, str] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        clock = "CUDA events"
    else:
        name = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s)"
        clock = "processor time of the process"
    return {
        "device": name,
        "clock": clock,
        "commit": _commit(),
        "python": platform.python_version(),
    } | versions


def write_result(path: Path | None, result: dict[str, Any]) -> None:
    """Write a benchmark's result as JSON where `--json` asks for it; one that is there stays whole until then."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        temporary.replace(path)


def _commit() -> str:
    """Return $P2O_COMMIT, which a copy of a checkout carries along; else the checkout's commit, or "unknown"."""
    carried = os.environ.get("P2O_COMMIT")
    if carried:
        return carried
    command = ["git", "describe", "--always", "--abbrev=12"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=False
        )
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"
