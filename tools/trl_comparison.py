"""What runs of two trainers took, side by side."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any


def told(run: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in measures(run).items())


def measures(run: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a run that are compared: medians over its steps, then of the whole run."""
    steps = run["steps"]

    def middle(value: Callable[[Mapping[str, float]], float]) -> float:
        return median(map(value, steps))

    return {
        "rollouts_per_s": middle(lambda step: step["num_rollouts"] / step["rollout_s"]),
        "sampled_tokens_per_s": middle(lambda step: step["response_tokens"] / step["rollout_s"]),
        "update_tokens_per_s": middle(lambda step: step["response_tokens"] / step["update_s"]),
        "refresh_s": middle(lambda step: step.get("refresh_s", 0.0)),
        "step_s": middle(lambda step: step["step_s"]),
        "start_s": run["start_s"],
        "wall_s": run["wall_s"],
        "cpu_s": run["cpu_s"],
        "peak_mib": run["peak_bytes"] / 2**20,
        **{f"accuracy_at_step_{step}": share for step, share in run["accuracy"].items()},
    }


def compared(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """Return of each measure the median of both, and median, lowest and highest of ours / TRL's over the turns."""
    found = {arm: [measures(run) for run in given] for arm, given in runs.items()}
    rows: dict[str, dict[str, float]] = {}
    for name in found["ours"][0]:
        theirs, ours = ([each[name] for each in found[arm]] for arm in ("trl", "ours"))
        rows[name] = {"trl": median(theirs), "ours": median(ours)}
        if all(theirs):
            ratios = [our / their for our, their in zip(ours, theirs, strict=True)]
            rows[name] |= {"ratio": median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios)}
    return rows


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Return the rows as the table of docs/benchmarks.md."""
    lines = ["| | TRL | ours | ours / TRL |", "|---|---|---|---|"]
    for name, row in rows.items():
        ratio = f"{row['ratio']:.2f} ({row['ratio_low']:.2f}-{row['ratio_high']:.2f})" if "ratio" in row else ""
        lines.append(f"| {name} | {row['trl']:.4g} | {row['ours']:.4g} | {ratio} |")
    return "\n".join(lines)
