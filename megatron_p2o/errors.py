"""The errors that users can repair, and the messages they get."""

import errno
import json
import os

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
