"""What signals do to a run: they end it, or have it save and end. Either is said at once."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from megatron_p2o.run_folder.checkpoints import pointed_name
from megatron_p2o.run_folder.state import CheckpointError
from megatron_p2o.terminal import TOLD, say

ENDING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_file_on_sigusr1(stop_file: Path) -> Iterator[None]:
    """Turn SIGUSR1 into the run's stop file, which the ranks look at between steps; the agent would die of it."""

    def stop_after_step(number: int, frame: FrameType | None) -> None:
        stop_file.touch()

    previous = signal.signal(signal.SIGUSR1, stop_after_step)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, previous)


@contextmanager
def told_at_once(notice: Callable[[int], str]) -> Iterator[None]:
    """Answer the first signal of each number with the line that `notice` returns for it; "" says nothing.

    Handlers need not know: torch's agent puts its own in the place of others, and tells when the ranks have ended. The
    interpreter writes the number of each signal that it handles into a pipe, and a thread reads them.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=_tell, args=(reader, notice), daemon=True, name="signals")
    thread.start()
    try:
        yield
    except KeyboardInterrupt as interruption:
        interruption.add_note(TOLD)
        raise
    finally:
        signal.set_wakeup_fd(previous)
        os.close(writer)  # ends the thread
        thread.join()
        os.close(reader)


def _tell(reader: int, notice: Callable[[int], str]) -> None:
    told: set[int] = set()
    while numbers := os.read(reader, 64):
        for number in numbers:
            line = "" if number in told else notice(number)
            told.add(number)
            if line:
                say(line, sys.stderr)


def training_notice(run_dir: Path, number: int) -> str:
    """Return a message on the effect of a signal on training: what is saved, and how to continue; "" for other
    signals."""
    if number == signal.SIGUSR1:
        return "p2o: SIGUSR1: the run saves and ends after its current step"
    if number not in ENDING:
        return ""
    checkpoints = run_dir / "checkpoints"
    try:
        newest = pointed_name(checkpoints)
    except CheckpointError:
        newest = ""
    goes_on = (
        f"the same command goes on from {checkpoints / newest}"
        if newest
        else "there is no checkpoint yet, the same command begins again"
    )
    return (
        f"p2o: {signal.Signals(number).name}: the run ends now and saves nothing more: {goes_on} "
        f"(to have a run save first: touch {run_dir / 'stop'})"
    )


def evaluation_notice(number: int) -> str:
    """Return what a signal does to an evaluation; "" of signals that do not end it."""
    if number not in ENDING:
        return ""
    return (
        f"p2o: {signal.Signals(number).name}: the evaluation ends now: the same command goes on after its last response"
    )
