"""Who may read what a run writes, asked of processes of their own: a umask is one for a whole process."""

import subprocess
import sys
from pathlib import Path

import pytest

WRITE = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from megatron_p2o.files import limit_readers, of_usual_mode, write_whole
folder = Path(sys.argv[1])
limit_readers(folder, sys.argv[2])
write_whole(folder / "templates" / "library-1.json", "{}")
(folder / "metrics.jsonl").touch()
weights = folder / "model.safetensors"
with of_usual_mode(weights):
    save_file({"a": torch.zeros(1)}, weights)
"""


def modes(folder: Path) -> set[int]:
    return {path.stat().st_mode & 0o777 for path in (folder, *folder.rglob("*"))}


@pytest.mark.parametrize(
    ("readable_by", "expected"),
    [("owner", {0o700, 0o600}), ("group", {0o750, 0o640}), ("all", {0o755, 0o644})],
)
def test_readers_are_those_that_the_run_names(readable_by: str, expected: set[int], tmp_path: Path) -> None:
    arguments = [str(tmp_path / "run"), readable_by]
    subprocess.run([sys.executable, "-c", WRITE, *arguments], check=True, timeout=300, umask=0o002)
    assert modes(tmp_path / "run") == expected


def test_a_folder_of_before_is_closed_and_none_is_opened(tmp_path: Path) -> None:
    for name, before, readable_by, after in (("a", 0o2775, "owner", 0o2700), ("b", 0o700, "all", 0o700)):
        folder = tmp_path / name
        folder.mkdir()
        folder.chmod(before)
        subprocess.run([sys.executable, "-c", WRITE, str(folder), readable_by], check=True, timeout=300)
        assert folder.stat().st_mode & 0o7777 == after


@pytest.mark.parametrize(("mode", "expected"), [(0o700, 0o600), (0o750, 0o640), (0o755, 0o644)])
def test_a_report_is_as_private_as_the_run_it_is_of(mode: int, expected: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").touch()
    run.chmod(mode)
    command = [sys.executable, "-m", "megatron_p2o.cli", "report", str(run), "--output", str(tmp_path / "out")]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=300, umask=0o022, check=False)
    assert outcome.returncode == 0, outcome.stderr
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {expected}
