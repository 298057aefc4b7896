"""The command itself."""

from pathlib import Path

import pytest

from megatron_p2o import __version__
from megatron_p2o.cli import main


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    assert capsys.readouterr().out == f"p2o {__version__}\n"


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
