"""A signal is answered at once with one line: what is saved, and how the run goes on."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from megatron_p2o.run.launch import signal_notice
from megatron_p2o.run.ranks.signals import evaluation_notice, stop_file_on_sigusr1, told_at_once
from megatron_p2o.terminal import was_told


@pytest.fixture
def previous_handlers() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


class Ended(Exception):
    """What the handler of torch's agent raises."""


def end(number: int, frame: FrameType | None) -> None:
    raise Ended


@pytest.mark.usefixtures("previous_handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_ended_says_what_is_saved_and_how_it_goes_on(
    number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said() -> list[str]:
        with pytest.raises(Ended), told_at_once(signal_notice(tmp_path, trains=True, is_head=True)):
            signal.signal(number, end)  # put in place of others, as torch's agent does, once ranks are started
            os.kill(os.getpid(), number)
        return capsys.readouterr().err.splitlines()

    start, save = f"p2o: {number.name}: the run ends now and saves nothing more: ", f"touch {tmp_path}/stop)"
    (line,) = said()
    assert line == f"{start}there is no checkpoint yet, the same command begins again (to have a run save first: {save}"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step-000007")
    (line,) = said()
    goes_on = f"the same command goes on from {tmp_path}/checkpoints/step-000007"
    assert line == f"{start}{goes_on} (to have a run save first: {save}"


@pytest.mark.usefixtures("previous_handlers")
def test_an_interruption_that_was_told_is_not_told_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts in the background
    with pytest.raises(KeyboardInterrupt) as told, told_at_once(evaluation_notice):
        signal.raise_signal(signal.SIGINT)
    assert was_told(told.value) and "the evaluation ends now" in capsys.readouterr().err
    assert not was_told(KeyboardInterrupt())


@pytest.mark.usefixtures("previous_handlers")
def test_a_run_that_is_asked_to_save_says_so_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stop = tmp_path / "stop"
    with told_at_once(signal_notice(tmp_path, trains=True, is_head=True)), stop_file_on_sigusr1(stop):
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.exists()
    assert capsys.readouterr().err == "p2o: SIGUSR1: the run saves and ends after its current step\n"


@pytest.mark.usefixtures("previous_handlers")
@pytest.mark.parametrize(
    ("trains", "is_head", "expected"),
    [
        (False, True, "p2o: SIGINT: the evaluation ends now: the same command goes on after its last response\n"),
        (True, False, ""),
    ],
)
def test_an_evaluation_says_that_answers_are_kept_and_one_node_speaks_for_all(
    trains: bool, is_head: bool, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Ended), told_at_once(signal_notice(tmp_path, trains=trains, is_head=is_head)):
        signal.signal(signal.SIGINT, end)
        os.kill(os.getpid(), signal.SIGINT)
    assert capsys.readouterr().err == expected
    assert signal.set_wakeup_fd(-1) == -1, "nothing is left in place"
