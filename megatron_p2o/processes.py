"""Process settings: end with the parent, see children end, open many files, and the environment of children."""

import ctypes
import os
import re
import resource
import signal
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""

MANY_FILES = 65536
"""Connections of 256 engines with 256 requests each."""

SECRET_NAME = re.compile(
    r"SECRET|PASSWORD|PASSPHRASE|CREDENTIAL|^AWS_|^SSHPASS$|._PWD$"
    r"|CONNECTION_STRING|WEBHOOK|^KUBECONFIG$"
    r"|(^|_)(API_?KEY|KEYS?|(?<!PER_)TOKEN|PAT|PASS|PASSWD|AUTH|BEARER|JWT|COOKIE|NETRC)\d*(_\w+)?$",
    re.IGNORECASE,
)
"""Environment variables named like this hold a secret, or lead to one: HF_TOKEN, API_KEY_2, AWS_PROFILE, SSH_AUTH_SOCK.
A secret under any other name is passed on unless `SECRET_NAMES_VARIABLE` names it."""

URL_WITH_PASSWORD = re.compile(r"://[^/@\s]+@")
"""As a proxy's may be, or an address that holds a token."""

SECRET_NAMES_VARIABLE = "P2O_SECRET_NAMES"
"""Environment variable with the names, separated by commas, of others that hold secrets: those that settings name."""

STORE_FILE_VARIABLE = "P2O_STORE_FILE"
"""Environment variable by which the ranks of a single machine find the file that they meet in."""

LOOPBACK_ONLY = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}
"""Variables that keep gloo and NCCL of processes on one machine away from its networks."""

SHORTEST_SECRET = 8
"""Characters. Switches have names of all kinds, and values like 1 and true."""

PROXY_VARIABLES = tuple(name for proxy in ("https_proxy", "http_proxy", "all_proxy") for name in (proxy, proxy.upper()))
"""For a process that talks to an endpoint out there."""


def is_secret(name: str, value: str) -> bool:
    """Return whether an environment variable looks as if it held a secret."""
    if name in os.environ.get(SECRET_NAMES_VARIABLE, "").split(","):
        return True
    looks_secret = SECRET_NAME.search(name) is not None and len(value) >= SHORTEST_SECRET
    return looks_secret or URL_WITH_PASSWORD.search(value) is not None


def child_environment(needed: Collection[str] = ()) -> dict[str, str]:
    """Return this process's environment for a child: without secrets, those of the names in `needed` excepted.

    What remains may still depend on the machine (CUDA, NCCL, Slurm, paths), which no list of allowed names would know.
    """
    return {name: value for name, value in os.environ.items() if name in needed or not is_secret(name, value)}


def variables_named_in(arguments: Mapping[str, object]) -> tuple[str, ...]:
    """Return the environment variables that foreign code needs: those that its arguments called `..._env` name."""
    return tuple(value for name, value in arguments.items() if name.endswith("_env") and isinstance(value, str))


def keys_named_in(arguments: Mapping[str, object]) -> tuple[str, ...]:
    """Return the part of them that holds a key whatever its name is: what an argument `api_key_env` names."""
    value = arguments.get("api_key_env")
    return (value,) if isinstance(value, str) else ()


def end_with_parent(parent_pid: int) -> None:
    """Make the kernel kill this process when the thread that started it ends. Exits at once if `parent_pid` is no
    longer the parent, which may have ended before this call.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        sys.exit("the parent process is gone")


def see_children_end() -> None:
    """Have the kernel tell how a child ended, also where whoever started this process ignored SIGCHLD.

    It hands that on. Python would then take every child for one that ended well, a rank that was killed too.
    """
    if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


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


@dataclass(frozen=True, kw_only=True, slots=True)
class HostMemory:
    """Pages of one or several processes; those that processes share count in each of them."""

    resident_bytes: int = 0
    """Now."""
    peak_bytes: int = 0
    """The most since they were started, or since someone reset it. Of several processes the sum of their peaks."""

    def __add__(self, other: "HostMemory") -> "HostMemory":
        return HostMemory(
            resident_bytes=self.resident_bytes + other.resident_bytes, peak_bytes=self.peak_bytes + other.peak_bytes
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMemory:
    """What one rank of the trainer holds."""

    host: HostMemory
    gpu_peak_bytes: int
    """The most that its tensors have taken on its GPU since someone reset it; 0 without one."""
    agent: HostMemory = HostMemory()
    """The `p2o` process that started it, if it is the first rank of its node."""


def host_memory_of(process_ids: Iterable[int]) -> HostMemory:
    """Return what the processes hold together; one that is gone holds nothing."""
    return sum(map(_of_process, process_ids), HostMemory())


def host_memory_of_family(process_id: int) -> HostMemory:
    """Return what a process and all below it hold."""
    try:
        children = psutil.Process(process_id).children(recursive=True)
    except psutil.Error:
        return HostMemory()
    return host_memory_of([process_id, *(child.pid for child in children)])


def own_host_memory() -> HostMemory:
    """Return what this process holds."""
    return host_memory_of([os.getpid()])


def _of_process(process_id: int) -> HostMemory:
    try:
        status = Path(f"/proc/{process_id}/status").read_text()
    except OSError:
        return HostMemory()
    found = {name: 1024 * int(kib) for name, kib in re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB$", status, re.MULTILINE)}
    return HostMemory(resident_bytes=found.get("VmRSS", 0), peak_bytes=found.get("VmHWM", 0))


def exit_on_signal(number: int, frame: FrameType | None) -> None:
    """Raise `SystemExit` with the signal's status: a handler after which the exit stacks end what this process runs."""
    raise SystemExit(128 + number)
