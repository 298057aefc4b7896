"""The results of a run that has ended.

runs/<name>/results.json         what came of it, written last
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_p2o.files import read_json_object, write_whole

RESULTS_FILE = "results.json"


def write_results_file(run_dir: Path, results: Mapping[str, Any]) -> None:
    """Write the results of a run. Raises `OSError`."""
    write_whole(run_dir / RESULTS_FILE, json.dumps(results, indent=1))


def steps_of_results(run_dir: Path) -> int | None:
    """Return the steps after which a run's results were written; None where there are none that can be read."""
    try:
        steps = read_json_object(run_dir / RESULTS_FILE).get("num_steps")
    except (OSError, ValueError):
        return None
    return steps if isinstance(steps, int) else None


def finished_line(run_dir: Path, num_steps: int) -> str:
    """Return what to say of a run that has ended, and how to look at it."""
    return (
        f"finished after {num_steps} steps: results are in {run_dir / RESULTS_FILE}; "
        f"to look at them: p2o report {run_dir}"
    )
