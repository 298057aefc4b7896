"""Benchmark the fused operations beside every peer that is installed.

    python tools/bench_kernels.py --op linear_policy_loss --shape qwen3-4b --tokens 16384 32768 65536 \
        --peers all --dead 0 0.3 0.6 --json kernels/bench/results/h200.json
    python tools/bench_kernels.py --op linear_policy_loss --shape cpu --tokens 4096 --repeats 5

A provider that fails the correctness gate against float64 is reported and not timed. TFLOP/s are effective: 6 T d V
floating-point operations (2 T d V for log-probs) over the time, dead rows counted, whatever was really computed.
"""

import argparse
import json
import sys
from dataclasses import asdict
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "kernels"))

from bench.advantage import bench_grouped_advantage  # noqa: E402
from bench.cases import SHAPES  # noqa: E402
from bench.head import bench_head  # noqa: E402
from bench.measure import environment, write_result  # noqa: E402


def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {"op": arguments.op, "note": arguments.note}
    result |= {"environment": environment(device), "repeats": arguments.repeats}
    if arguments.op == "grouped_advantage":
        result["rows"] = bench_grouped_advantage(arguments.rollouts, arguments.repeats, device)
    else:
        shape = SHAPES[arguments.shape]
        result |= {"shape": {"name": arguments.shape} | asdict(shape)}
        # What is measured stays, should the process be stopped.
        keep = partial(write_measured, arguments.json, result)
        result |= bench_head(
            shape,
            device,
            is_scoring=arguments.op == "linear_logprob",
            token_counts=arguments.tokens,
            dead_shares=arguments.dead,
            kernels=arguments.kernels,
            chosen_peers=arguments.peers,
            verl=arguments.verl,
            repeats=arguments.repeats,
            peers_s=arguments.peers_s,
            keep=keep,
        )
    print_table(result)
    write_result(arguments.json, result)


def write_measured(path: Path | None, head: dict[str, Any], measured: dict[str, Any]) -> None:
    write_result(path, head | measured)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=("linear_policy_loss", "linear_logprob", "grouped_advantage"), required=True)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-4b" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096])
    parser.add_argument("--dead", type=float, nargs="+", default=[0.0], help="shares of rollouts without advantage")
    parser.add_argument("--rollouts", type=int, nargs="+", default=[512, 4096], help="of grouped_advantage")
    parser.add_argument(
        "--kernels",
        choices=("warp_specialized", "plain"),
        nargs="+",
        default=["warp_specialized", "plain"],
        help="of our LM head on CUDA",
    )
    parser.add_argument("--peers", nargs="+", default=["all"], help="all, none, or their names")
    parser.add_argument("--peers-s", type=float, default=inf, help="seconds for the first runs of a case's peers")
    parser.add_argument("--verl", type=Path, help="root of a verl checkout, for its Triton kernel")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1, help="of torch on CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--note", help="a sentence on the circumstances, kept with the result")
    parser.add_argument("--json", type=Path, help="where to write the result")
    return parser.parse_args()


def print_table(result: dict[str, Any]) -> None:
    """Print the environment and the rows as a Markdown table."""
    print(json.dumps(result["environment"]))
    if "matmul_tflops" in result:
        print(f"matmul: {result['matmul_tflops']:.4g} TFLOP/s; missing: {result['missing']}")
    rows = result["rows"]
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(_cell(row[name]) for name in names) + " |")


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {number:.1e}" for name, number in value.items())
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
