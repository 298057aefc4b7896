"""Prints to the terminal. Control characters in foreign text are shown, not obeyed.

Problems, templates, answers of endpoints, logs of engines and names of files may hold sequences that move the cursor,
change the title or set the clipboard. Everything that is printed or logged goes through `say`, `set_up_logging` or
`SafeConsole`.
"""

import logging
import re
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Control characters but tab and newline, overrides of the writing direction, separators of lines, half surrogates."""


def printable(text: str) -> str:
    """Return `text` with every character that a terminal would obey, or cannot show, as an escape: `\\x1b`."""
    return UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


MAX_QUOTED_CHARS = 200
"""Longest foreign text in a message."""


def quoted(text: str | bytes) -> str:
    """Return the beginning of `text` on one line, for a message; what a terminal would obey is escaped."""
    head = text[: 4 * MAX_QUOTED_CHARS]
    words = (head.decode(errors="replace") if isinstance(head, bytes) else head).split()
    return printable(" ".join(words))[:MAX_QUOTED_CHARS]


def listed(names: Sequence[str], limit: int) -> str:
    """Return how a message lists names: the first `limit`, and how many more there are; "none" when there are none."""
    shown = ", ".join(names[:limit]) or "none"
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown


TOLD = "p2o has said what this interruption does"
"""Note on a `KeyboardInterrupt`."""


def was_told(interruption: BaseException) -> bool:
    """Return whether the effect of an interruption has been printed."""
    return TOLD in getattr(interruption, "__notes__", ())


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line to `stream` (standard output by default) at once."""
    print(printable(text), file=stream or sys.stdout, flush=True)


class SafeConsole(Console):
    """A console of rich that shows the text it is given as `printable` does."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


PLAIN_TEXT_WIDTH = 1000
"""Columns of a table that goes to a file or a pipe: no row of ours is longer."""


def table_console(stream: TextIO | None = None) -> SafeConsole:
    """Return a console for a table on `stream` (standard output by default): as wide as a terminal, else plain text."""
    target = stream or sys.stdout
    return SafeConsole(file=target, width=None if target.isatty() else PLAIN_TEXT_WIDTH, highlight=False, markup=False)


TELL_EVERY_S = 15.0
"""Least time between two lines about one activity: a short one says nothing more than its beginning."""


class Countdown:
    """Counts what is done of an activity, and tells it now and then."""

    def __init__(
        self,
        activity: str,
        total: int | None,
        tell: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`total`: None where it is not known; `tell` takes a line."""
        self._activity, self._total, self._tell, self._clock = activity, total, tell, clock
        self._began = self._told = clock()

    def note(self, num_done: int) -> None:
        """Take in how much is done, and tell it if the last line is `TELL_EVERY_S` old."""
        now = self._clock()
        if now - self._told < TELL_EVERY_S:
            return
        self._told = now
        of_total = f" of {self._total}" if self._total is not None else ""
        lasted = duration_text(now - self._began)
        self._tell(f"{self._activity}: {num_done}{of_total} done after {lasted}{self._left(num_done)}")

    def _left(self, num_done: int) -> str:
        if self._total is None or not 0 < num_done < self._total:
            return ""
        seconds = (self._clock() - self._began) * (self._total - num_done) / num_done
        return f", about {duration_text(seconds)} left"


WAITED_EVERY_S = 10.0
"""Time between two lines about one wait where there is no terminal."""


class WaitLine:
    """Shows how a wait goes: a line that changes on a terminal, a line every `WAITED_EVERY_S` anywhere else."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """`stream`: standard error by default."""
        self._stream, self._clock = stream or sys.stderr, clock
        self._told = clock()
        self._is_shown = False

    def show(self, text: str) -> None:
        """Take what there is to say now."""
        if self._stream.isatty():
            self._is_shown = True
            width = shutil.get_terminal_size().columns - 1  # a line that wraps cannot be written over
            print(f"\r\x1b[K{printable(text)[:width]}", end="", file=self._stream, flush=True)
        elif self._clock() - self._told >= WAITED_EVERY_S:
            self._told = self._clock()
            say(text, self._stream)

    def close(self) -> None:
        """Take the line away from a terminal."""
        if self._is_shown:
            print("\r\x1b[K", end="", file=self._stream, flush=True)


def duration_text(seconds: float) -> str:
    """Return a duration as people say it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def size_text(num_bytes: int) -> str:
    """Return a number of bytes as people say it."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


class _SafeRecord(logging.LogRecord):
    """Makes the messages of every logger safe: libraries bring handlers of their own."""

    def getMessage(self) -> str:
        return printable(super().getMessage())


class _SafeFormatter(logging.Formatter):
    """Makes tracebacks safe, too."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def set_up_logging(layout: str = "%(levelname)s %(name)s: %(message)s") -> None:
    """Log warnings of this process to standard error, `printable`, and also the exception that ends it."""
    handler = logging.StreamHandler()
    handler.setFormatter(_SafeFormatter(layout))
    logging.setLogRecordFactory(_SafeRecord)
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    sys.excepthook = _print_traceback
    threading.excepthook = _print_traceback_of_thread


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    say("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"), sys.stderr)


def _print_traceback_of_thread(ended: threading.ExceptHookArgs) -> None:
    if ended.exc_value is not None:
        _print_traceback(ended.exc_type, ended.exc_value, ended.exc_traceback)
