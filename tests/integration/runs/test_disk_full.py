"""A disk that fills up while a checkpoint is written costs that checkpoint only."""

import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from megatron_p2o.cli import BAD_INPUT, main
from megatron_p2o.policy.training.ranks import build_policy
from megatron_p2o.run_folder.checkpoints import POLICY_FOLDER, CheckpointSaver, latest_checkpoint
from megatron_p2o.run_folder.state import CheckpointError, RunState
from megatron_p2o.testing.policy_oracle import policy_config, random_samples
from megatron_p2o.testing.tiny_model import write_tiny_qwen3

SAMPLES = random_samples((3, 17, 9), vocab_size=131)
DISK_BYTES = 3 << 20
"""Two checkpoints of the tiny policy, of 0.6 MB each, and some."""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a folder on a file system of `DISK_BYTES`."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "p2o-test", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False, timeout=30)
    if mounted.returncode != 0:
        pytest.skip(f"mounting a tmpfs needs root: {mounted.stderr.strip()}")
    yield folder
    # Lazily: the traceback of an expected error may still hold a file.
    subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=30)


def state(step: int) -> RunState:
    return RunState(step=step, epoch=0, batch=step, hard_problem_ids=(), library_version=0, num_ledger_entries=0)


@pytest.mark.parametrize("num_free_kib", [0, 60, 300], ids=["at once", "before the weights", "amid the weights"])
def test_a_full_disk_is_named_and_training_resumes_once_there_is_space(
    small_disk: Path, tmp_path: Path, num_free_kib: int
) -> None:
    config = policy_config(write_tiny_qwen3(tmp_path / "model", vocab_size=131))
    with closing(build_policy(config)) as policy:
        saver = CheckpointSaver(small_disk, policy, keep_last=1)
        policy.update(SAMPLES, None, 29)
        saver.begin(state(1))
        saver.finish()
        expected = policy.update(SAMPLES, None, 29)
        ballast = small_disk / "ballast"
        fill(ballast, num_free_kib << 10)
        with pytest.raises(CheckpointError, match=r"step-000002 could not be written with 0 MiB free.*intact"):
            saver.begin(state(2))
            saver.finish()
        assert latest_checkpoint(small_disk) == small_disk / "checkpoints" / "step-000001"
        assert not list((small_disk / "checkpoints").glob(".*")), "what was begun is cleared away"

        policy.load(small_disk / "checkpoints" / "step-000001" / POLICY_FOLDER)
        assert policy.update(SAMPLES, None, 29) == expected
        ballast.unlink()
        saver.begin(state(2))
        saver.finish()
        assert latest_checkpoint(small_disk) == small_disk / "checkpoints" / "step-000002"


def test_a_disk_that_is_full_at_the_start_is_named(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_qwen3(tmp_path / "model")
    (tmp_path / "problems.jsonl").write_text('{"question": "1+1", "answer": "2"}\n')
    fill(small_disk / "ballast", 0)
    named = {"run.name": "first", "run.directory": small_disk, "model.path": tmp_path / "model"}
    named |= {"model.dtype": "float32", "data.train": tmp_path / "problems.jsonl", "evolution.enabled": "false"}
    (tmp_path / "run.yaml").touch()
    overrides = [part for name, value in named.items() for part in ("--set", f"{name}={value}")]
    assert main(["train", str(tmp_path / "run.yaml"), *overrides]) == BAD_INPUT
    assert f"{small_disk}/first/lock: No space left on device: free some space" in capsys.readouterr().err


def fill(path: Path, num_free_bytes: int) -> None:
    """Write `path` as large as its disk allows, then give `num_free_bytes` back."""
    size = 0
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                size += file.write(bytes(4096))
        except OSError:
            file.truncate(size - num_free_bytes)
