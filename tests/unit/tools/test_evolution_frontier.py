"""What the guide says of `evolution.max_slowdown` is what was simulated."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_p2o.simulation.cluster import StepCost
from megatron_p2o.simulation.run_cost import RoundAlone, RunCost, StepsBeside

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def tool() -> Any:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import evolution_frontier
    finally:
        sys.path.pop(0)
    return evolution_frontier


def test_the_guide_shows_each_simulated_value(tool: Any) -> None:
    found = json.loads((ROOT / "tools" / "results" / "evolution_frontier.json").read_text(encoding="utf-8"))
    guide = (ROOT / "docs" / "evolution.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\d.]+) \| \+([\d.]+) % \| ([\d.]+) \| (\d+) \|$", guide, re.MULTILINE)
    expected = [
        (
            f"{point['max_slowdown']:g}",
            f"{100 * point['slowdown']:.1f}",
            f"{point['price']:.2f}",
            f"{point['round_steps']:.0f}",
        )
        for point in found["points"]
    ]
    assert rows == expected
    assert [float(value) for value, *_ in rows] == list(tool.VALUES)
    waiting = found["waiting"]
    assert f"| +{100 * waiting['slowdown']:.1f} % | 1 | training waits {waiting['round_s']:,} s |" in guide


def step(seconds: float, num_evolution_tokens: int) -> StepCost:
    return StepCost(
        generation_s=seconds,
        update_s=0.0,
        refresh_s=0.0,
        num_tokens=0,
        num_evolution_tokens=num_evolution_tokens,
        busy_share=1.0,
    )


def test_a_point_is_counted_from_its_steps(tool: Any) -> None:
    cost = RunCost(
        off=(step(100.0, 0), step(100.0, 0)),
        alone=RoundAlone(round_s=50.0, num_tokens=5_000, num_trials=80),
        beside=StepsBeside(steps=(step(110.0, 300), step(102.0, 100)), num_trials=8, is_round_over=False),
    )
    point = tool.point_of(0.5, cost)
    assert (point.slowdown, point.round_steps, point.tokens_per_step) == (0.06, 20.0, 200)
    # 12 seconds at 100 tokens a second, for 400 tokens.
    assert point.price == 3.0
