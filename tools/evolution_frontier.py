"""Simulate what evolution costs training and how long a round lasts, for values of `evolution.max_slowdown`.

    python tools/evolution_frontier.py examples/p2o_qwen3_4b.yaml --gpus 8x80 --problems 5000 --set preset=p2o \\
        --output tools/results/evolution_frontier.json --figure docs/figures/evolution_frontier.svg

Nothing is measured: see `p2o plan` in docs/engines.md. A round that waits for nothing stands beside the others, as the
step time that it costs when it is spread over the steps of an epoch. So does another rule of admission, which a run
does not have.
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest.mock import patch

from megatron_p2o.config.read import load_config
from megatron_p2o.machine.memory.here import gpus_of
from megatron_p2o.rollout.requests import EngineHandle
from megatron_p2o.rollout.sharing.allowance import Allowance
from megatron_p2o.simulation.plan import planned_run
from megatron_p2o.simulation.run_cost import (
    RunCost,
    SimulatedRun,
    mean_step_s,
    round_alone,
    steps_beside,
    steps_without,
)

VALUES = (0.0, 0.02, 0.1, 0.3, 1.0, 2.0)
COUNTED_VALUES = (0.1, 0.3, 1.0, 2.0)


class CountedRequests(Allowance):
    """Admits `max_slowdown` times as many requests as the engine has of training, whatever room the cache has."""

    def of(self, engine: EngineHandle) -> int:
        if engine.num_training == 0:
            return self._slots
        return math.floor(min(self._slots, self._max_slowdown * engine.num_training))


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """What one value of `evolution.max_slowdown` leads to."""

    max_slowdown: float
    slowdown: float
    """Longer steps, as a share of those without evolution."""
    price: float
    round_steps: float
    tokens_per_step: float
    """Sampled by evolution."""


def point_of(max_slowdown: float, cost: RunCost) -> Point:
    assert cost.beside is not None
    return Point(
        max_slowdown=max_slowdown,
        slowdown=round(cost.slowdown, 4),
        price=round(cost.price, 3),
        round_steps=round(cost.round_steps, 1),
        tokens_per_step=round(cost.beside.num_tokens / len(cost.beside.steps)),
    )


def frontier(run: SimulatedRun, num_steps: int) -> dict[str, object]:
    """Return the points of each rule, and what they are compared with."""
    off, alone = steps_without(run, num_steps), round_alone(run)

    def point(value: float) -> dict[str, float]:
        evolution = replace(run.config.evolution, max_slowdown=value)
        beside = steps_beside(replace(run, config=replace(run.config, evolution=evolution)), num_steps)
        return asdict(point_of(value, RunCost(off=off, alone=alone, beside=beside)))

    step_s = mean_step_s(off)
    with patch("megatron_p2o.rollout.broker.Allowance", CountedRequests):
        counted = [point(value) for value in COUNTED_VALUES]
    return {
        "points": [point(value) for value in VALUES],
        "counted_points": counted,
        "step_without_evolution_s": round(step_s, 1),
        "steps_per_epoch": run.steps_per_epoch,
        "cache_tokens": run.cache_tokens,
        "simulated_steps": num_steps,
        "waiting": {
            "round_s": round(alone.round_s),
            "num_trials": alone.num_trials,
            "num_tokens": alone.num_tokens,
            "slowdown": round(alone.round_s / (run.steps_per_epoch * step_s), 4),
        },
    }


def draw(found: dict[str, object], path: Path) -> None:
    """Write the figure: slowdown against the length of a round."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "frontier", "svg.fonttype": "none"}
    from matplotlib import pyplot

    points = [Point(**point) for point in found["points"]]  # type: ignore[attr-defined]
    waiting: dict[str, float] = found["waiting"]  # type: ignore[assignment]
    steps: int = found["steps_per_epoch"]  # type: ignore[assignment]
    figure, axes = pyplot.subplots(figsize=(7.2, 3.6), layout="constrained")
    axes.plot(
        [point.round_steps for point in points], [100 * point.slowdown for point in points], "o-", color="#2563a8"
    )
    for point in points:
        place = (point.round_steps, 100 * point.slowdown)
        axes.annotate(f"{point.max_slowdown:g}", place, (5, 5), textcoords="offset points")
    axes.plot([steps], [100 * waiting["slowdown"]], "s", color="#b3541e")
    axes.annotate("training waits", (steps, 100 * waiting["slowdown"]), (7, -4), textcoords="offset points")
    axes.axvline(steps, color="#5b6470", linestyle=":", linewidth=1)
    axes.set_xscale("log")
    ticks = [steps * 2**power for power in range(6)]
    axes.set_xticks(ticks, [f"{tick}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(f"steps that a round lasts (an epoch has {steps})")
    axes.set_ylabel("longer steps, %")
    axes.set_title("Simulated: evolution.max_slowdown by its value", fontsize=11)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--gpus", required=True, help="NxM: nodes of N GPUs with M GiB each")
    parser.add_argument("--problems", type=int, required=True, help="of an epoch")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=16, help="that are simulated")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    config = load_config(options.config, options.overrides)
    run = planned_run(config, gpus_of(config, options.gpus, "--gpus"), options.problems)
    found = frontier(run, options.steps)
    text = json.dumps(found, indent=1)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")
    if options.figure is not None:
        draw(found, options.figure)


if __name__ == "__main__":
    main()
