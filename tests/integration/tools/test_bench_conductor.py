"""The benchmark of the conductor runs both ways over HTTP, and both give the completion that the engines send."""

import json
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[3] / "tools" / "bench_conductor.py"


def test_both_ways_read_the_engines_completions(tmp_path: Path) -> None:
    size = ["--tokens", "300", "7", "--engines", "2", "--steps", "2", "--flat-steps", "2", "--completions", "8"]
    command = [sys.executable, str(TOOL), *size, "--json", str(tmp_path / "result.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr  # it ends when a completion is another than the engines'
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [(row["num_tokens"], row["way"]) for row in rows] == [
        (tokens, way) for tokens in (300, 7) for way in ("plain", "ours")
    ]
    assert all(row["num_completions"] == 128 and row["ms"] > 0 and row["per_s"] > 0 for row in rows)
