"""Writes what the runs of an experiment of docs/hard_problems.md brought: raw numbers, their tables, a figure.

    python tools/experiment_results.py experiments/masks.yaml --set heldout_hard \\
        --output experiments/results/masks.json --figure docs/figures/masks.svg

The tables are printed in Markdown. `p2o compare --no-run` must have compared the finished runs before.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_p2o.experiment.conduct import is_finished
from megatron_p2o.experiment.plan import Experiment, read_experiment
from megatron_p2o.files import read_json_object
from megatron_p2o.metrics.jsonl import read_lines

REACHED = 0.5
"""Plain accuracy whose price in tokens is told."""

SMALLEST_DIFFERENCE, LEVEL = 0.05, 0.05
"""They are of the rule by which an arm is better or worse."""

SHOWN = {"heldout_hard": "hard", "heldout_easy": "easy"}
"""What the table calls an evaluation set, where not by its name."""


def row_of(folder: Path, arm: str, seed: int, name: str) -> dict[str, Any]:
    """Return what a finished run brought on the evaluation set `name`.

    `curve`: (tokens sampled to learn, plain accuracy) at each evaluation. `tokens_to_half`: tokens at the first with
    an accuracy of at least `REACHED`; None if there is none. `round`: score of the best template and coverage at the
    end of the first round; None without one. `shifts`: mean log-ratio of templated responses, per token, in the first
    and the last step that had some; None without templates. `correct`: right answers to each problem at the end, by
    which arms can be compared again; in the order of the problems' ids, "-" where no grade was decided.
    """
    results = read_json_object(folder / "results.json")
    metrics = [line["metrics"] for line in read_lines(folder / "metrics.jsonl")]
    # An evaluation at the end that was due anyway is written twice.
    curve = dict.fromkeys(
        (each["compute/learning_tokens"], each[f"eval/{name}/avg"]) for each in metrics if f"eval/{name}/avg" in each
    )
    shifts = [each["template/shift_per_token"] for each in metrics if "template/shift_per_token" in each]
    key = "train/ratio_mask_dropped_shift_share"
    dropped = [each[key] for each in metrics if each.get(key) is not None]
    templated = results.get("templated_evaluation", {}).get(name)
    first_round = next(iter(results.get("rounds", [])), None)
    return {
        "arm": arm,
        "seed": seed,
        "correct": _correct(results["evaluation_problems"][name]),
        "accuracy": {each: outcome["accuracy"] for each, outcome in results["evaluation"].items()},
        "template_accuracy": templated["accuracy"] if templated else None,
        "tokens": results["compute"]["learning_tokens"],
        "trained_tokens": results["compute"]["trained_tokens"],
        "steps": results["num_steps"],
        "wall_s": round(results["compute"]["wall_s"]),
        "tokens_to_half": next((tokens for tokens, accuracy in curve if accuracy >= REACHED), None),
        "round": first_round and {key: first_round[key] for key in ("best_score", "coverage")},
        "shifts": [shifts[0], shifts[-1]] if shifts else None,
        "dropped_shift_share": fmean(dropped) if dropped else None,
        "curve": [list(point) for point in curve],
    }


def _correct(problems: Mapping[str, Any]) -> str:
    decided = problems["decided_by_problem"]
    return " ".join(f"{problems['correct_by_problem'][each]:g}" if decided[each] else "-" for each in sorted(decided))


def verdict(test: Mapping[str, Any], num_seeds: int, num_tests: int) -> str:
    """Return what the rule of docs/hard_problems.md makes of a test: better, worse or undecided; open before all seeds
    are there."""
    differences = test["difference_by_seed"]
    if len(differences) < num_seeds:
        return "open"
    same_sign = all(each > 0 for each in differences) or all(each < 0 for each in differences)
    is_decided = (
        same_sign
        and not test["interval"]["low"] <= 0 <= test["interval"]["high"]
        and test["p_value"] < LEVEL / num_tests
        and abs(fmean(differences)) >= SMALLEST_DIFFERENCE
    )
    return ("better" if differences[0] > 0 else "worse") if is_decided else "undecided"


def results_of(experiment: Experiment, name: str, num_seeds: int) -> dict[str, Any]:
    """Return the rows of all finished runs and the verdicts about the arms after the first."""
    finished = [run for run in experiment.runs if is_finished(run)]
    comparison = read_json_object(experiment.folder / "comparison.json")
    tests = [test for test in comparison["tests"] if test["set"] == name]
    starts = [list(read_lines(run.folder / "history.jsonl"))[-1] for run in finished]
    return {
        "set": name,
        "budget": experiment.budget,
        "commits": sorted({start["program"].get("commit") or "unknown" for start in starts}),
        "settings": comparison["settings"],
        "runs": [row_of(run.folder, run.arm, run.seed, name) for run in finished],
        "tests": [{**test, "verdict": verdict(test, num_seeds, len(experiment.arms) - 1)} for test in tests],
    }


def table(results: Mapping[str, Any], arms: Sequence[str]) -> str:
    """Return the rows in Markdown, an arm each, every seed shown."""
    easy = next(each for each in results["runs"][0]["accuracy"] if each != results["set"])
    main, other = (SHOWN.get(each, f"`{each}`") for each in (results["set"], easy))
    verdicts = {test["second"]: test["verdict"] for test in results["tests"]}
    lines = [
        f"| arm | {main}, plainly | thousand tokens to 0.5 | {other}, plainly | {main}, best template "
        "| shift, first and last | dropped shift | verdict |",
        "|---" * 8 + "|",
    ]
    for arm in arms:
        rows = [row for row in results["runs"] if row["arm"] == arm]
        cells = [
            " / ".join(f"{row['accuracy'][results['set']]:.2f}" for row in rows),
            " / ".join(f"{row['tokens_to_half'] / 1000:.0f}" if row["tokens_to_half"] else "never" for row in rows),
            " / ".join(f"{row['accuracy'][easy]:.2f}" for row in rows),
            _mean_text([row["template_accuracy"] for row in rows], "{:.2f}"),
            _mean_text([row["shifts"] and row["shifts"][0] for row in rows], "{:.2f}", " → ")
            + _mean_text([row["shifts"] and row["shifts"][1] for row in rows], "{:.2f}"),
            _mean_text([row["dropped_shift_share"] for row in rows], "{:.0%}"),
            verdicts.get(arm, ""),
        ]
        lines.append(f"| `{arm}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def round_table(results: Mapping[str, Any], arms: Sequence[str]) -> str:
    """Return what the first rounds of evolution found, in Markdown, an arm each, every seed shown."""
    lines = ["| arm | score of the best template | coverage |", "|---|---|---|"]
    for arm in arms:
        rounds = [row["round"] for row in results["runs"] if row["arm"] == arm and row["round"]]
        cells = [" / ".join(f"{each[key]:.2f}" for each in rounds) for key in ("best_score", "coverage")]
        lines.append(f"| `{arm}` | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def _mean_text(values: Sequence[float | None], shown: str, end: str = "") -> str:
    there = [value for value in values if value is not None]
    return shown.format(fmean(there)) + end if there else ""


def draw(results: Mapping[str, Any], arms: Sequence[str], path: Path) -> None:
    """Write the figure: plain accuracy against tokens, a panel for each arm, a line for each seed."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "experiment", "svg.fonttype": "none", "font.size": 8}
    from matplotlib import pyplot

    num_rows = -(-len(arms) // 5)
    figure, grid = pyplot.subplots(
        num_rows, 5, figsize=(9.0, 1.7 * num_rows + 0.4), sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    for panel, arm in zip(grid.flat, arms, strict=False):
        for row in results["runs"]:
            if row["arm"] == arm:
                tokens, accuracies = zip(*row["curve"], strict=True)
                panel.plot([each / 1000 for each in tokens], accuracies, ".-", markersize=3, linewidth=1)
        panel.set_title(arm, fontsize=8)
        panel.set_ylim(-0.05, 1.05)
    for panel in list(grid.flat)[len(arms) :]:
        panel.set_visible(False)
    figure.supxlabel("thousand sampled tokens")
    figure.supylabel(f"accuracy on {results['set']}, asked plainly")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--set", required=True, help="evaluation set of the primary measure")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    experiment = read_experiment(options.experiment)
    num_seeds = len({run.seed for run in experiment.runs})
    results = results_of(experiment, options.set, num_seeds)
    print(table(results, experiment.arms))
    if any(row["round"] for row in results["runs"]):
        print(f"\n{round_table(results, experiment.arms)}")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if options.figure:
        draw(results, experiment.arms, options.figure)


if __name__ == "__main__":
    main()
