"""The benchmark of balancing runs and compares like with like."""

import json
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[3] / "tools" / "bench_balance.py"


def test_balancing_by_arithmetic_leaves_ranks_more_even_than_by_tokens(tmp_path: Path) -> None:
    size = ["--ranks", "8", "--median-tokens", "3000", "--samples", "96", "--repeats", "2"]
    command = [sys.executable, str(TOOL), *size, "--json", str(tmp_path / "balance.json")]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    by_rule = {row["rule"]: row for row in json.loads((tmp_path / "balance.json").read_text())["rows"]}
    assert set(by_rule) == {"ours", "ours, by tokens"}
    assert 1 <= by_rule["ours"]["busiest_rank"] < by_rule["ours, by tokens"]["busiest_rank"]
    assert all(row["busiest_rank"] <= row["slots"] for row in by_rule.values())
