"""Which of several failed ranks a run's one message is about."""

import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from megatron_p2o.rank_errors import STOP_TIMEOUT_S, error_file, failure_message, report_error


@dataclass(frozen=True)
class Ended:
    """How a rank ended: exit status or minus a signal, seconds after the first, seconds when it left word."""

    status: int
    seconds: int = 0
    left_word_at: float | None = None


def message(run_dir: Path, ended: dict[int, Ended], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    now = int(time.time())
    failures: dict[int, ProcessFailure] = {}
    for rank, how in ended.items():
        if how.left_word_at is not None:
            monkeypatch.setenv("RANK", str(rank))
            try:
                raise ConnectionError(f"rank {rank} says\nso")
            except ConnectionError as error:
                report_error(run_dir, type(error), error, error.__traceback__)
            os.utime(error_file(run_dir, rank), (now + how.left_word_at,) * 2)
        failures[rank] = ProcessFailure(local_rank=rank, pid=1, exitcode=how.status, error_file=os.devnull)
        failures[rank].timestamp = now + how.seconds
    return failure_message(failures, run_dir, "node7").splitlines()


@pytest.mark.parametrize(
    ("ended", "first", "how"),
    [
        ({2: Ended(1, 0, 0.0), 3: Ended(-9, 1)}, 3, "was ended by SIGKILL"),
        ({0: Ended(-11), 1: Ended(143)}, 0, "was ended by SIGSEGV"),
        ({0: Ended(1, 0, 0.4), 1: Ended(1, 0, 0.1), 2: Ended(143)}, 1, "ended with status 1"),
        ({0: Ended(-15), 1: Ended(3)}, 1, "ended with status 3"),
        ({0: Ended(-9, STOP_TIMEOUT_S + 1), 1: Ended(1, 0, 0.0)}, 1, "ended with status 1"),
    ],
    ids=["killed", "crashed", "the first word", "ended by the agent", "killed by the agent, which it did not heed"],
)
def test_the_message_is_about_the_rank_that_failed_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: dict[int, Ended], first: int, how: str
) -> None:
    lines = message(tmp_path, ended, monkeypatch)
    told = f"p2o: rank {first} on node7 {how}; the run is in {tmp_path}"
    if ended[first].left_word_at is None:
        assert lines[0] == told
        assert len(lines) == (2 if ended[first].status == -signal.SIGKILL else 1)
    else:
        where = f"p2o: where it happened: {error_file(tmp_path, first)}"
        assert lines == [f"p2o: ConnectionError: rank {first} says", "so", where, told]
        assert "raise ConnectionError" in error_file(tmp_path, first).read_text()


def test_an_error_that_cannot_be_left_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").write_text("a file where the run's folder should be")
    report_error(tmp_path / "run", ValueError, ValueError("the reason"), None)
    assert "p2o: ValueError: the reason" in capsys.readouterr().err


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with Path("/dev/full").open("wb", buffering=0) as full, pytest.raises(OSError, match="No space left") as caught:
        full.write(b"x")
    report_error(tmp_path, caught.type, caught.value, caught.tb)
    words = error_file(tmp_path, 0).read_text()
    assert re.match(rf"OSError: \[Errno 28\] No space left on device in or below {tmp_path}, with \d+ MiB free", words)
