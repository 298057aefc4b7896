"""The arms of the comparison are what their names say, and the guide shows what was simulated."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest

from megatron_p2o.evolve.record.history import Ended, Picked, event_from_json

ROOT = Path(__file__).parents[3]
RESULT = ROOT / "tools" / "results" / "proposals.json"
MAX_ROLLOUTS = 400


def small_world(tool: Any) -> Any:
    world = tool.Kinds(1)
    settings = world.spec.settings
    evolution = replace(settings.evolution, dev_size=20, max_rollouts=MAX_ROLLOUTS)
    world.spec = replace(world.spec, problems=world.spec.problems[:80], settings=replace(settings, evolution=evolution))
    return world


def test_as_many_proposals_in_a_row_as_children_share_a_parent(tool: Any) -> None:
    from proposal_rules import shared_pick

    pick, solved = shared_pick(3), {candidate: frozenset({f"{candidate}"}) for candidate in range(50)}
    picked = [pick(solved, random.Random(number)) for number in range(30)]
    assert all(len(set(picked[start : start + 3])) == 1 for start in range(0, 30, 3))
    assert len(set(picked)) > 5


@pytest.mark.parametrize("index", range(6))
def test_every_arm_spends_the_same_rollouts_on_sixteen_proposals_at_once(tool: Any, index: int) -> None:
    arm = tool.ARMS[index]
    assert arm.parents * arm.children == small_world(tool).spec.settings.evolution.num_lineages == 16
    found = tool.outcome_of(small_world(tool), arm, 1)
    assert found.num_proposals > 10 and 0 < found.success < 1
    assert 0.9 * MAX_ROLLOUTS < found.num_rollouts <= MAX_ROLLOUTS


def test_the_next_iteration_waits_for_all_of_the_last(tool: Any) -> None:
    records: list[object] = []
    tool.run_arm(tool.round_in(small_world(tool), 1, records.append), tool.Arm(parents=4, children=4, waits=True))
    events = [event_from_json(record) for record in records]
    order = [type(event) for event in events if isinstance(event, Picked | Ended)]
    assert order[:48] == [*[Picked] * 16, *[Ended] * 16, *[Picked] * 16]
    picks = [event for event in events if isinstance(event, Picked)]
    assert all(len({pick.parent for pick in picks[start : start + 4]}) == 1 for start in range(0, len(picks), 4))
    assert len({pick.parent for pick in picks}) > 2
    assert len({pick.minibatch for pick in picks[:16]}) == 16


def test_a_recorded_trial_is_a_response_to_a_problem_of_its_family_through_its_phrases(tool: Any) -> None:
    from proposal_worlds import phrase_sets

    sets = phrase_sets(tool.Recorded(tool.Table(np.zeros((0, 0), bool), np.array(["a"])), 1).reflector.phrases)
    solved = np.zeros((len(sets), 3), bool)
    solved[sets.index(("answer briefly.", "stay calm."))] = [True, True, False]
    world = tool.Recorded(tool.Table(solved, np.array(["a", "a", "b"])), 1)
    text = "stay calm. answer briefly."
    assert [world.rate(text, key) for key in ("a/0", "b/0")] == [1, 0] and world.rate("stay calm.", "a/0") == 0
    assert world.is_solved(text, "a/7") and not world.is_solved(text, "b/7")


def test_the_guide_shows_what_was_simulated(tool: Any) -> None:
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    guide = (ROOT / "docs" / "evolution.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \d+ x \d.*\|$", guide, re.MULTILINE)
    assert rows == [row for outcomes in found.values() for row in tool.table_rows(outcomes)]
    assert all(list(outcomes) == [arm.name for arm in tool.ARMS] for outcomes in found.values())


def test_what_the_guide_concludes_follows_from_the_outcomes(tool: Any) -> None:
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    in_errors: dict[str, list[float]] = {arm.name: [] for arm in tool.ARMS}
    ratios: list[float] = []
    for outcomes in found.values():
        base = outcomes[tool.BASE.name]
        for name, arm_outcomes in outcomes.items():
            gains = [mine["success"] - other["success"] for mine, other in zip(arm_outcomes, base, strict=True)]
            in_errors[name].append(fmean(gains) / (stdev(gains) / len(gains) ** 0.5) if any(gains) else 0.0)
            if name.endswith("iterations"):
                ratios.append(sum(mine["round_s"] for mine in arm_outcomes) / sum(other["round_s"] for other in base))
    assert all(abs(value) < 1 for value in in_errors["4 x 4"])
    assert [round(value, 1) for value in in_errors["2 x 8"]] == [-1.2, -1.6]
    waiting = [value for name, values in in_errors.items() if name.endswith("iterations") for value in values]
    assert (round(min(waiting), 1), round(max(waiting), 1)) == (0.4, 2.9)
    assert max(waiting) == in_errors["16 x 1, iterations"][1]
    assert (round(min(ratios), 1), round(max(ratios), 1)) == (1.9, 2.4)
