"""What a process asks of the kernel: to end with its parent, and to open many files."""

import ctypes
import os
import resource
import signal
import sys

PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""

MANY_FILES = 65536
"""Connections of 256 engines with 256 requests each."""


def end_with_parent(parent_pid: int | None = None) -> None:
    """Have the kernel kill this process when the thread that started it ends, however it ends.

    `parent_pid`: who should still be the parent; this process ends now when it is gone already.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if parent_pid is not None and os.getppid() != parent_pid:
        sys.exit("the parent process is gone")


def allow_many_files() -> int:
    """Raise this process's limit of open files, which its children inherit, to `MANY_FILES` or as far as may be.

    Each request to an engine takes a connection. Eight engines take more than a shell's usual 1,024, which Slurm hands
    on to its jobs, and an engine that cannot be connected to looks as if it were gone. Returns the limit.
    """
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MANY_FILES if most == resource.RLIM_INFINITY else min(MANY_FILES, most)
    if allowed != resource.RLIM_INFINITY and allowed < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
        return wanted
    return allowed
