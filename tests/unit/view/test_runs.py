"""Which runs are shown when none is named."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_p2o.cli import MAX_FOUND_RUNS, main
from megatron_p2o.view.runs import newest_runs

END_TIMEOUT_S = 60


def make_run(folder: Path, time_s: int, mark: str = "metrics.jsonl") -> Path:
    folder.mkdir(parents=True)
    (folder / mark).write_text("" if mark == "metrics.jsonl" else "{}")
    os.utime(folder / mark, (time_s, time_s))
    return folder


def test_runs_are_found_at_any_usual_depth_newest_first(tmp_path: Path) -> None:
    old = make_run(tmp_path / "old", 100)
    new = make_run(tmp_path / "experiment" / "group" / "new", 300, "config.yaml")
    middle = make_run(tmp_path / "quickstart" / "p2o-seed1", 200, "results.json")
    make_run(old / "copy", 400)
    (tmp_path / "empty").mkdir()
    assert newest_runs(tmp_path) == [new, middle, old], "what lies in a run's folder is part of it"


@pytest.mark.parametrize("name", ["runs", "nowhere"])
def test_without_any_run_the_error_says_what_to_do(tmp_path: Path, name: str) -> None:
    (tmp_path / "runs" / "empty").mkdir(parents=True)
    with pytest.raises(ValueError, match=rf"there is no run below .*{name}/: name its folder, as in p2o view RUN"):
        newest_runs(tmp_path / name)


def test_view_without_a_run_ends_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["view"]) == 2
    assert "there is no run below runs/" in capsys.readouterr().err


def test_view_without_a_run_says_which_it_shows(tmp_path: Path) -> None:
    for number in range(MAX_FOUND_RUNS + 1):
        make_run(tmp_path / "runs" / f"run{number:02d}", 100 + number)
    # A shell without job control starts what runs in the background with SIGINT ignored, and so do some services.
    command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-m", "megatron_p2o.cli", "view"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            told, address = process.stdout.readline(), process.stdout.readline()
            process.send_signal(signal.SIGINT)
            process.wait(timeout=END_TIMEOUT_S)
        finally:
            process.kill()
    names = ", ".join(f"runs/run{number:02d}" for number in range(MAX_FOUND_RUNS, 0, -1))
    assert told == f"p2o view: {names} (the newest {MAX_FOUND_RUNS} of {MAX_FOUND_RUNS + 1})\n"
    assert address.startswith("p2o view: http://127.0.0.1:")
