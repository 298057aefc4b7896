"""The errors that users can repair, and the messages they get."""

import errno
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

REMEDIES = {
    errno.EACCES: "check its owner and permissions",
    errno.EPERM: "check its owner and permissions, or choose another place",
    errno.EROFS: "the file system is read-only, choose another place",
    errno.ENOENT: "check the path",
    errno.ENAMETOOLONG: "choose a shorter one",
    errno.EISDIR: "a folder stands where a file belongs, move it away",
    errno.ENOTDIR: "a file stands where a folder belongs, move it away",
    errno.EEXIST: "something else stands where it belongs, move it away",
    errno.ELOOP: "its symbolic links lead in a circle, remove them",
    **dict.fromkeys(DISK_FULL, "free some space"),
}

MAX_PATH_CHARACTERS = 200
"""Longest path in a message."""


def expected_message(error: BaseException) -> str | None:
    """Return the message for an error of an input, a file or a folder; None for an error of the program itself."""
    if isinstance(error, OSError):
        return _file_message(error)
    # What reads a file says which one it is: where these two arrive bare, a reader forgot to.
    if isinstance(error, ValueError) and not isinstance(error, UnicodeError | json.JSONDecodeError):
        return str(error)
    return None


class SeveralErrors(ValueError):
    """Several inputs cannot be used."""

    def __init__(self, messages: Sequence[str]) -> None:
        """`messages`: what is wrong with each."""
        self.messages = tuple(messages)
        super().__init__("\n  ".join([f"{len(messages)} problems:", *messages]))


def expected_messages(error: BaseException) -> tuple[str, ...] | None:
    """Return the message for each thing that an error is about; None as `expected_message`."""
    if isinstance(error, SeveralErrors):
        return error.messages
    message = expected_message(error)
    return None if message is None else (message,)


class Troubles:
    """Collects the errors of inputs that do not depend on one another, so that all are told at once."""

    def __init__(self) -> None:
        self._errors: list[Exception] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Go on after the block where an error of an input has ended it."""
        try:
            yield
        except Exception as error:
            if expected_message(error) is None:
                raise
            self._errors.append(error)

    def tell(self) -> None:
        """Raise what was noted: a single error as it is, several as `SeveralErrors`."""
        messages = [message for error in self._errors for message in expected_messages(error) or ()]
        several = tuple(dict.fromkeys(messages))  # two tasks may name the same file
        if len(several) > 1:
            raise SeveralErrors(several)
        if self._errors:
            raise self._errors[0]


def _file_message(error: OSError) -> str | None:
    """Return path, reason and remedy; None where no file is named, as for connections."""
    if error.filename is None and error.errno not in DISK_FULL:
        return None
    # Of a rename that failed, the second is the name a person knows.
    path = os.fspath(error.filename2 or error.filename or "")
    path = path.decode(errors="replace") if isinstance(path, bytes) else str(path)
    if len(path) > MAX_PATH_CHARACTERS:
        path = path[:MAX_PATH_CHARACTERS] + "..."
    remedy = REMEDIES.get(error.errno or 0)
    reason = error.strerror or str(error)
    return ": ".join(part for part in (path, reason, remedy) if part)
