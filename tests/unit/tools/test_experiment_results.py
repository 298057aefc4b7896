"""What the tool makes of the runs of an experiment, and what the page says of them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
PAGES = {
    "hard_problems": "hard_problems",
    "masks": "hard_problems",
    "smollm2": "hard_problems",
    "proposals": "evolution",
}
"""Experiment to the page that shows it."""
EXPERIMENTS = [path.stem for path in sorted((ROOT / "experiments" / "results").glob("*.json"))]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    results = {
        "evaluation": {"hard": {"accuracy": 0.75}, "easy": {"accuracy": 1.0}},
        "evaluation_problems": {
            "hard": {"correct_by_problem": {"b": 3, "a": 0, "c": 0}, "decided_by_problem": {"b": 4, "a": 4, "c": 0}}
        },
        "templated_evaluation": {"hard": {"accuracy": 0.9}},
        "compute": {"learning_tokens": 300, "trained_tokens": 250, "wall_s": 61.4},
        "num_steps": 2,
        "rounds": [{"best_score": 0.25, "coverage": 0.5, "num_hard": 9}, {"best_score": 1.0, "coverage": 1.0}],
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    lines = [
        {"eval/hard/avg": 0.0, "compute/learning_tokens": 0},
        {"template/shift_per_token": 3.0, "train/ratio_mask_dropped_shift_share": 0.8, "compute/learning_tokens": 90},
        {"eval/hard/avg": 0.5, "compute/learning_tokens": 200},
        {"template/shift_per_token": 1.0, "train/ratio_mask_dropped_shift_share": 0.4, "compute/learning_tokens": 300},
        {"eval/hard/avg": 0.75, "compute/learning_tokens": 300},
        {"eval/hard/avg": 0.75, "compute/learning_tokens": 300},
    ]
    text = "".join(json.dumps({"step": 0, "metrics": metrics}) + "\n" for metrics in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    return tmp_path


def test_a_row_has_what_the_protocol_measures(tool: Any, run: Path) -> None:
    row = tool.row_of(run, "replace", 2, "hard")
    assert row["curve"] == [[0, 0.0], [200, 0.5], [300, 0.75]]
    assert row["tokens_to_half"] == 200
    assert row["correct"] == "0 3 -"
    assert row["shifts"] == [3.0, 1.0]
    assert row["dropped_shift_share"] == pytest.approx(0.6)
    assert row["round"] == {"best_score": 0.25, "coverage": 0.5}
    assert tool.round_table({"runs": [row]}, ["replace"]).endswith("| `replace` | 0.25 | 0.50 |")
    assert row["accuracy"] == {"hard": 0.75, "easy": 1.0} and row["template_accuracy"] == 0.9


def outcome_of(by_seed: list[float], low: float, high: float, p: float) -> dict[str, Any]:
    return {"difference_by_seed": by_seed, "interval": {"low": low, "high": high}, "p_value": p}


@pytest.mark.parametrize(
    ("test", "verdict"),
    [
        (outcome_of([0.1, 0.2, 0.1], 0.05, 0.2, 0.001), "better"),
        (outcome_of([-0.1, -0.2, -0.1], -0.2, -0.05, 0.001), "worse"),
        (outcome_of([0.1, 0.2, -0.01], 0.05, 0.2, 0.001), "undecided"),
        (outcome_of([0.1, 0.2, 0.0], 0.05, 0.2, 0.001), "undecided"),
        (outcome_of([0.1, 0.2, 0.1], -0.01, 0.2, 0.001), "undecided"),
        (outcome_of([0.1, 0.2, 0.1], 0.05, 0.2, 0.02), "undecided"),
        (outcome_of([0.04, 0.03, 0.05], 0.02, 0.05, 0.001), "undecided"),
        (outcome_of([0.1, 0.2], 0.05, 0.2, 0.001), "open"),
    ],
)
def test_the_rule_of_the_protocol_judges(tool: Any, test: dict[str, Any], verdict: str) -> None:
    assert tool.verdict(test, num_seeds=3, num_tests=4) == verdict


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_page_shows_the_table_of_the_committed_runs(tool: Any, name: str) -> None:
    results = json.loads((ROOT / "experiments" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / f"{PAGES[name]}.md").read_text(encoding="utf-8")
    arms = list(dict.fromkeys(row["arm"] for row in results["runs"]))
    assert tool.table(results, arms) in page
    if name == "proposals":
        assert tool.round_table(results, arms) in page
    assert re.search(rf"figures/{name}\.svg", page)
    assert all(commit in page for commit in results["commits"])


def test_the_example_shows_every_run_of_smollm2() -> None:
    results = json.loads((ROOT / "experiments" / "results" / "smollm2.json").read_text(encoding="utf-8"))
    page = (ROOT / "examples" / "smollm2_cpu" / "README.md").read_text(encoding="utf-8")
    for row in results["runs"]:
        shown = [row["curve"][0][1], row["accuracy"]["heldout"], row["accuracy"]["far"], row["template_accuracy"]]
        cells = " | ".join("" if value is None else f"{value:.3f}" for value in shown).replace("|  ", "| ")
        name = {"ratio_mask": "`ratio_mask`, the paper's", "soft": "`soft`, the authors' option"}.get(
            row["arm"], f"`{row['arm']}`"
        )
        assert f"| {name} | {row['seed']} | {cells.strip()} |".replace("| |", "| |") in page, row
    assert f"All {len(results['runs'])} runs" in page
