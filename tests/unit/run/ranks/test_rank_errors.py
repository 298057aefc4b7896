"""Which of several failed ranks a run's one message is about."""

import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from megatron_p2o.run.ranks.rank_errors import (
    SHORTEST_STOP_TIMEOUT_S,
    error_file,
    failure_message,
    forget_errors,
    report_error,
)


@dataclass(frozen=True)
class Ended:
    """How a rank ended: exit status or minus a signal, seconds after the first, seconds when it left word."""

    status: int
    seconds: int = 0
    left_word_at: float | None = None


NOW = int(time.time())


def end(run_dir: Path, ended: dict[int, Ended], monkeypatch: pytest.MonkeyPatch) -> dict[int, ProcessFailure]:
    """Let the ranks of a node end, and return what its agent notes."""
    failures: dict[int, ProcessFailure] = {}
    for rank, how in ended.items():
        if how.left_word_at is not None:
            monkeypatch.setenv("RANK", str(rank))
            try:
                raise ConnectionError(f"rank {rank} says\nso")
            except ConnectionError as error:
                report_error(run_dir, type(error), error, error.__traceback__)
            os.utime(error_file(run_dir, rank), (NOW + how.left_word_at,) * 2)
        failures[rank] = ProcessFailure(local_rank=rank, pid=1, exitcode=how.status, error_file=os.devnull)
        failures[rank].timestamp = NOW + how.seconds
    return failures


def message(run_dir: Path, ended: dict[int, Ended], monkeypatch: pytest.MonkeyPatch, node: str = "node7") -> list[str]:
    return failure_message(end(run_dir, ended, monkeypatch), run_dir, node).splitlines()


@pytest.mark.parametrize(
    ("ended", "first", "how"),
    [
        ({2: Ended(1, 0, 0.0), 3: Ended(-9, 1)}, 3, "was ended by SIGKILL"),
        ({0: Ended(-11), 1: Ended(143)}, 0, "was ended by SIGSEGV"),
        ({0: Ended(1, 0, 0.4), 1: Ended(1, 0, 0.1), 2: Ended(143)}, 1, "failed first"),
        ({0: Ended(-15), 1: Ended(3)}, 1, "ended with status 3"),
        ({0: Ended(-9, SHORTEST_STOP_TIMEOUT_S + 1), 1: Ended(1, 0, 0.0)}, 1, "failed first"),
        ({0: Ended(-6, 2), 1: Ended(1, 2, 0.4)}, 1, "failed first"),
        ({0: Ended(-6), 1: Ended(1, 2, 0.4)}, 0, "was ended by SIGABRT"),
        ({0: Ended(-11, 1, 0.2), 1: Ended(1, 1, 0.4)}, 0, "failed first"),
        ({0: Ended(3), 1: Ended(1, 0, 0.4)}, 0, "ended with status 3"),
        ({0: Ended(143, 1), 1: Ended(-15)}, 1, "was ended by SIGTERM"),
    ],
    ids=[
        *("killed", "crashed", "the first word", "ended by the agent", "killed by the agent, which it did not heed"),
        *("aborted after its peer", "aborted", "crashed while it ended", "ended without a word", "ended from outside"),
    ],
)
def test_the_message_is_about_the_rank_that_failed_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: dict[int, Ended], first: int, how: str
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    lines = message(tmp_path, ended, monkeypatch)
    told = f"p2o: rank {first} on node7 {how}; the run is in {tmp_path}"
    if ended[first].left_word_at is None:
        assert lines[0] == told
        assert len(lines) == (2 if ended[first].status == -signal.SIGKILL else 1)
    else:
        where = f"p2o: where it happened: {error_file(tmp_path, first)}"
        assert lines == [f"p2o: ConnectionError: rank {first} says", "so", where, told]
        assert "raise ConnectionError" in error_file(tmp_path, first).read_text()


def test_a_node_names_the_rank_of_another_that_failed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as other_node:
        other_node.setenv("SLURMD_NODENAME", "node8")
        end(tmp_path, {9: Ended(1, 0, 0.1)}, other_node)
    lines = message(tmp_path, {0: Ended(1, 0, 0.2), 1: Ended(-6, 1)}, monkeypatch)
    assert lines[0] == "p2o: ConnectionError: rank 9 says"
    assert lines[2] == f"p2o: where it happened: {error_file(tmp_path, 9)}"
    assert lines[3] == f"p2o: rank 9 on node8 failed first; the run is in {tmp_path}"


def test_a_node_names_the_rank_of_another_that_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = message(tmp_path, {9: Ended(-9, 1), 8: Ended(1, 1, 0.4)}, monkeypatch, "node8")
    here = message(tmp_path, {0: Ended(1, 1, 0.3), 1: Ended(143, 2)}, monkeypatch)
    assert here == there
    assert here[0] == f"p2o: rank 9 on node8 was ended by SIGKILL; the run is in {tmp_path}"


def test_what_an_earlier_start_left_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end(tmp_path, {5: Ended(1, 0, 0.0)}, monkeypatch)
    forget_errors(tmp_path)
    assert message(tmp_path, {0: Ended(1, 5, 5.0)}, monkeypatch)[0] == "p2o: ConnectionError: rank 0 says"


def test_an_error_that_cannot_be_left_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").write_text("a file where the run's folder should be")
    report_error(tmp_path / "run", ValueError, ValueError("the reason"), None)
    assert "p2o: the reason\n" in capsys.readouterr().err


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with Path("/dev/full").open("wb", buffering=0) as full, pytest.raises(OSError, match="No space left") as caught:
        full.write(b"x")
    report_error(tmp_path, caught.type, caught.value, caught.tb)
    words = error_file(tmp_path, 0).read_text()
    told = rf"No space left on device: free some space in or below {tmp_path}, where \d+ MiB are free, and start"
    assert re.match(told, words)
