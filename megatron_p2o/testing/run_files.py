"""Reads the files of a run for tests, while it runs or after it was killed."""

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

NOT_REPEATED = ("perf/", "memory/", "evolution/round_s", "engine/", "refresh/")
"""Begin the names of metrics that measure time or memory, or restarts of the program itself."""


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a JSONL file that may just be written, or not be there yet."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def steps_done(run_dir: Path) -> list[dict[str, Any]]:
    """Return the metrics of every training step."""
    metrics = [line["metrics"] for line in whole_lines(run_dir / "metrics.jsonl")]
    return [values for values in metrics if "rollout/reward_mean" in values]


def repeatable_numbers(run_dir: Path) -> list[Any]:
    """Return all metrics in order, with their step and epoch, that two runs of the same settings share."""
    return [
        (line["step"], line["epoch"], {key: value for key, value in line["metrics"].items() if is_repeatable(key)})
        for line in whole_lines(run_dir / "metrics.jsonl")
    ]


def frozen_answers(report: Path) -> dict[str, Any]:
    """Return what a `report.html` holds, by the address that its page asks for."""
    packed = re.search(r'id="frozen">([A-Za-z0-9+/=]*)</script>', report.read_text(encoding="utf-8"))
    assert packed is not None, f"{report} holds no answers"
    return json.loads(gzip.decompress(base64.b64decode(packed[1])))["answers"]


def is_repeatable(key: str) -> bool:
    return not key.startswith(NOT_REPEATED) and not key.endswith(("_s", "_per_s"))
