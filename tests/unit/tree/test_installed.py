"""What an installed package needs beside its Python files comes with it."""

import json
import os
import subprocess
import sys
from pathlib import Path

from megatron_p2o.testing.run_files import frozen_answers

ROOT = Path(__file__).parents[3]

WRITE_REPORT = """
import sys
from pathlib import Path

from megatron_p2o.testing.run_files import frozen_answers
import megatron_p2o
from megatron_p2o.view.frozen import write_report
write_report([Path(sys.argv[1])], Path(sys.argv[2]))
print(megatron_p2o.__file__)
"""


def test_an_installed_package_writes_a_report_without_its_source(tmp_path: Path) -> None:
    built, run, report = tmp_path / "built", tmp_path / "run", tmp_path / "report.html"
    build = ("egg_info", "--egg-base", str(tmp_path), "build_py", "--build-lib", str(built))
    subprocess.run([sys.executable, "setup.py", "-q", *build], cwd=ROOT, check=True, capture_output=True, timeout=120)
    run.mkdir()
    metrics = {"rollout/reward_mean": 0.375}
    line = {"step": 1, "epoch": 0, "time": "2026-01-31T12:00:00.000+00:00", "metrics": metrics}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    done = subprocess.run(
        [sys.executable, "-c", WRITE_REPORT, str(run), str(report)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(built)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(built)
    assert "37.5 %" in frozen_answers(report)["report"]["overview"]["rows"][0]["cells"]
