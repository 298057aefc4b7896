r"""Compare how evenly micro-batches divide the work of an update over data-parallel ranks.

    python tools/bench_balance.py --json tools/results/balance.json \
        [--verl verl/utils/seqlen_balancing.py] [--slime slime/utils/seqlen_balancing.py]

Log-normal response lengths up to a limit, the arithmetic of Qwen3-4B, a budget of tokens per micro-batch. Ours, ours
with tokens as the cost, and verl's and slime's rules where their files are given (of a wheel, of a repository: only
their partition functions are called, in the order of their trainers).

`busiest rank`: work of the rank with most over the mean; what an update takes, in units of perfect balance, when ranks
meet once at its end. `slots`: the same when they meet after every micro-batch, as the stages of a pipeline do.
"""

import argparse
import importlib.util
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from statistics import mean
from types import ModuleType
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))  # where PYTHONSAFEPATH leaves it out

from random_policy import QWEN3, SHAPES  # isort: skip; makes ours importable

from bench.measure import write_result

from megatron_p2o.policy.model.architecture import Architecture, read_architecture
from megatron_p2o.rl.packing import plan_micro_batches

Plan = list[list[list[int]]]
"""Indices of samples by rank and micro-batch."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--median-tokens", type=int, nargs="+", default=[800, 3000, 8000])
    parser.add_argument("--samples", type=int, default=384, help="of an update")
    parser.add_argument("--longest", type=int, default=12588, help="tokens of the longest sample")
    parser.add_argument("--budget", type=int, default=16384, help="tokens of a micro-batch")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--verl", type=Path, help="seqlen_balancing.py of a verl wheel")
    parser.add_argument("--slime", type=Path, help="slime/utils/seqlen_balancing.py of slime's repository")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = [
        row
        for num_ranks in arguments.ranks
        for median_tokens in arguments.median_tokens
        for row in measured(num_ranks, median_tokens, providers(arguments, num_ranks), arguments)
    ]
    print("ranks  median  rule             busiest rank  slots  micro-batches  ms")
    for row in rows:
        print(
            f"{row['ranks']:>5}  {row['median_tokens']:>6}  {row['rule']:15}  {row['busiest_rank']:>12.4f}  "
            f"{row['slots']:.3f}  {row['micro_batches']:>13.1f}  {row['ms']:.1f}"
        )
    settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "verl", "slime")}
    write_result(arguments.json, {"settings": settings, "rows": rows})


@cache
def qwen3_4b() -> Architecture:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(QWEN3 | SHAPES["qwen3-4b"]))
        return read_architecture(Path(folder))


def work(length: int) -> float:
    return qwen3_4b().forward_flops(length, length)


def providers(arguments: argparse.Namespace, num_ranks: int) -> dict[str, Callable[[list[int]], Plan]]:
    def ours(lengths: list[int]) -> Plan:
        return plan_micro_batches(lengths, [work(length) for length in lengths], num_ranks, arguments.budget)

    def by_tokens(lengths: list[int]) -> Plan:
        return plan_micro_batches(lengths, lengths, num_ranks, arguments.budget)

    rules = {"ours": ours, "ours, by tokens": by_tokens}
    if arguments.verl:
        verl = load_peer(arguments.verl)
        rules["verl"] = lambda lengths: verl_plan(verl, lengths, num_ranks, arguments.budget)
    if arguments.slime:
        slime = load_peer(arguments.slime)
        rules["slime"] = lambda lengths: slime_plan(slime, lengths, num_ranks, arguments.budget)
    return rules


def load_peer(path: Path) -> ModuleType:
    """Return a peer's module; what verl's imports from the rest of verl is not needed for its partitions."""
    for name, attribute in (
        ("verl", None),
        ("verl.protocol", "DataProto"),
        ("verl.utils", "tensordict_utils"),
        ("verl.utils.device", "get_device_name"),
    ):
        sys.modules[name] = ModuleType(name)
        if attribute:
            setattr(sys.modules[name], attribute, None)
    spec = importlib.util.spec_from_file_location("seqlen_balancing", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def slime_plan(peer: ModuleType, lengths: list[int], num_ranks: int, budget: int) -> Plan:
    """Return slime's plan: first fit by tokens, the largest split until the ranks divide them, shared out by work."""
    parts = peer.first_fit_pack(lengths, budget)
    peer.expand_bins_by_splitting(parts, math.ceil(len(parts) / num_ranks) * num_ranks, lengths)
    costs = [sum(work(lengths[index]) for index in part) for part in parts]
    return [[parts[place] for place in share] for share in peer.get_seqlen_balanced_partitions(costs, num_ranks, True)]


def verl_plan(peer: ModuleType, lengths: list[int], num_ranks: int, budget: int) -> Plan:
    """Return verl's plan: as many micro-batches on every rank as keep all of them within the budget."""
    partition = peer.get_seqlen_balanced_partitions
    costs = [work(length) for length in lengths]
    shares = partition(costs, num_ranks, True)
    count = max(math.ceil(sum(lengths[index] for index in share) / budget) for share in shares)
    while True:
        plan = [
            [[share[place] for place in part] for part in partition([costs[index] for index in share], count, False)]
            for share in shares
        ]
        if all(sum(lengths[index] for index in part) <= budget for rank in plan for part in rank):
            return [sorted(rank, key=lambda part: -sum(costs[index] for index in part)) for rank in plan]
        count += 1


def measured(
    num_ranks: int, median_tokens: int, rules: dict[str, Callable[[list[int]], Plan]], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return a row per rule: means over the same draws."""
    generator = np.random.default_rng(0)
    results: dict[str, list[tuple[float, float, int, float]]] = {name: [] for name in rules}
    for _ in range(arguments.repeats):
        drawn = generator.lognormal(np.log(median_tokens), 0.9, arguments.samples)
        lengths = np.clip(drawn, 50, arguments.longest).astype(int).tolist()
        for name, rule in rules.items():
            start = time.perf_counter()
            plan = rule(lengths)
            results[name].append((*imbalance(plan, lengths), 1e3 * (time.perf_counter() - start)))
    return [
        {
            "ranks": num_ranks,
            "median_tokens": median_tokens,
            "rule": name,
            **dict(
                zip(("busiest_rank", "slots", "micro_batches", "ms"), map(mean, zip(*rows, strict=True)), strict=True)
            ),
        }
        for name, rows in results.items()
    ]


def imbalance(plan: Plan, lengths: Sequence[int]) -> tuple[float, float, int]:
    """Return (busiest rank, slots, micro-batches per rank): see the module's docstring."""
    totals = np.array([[sum(work(lengths[index]) for index in part) for part in rank] for rank in plan])
    per_rank = totals.sum(axis=1)
    return per_rank.max() / per_rank.mean(), totals.max(axis=0).sum() / per_rank.mean(), totals.shape[1]


if __name__ == "__main__":
    main()
