"""What the guide says of `evolution.max_slowdown` is what was simulated."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_p2o.simulation.cluster import StepCost
from megatron_p2o.simulation.run_cost import RoundAlone, RunCost, StepsBeside

ROOT = Path(__file__).parents[3]


RESULT = ROOT / "tools" / "results" / "evolution_frontier.json"


def row_of(point: dict[str, float]) -> tuple[str, ...]:
    return (
        f"{point['max_slowdown']:g}",
        f"{100 * point['slowdown']:.1f}",
        f"{point['price']:.2f}",
        f"{point['round_steps']:.0f}",
    )


def round_cost_s(point: dict[str, float], step_s: float) -> float:
    """Return the training seconds that a round costs."""
    return point["slowdown"] * point["round_steps"] * step_s


def test_the_guide_shows_each_simulated_value(tool: Any) -> None:
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    guide = (ROOT / "docs" / "evolution.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\d.]+) \| \+([\d.]+) % \| ([\d.]+) \| (\d+) \|$", guide, re.MULTILINE)
    assert rows == [row_of(point) for point in (*found["points"], *found["counted_points"])]
    assert [float(value) for value, *_ in rows] == [*tool.VALUES, *tool.COUNTED_VALUES]
    waiting = found["waiting"]
    assert f"| +{100 * waiting['slowdown']:.1f} % | 1 | training waits {waiting['round_s']:,} s |" in guide


def test_what_the_guide_says_of_a_round_follows_from_the_points() -> None:
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    step_s, waiting = found["step_without_evolution_s"], found["waiting"]
    _, *costly = (round_cost_s(point, step_s) for point in found["points"])
    assert (min(costly), max(costly)) == pytest.approx((1_600, 1_900), abs=10)
    counted = [round_cost_s(point, step_s) for point in found["counted_points"]]
    assert (min(counted), max(counted)) == pytest.approx((2_080, 2_250), abs=10)
    default = next(point for point in found["points"] if point["max_slowdown"] == 1.0)
    assert default["round_steps"] < found["steps_per_epoch"]
    tokens_of_a_step = waiting["num_tokens"] / 15
    assert tokens_of_a_step == pytest.approx(768 * 4_200, rel=0.05)


def test_the_other_rule_counts_requests_alone(tool: Any) -> None:
    rule = tool.CountedRequests(256, 0.5, cast(Any, None))
    assert [rule.of(SimpleNamespace(num_training=number)) for number in (0, 5, 8, 600)] == [256, 2, 4, 256]


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
