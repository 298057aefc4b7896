"""Benchmark of the head operations: gate, memory, and times of all providers in turns."""

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from bench.cases import Case, Shape, make_case
from bench.measure import (
    errors_against_float64,
    extra_peak_bytes,
    for_contract,
    matmul_ceiling,
    passes_gate,
    time_interleaved,
)
from bench.providers import Kernel, Provider, own_policy_providers, own_scoring_providers, peers

GATE_TOKENS = 128
"""Rows of the correctness gate, at the full shape."""


PEER_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, ImportError, OSError)
"""What a peer raises that does not support a shape, a dtype or a device (torch.OutOfMemoryError is a RuntimeError), or
when it is imported beside other versions than it was built for."""


Gate = tuple[dict[str, float], str]
"""(Errors against float64, why a provider is not timed or "")."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One provider on one case."""

    provider: str
    tokens: int
    dead_share: float
    median_ms: float | None = None
    """None: failed, `note` says how."""
    p20_ms: float | None = None
    p80_ms: float | None = None
    effective_tflops: float | None = None
    share_of_matmul: float | None = None
    """Effective TFLOP/s over those of the plain matrix product in the same run."""
    extra_peak_mib: float | None = None
    """Most memory held beyond inputs and both gradients."""
    errors: dict[str, float] = field(default_factory=dict)
    note: str = ""


def bench_head(
    shape: Shape,
    device: torch.device,
    *,
    is_scoring: bool,
    token_counts: Sequence[int],
    dead_shares: Sequence[float],
    kernels: Sequence[Kernel],
    chosen_peers: Sequence[str],
    verl: Path | None,
    repeats: int,
    peers_s: float = inf,
    keep: Callable[[dict[str, Any]], object] = lambda result: None,
) -> dict[str, Any]:
    """Return the matmul ceiling, the rows, and why peers are missing.

    Args:
        peers_s: seconds for the first runs of all peers on a case, in which they tune themselves for its size. Once
            they are over, the other peers are left out and say so; the one that is running goes on.
        keep: gets the result after each case.
    """
    with_main_grad = device.type == "cuda" and not is_scoring
    providers = (own_scoring_providers if is_scoring else own_policy_providers)(device, kernels)
    missing: dict[str, str] = {}
    for name, make in peers(device, verl, is_scoring=is_scoring).items():
        if chosen_peers == ["all"] or name in chosen_peers:
            try:
                providers.append(replace(make(), is_peer=True))
            except PEER_FAILURES as error:
                missing[name] = f"{type(error).__name__}: {str(error)[:120]}"
    gate_case = make_case(shape, GATE_TOKENS, 0.0, device, with_main_grad=with_main_grad)
    ceiling = matmul_ceiling(shape, repeats, device)
    rows: list[Row] = []
    result: dict[str, Any] = {}
    # Peers compile parts of theirs with torch, each size by itself: with symbolic sizes torch 2.11 fails on the second.
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        gate = {provider.name: _gate(provider, gate_case) for provider in providers}
        del gate_case
        for num_tokens in token_counts:
            for dead_share in dead_shares:
                case = make_case(shape, num_tokens, dead_share, device, with_main_grad=with_main_grad)
                work = (2 if is_scoring else 6) * num_tokens * shape.hidden_size * shape.vocab_size
                rows += _bench_case(providers, gate, case, work / 1e12, ceiling, repeats, peers_s, device)
                result = {"matmul_tflops": ceiling, "missing": missing, "rows": [asdict(row) for row in rows]}
                keep(result)
    return result


def _gate(provider: Provider, case: Case) -> Gate:
    """Say on the error stream how long it took as well: most peers compile first."""
    started = time.monotonic()
    errors: dict[str, float] = {}
    try:
        errors = errors_against_float64(provider, case)
        note = "" if passes_gate(provider, errors) else "failed the correctness gate"
    except PEER_FAILURES as error:
        note = f"{type(error).__name__}: {str(error)[:120]}"
    print(f"{provider.name}: {time.monotonic() - started:.1f} s {note}", file=sys.stderr, flush=True)
    return errors, note


def _bench_case(
    providers: Sequence[Provider],
    gate: Mapping[str, Gate],
    case: Case,
    work_tflop: float,
    ceiling: float,
    repeats: int,
    peers_s: float,
    device: torch.device,
) -> list[Row]:
    """Measure the memory of every provider that passed, then their times in turns."""
    # Whole rollouts are dead, so the share can differ from the one that was asked for.
    dead_share = 1 - float(case.is_live_T.double().mean())
    rows: list[Row] = []
    calls: list[partial[Any]] = []
    of_peers_s = 0.0
    for provider in providers:
        started = time.monotonic()
        errors, note = gate[provider.name]
        row = Row(provider=provider.name, tokens=len(case.targets_T), dead_share=dead_share, errors=errors, note=note)
        if not note and provider.is_peer and of_peers_s >= peers_s:
            row = replace(row, note=f"left out: the first runs of those before took {of_peers_s:.0f} s")
        elif not note:
            prepared = for_contract(provider, case)
            try:
                extra = extra_peak_bytes(provider, prepared, device) / 2**20
            except PEER_FAILURES as error:
                row = replace(row, note=f"{type(error).__name__}: {str(error)[:120]}")
            else:
                contract = "" if provider.contract == "policy" else "cross-entropy only"
                row = replace(row, extra_peak_mib=extra, note=contract)
                calls.append(partial(provider.run, prepared))
            took_s = time.monotonic() - started
            of_peers_s += took_s if provider.is_peer else 0.0
            print(f"{provider.name}, first run: {took_s:.1f} s", file=sys.stderr, flush=True)
        rows.append(row)
    times = iter(time_interleaved(calls, repeats, device))
    return [row if row.extra_peak_mib is None else _timed(row, next(times), work_tflop, ceiling) for row in rows]


def _timed(row: Row, times_ms: Sequence[float], work_tflop: float, ceiling: float) -> Row:
    median = statistics.median(times_ms)
    quantiles = statistics.quantiles(times_ms, n=5, method="inclusive") if len(times_ms) > 1 else [median]
    tflops = work_tflop / (median * 1e-3)
    return replace(
        row,
        median_ms=median,
        p20_ms=quantiles[0],
        p80_ms=quantiles[-1],
        effective_tflops=tflops,
        share_of_matmul=tflops / ceiling,
    )
