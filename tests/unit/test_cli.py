"""The command itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_p2o import __version__
from megatron_p2o.cli import BAD_INPUT, INTERRUPTED, main


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    assert capsys.readouterr().out == f"p2o {__version__}\n"


FALSE_UNDER_IGNORED_SIGCHLD = """
import signal, subprocess
from megatron_p2o.cli import main
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
main([])
print("false:", subprocess.run(["false"]).returncode)
"""


def test_it_sees_its_children_fail_whatever_signals_it_was_started_to_ignore() -> None:
    command = [sys.executable, "-c", FALSE_UNDER_IGNORED_SIGCHLD]
    outcome = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    assert outcome.stdout.splitlines()[-1] == "false: 1"


def test_the_command_alone_shows_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert "doctor" in shown and shown.splitlines()[-1] == "next: p2o init"
    (tmp_path / "config.yaml").touch()
    assert main([]) == 0
    assert "next: p2o train config.yaml --dry-run" in capsys.readouterr().out


def test_an_interruption_before_anything_is_started_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(path: Path, overrides: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_p2o.cli.load_config", interrupted)
    assert main(["train", str(tmp_path / "config.yaml")]) == INTERRUPTED
    assert capsys.readouterr().err == "p2o: SIGINT: ended before it was done; the same command begins again\n"


def test_a_run_folder_that_is_not_there_is_no_problem_of_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "runs/none"]) == BAD_INPUT
    said = capsys.readouterr().err
    assert said == "p2o: runs/none: no such run folder: the runs are below run.directory, runs/ by default\n"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("p2o tr", {"train"}),
        ("p2o train config.yaml --set optimizer.lr", {"optimizer.lr=", "optimizer.lr_decay="}),
        ("p2o eval --set evaluation.best_", {"evaluation.best_set=", "evaluation.best_metric="}),
    ],
)
def test_a_shell_completes_commands_and_settings(line: str, expected: set[str], tmp_path: Path) -> None:
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    given = {"_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "found")}
    command = [sys.executable, "-m", "megatron_p2o.cli"]
    subprocess.run(command, env={**os.environ, **asked, **given}, check=True, timeout=120)
    assert {word.strip() for word in (tmp_path / "found").read_text().split("\n")} == expected
