"""The command that starts a process in a sandbox: by bubblewrap in namespaces of its own, or without any."""

import shutil
import sys
from pathlib import Path

INSIDE = Path(__file__).with_name("inside")
RUNNER_FOLDER = "/p2o"
SYSTEM_FOLDERS = ("/usr", "/lib", "/lib64", "/lib32", "/bin")
"""Where the interpreter finds its libraries; they are seen, never written."""

DEVICES = ("/dev/null", "/dev/urandom")

ENVIRONMENT = {"PATH": "/usr/bin", "LANG": "C.UTF-8", "HOME": "/tmp", "TMPDIR": "/tmp", "PYTHONHASHSEED": "0"}
"""All that an answer's process has. A fixed seed of hashes: the same answer gives the same output."""

PYTHON_OPTIONS = ("-S", "-s", "-P", "-B", "-X", "utf8")


def interpreter() -> tuple[str, str]:
    """Return the program of this Python without a virtual environment, and the folder it is installed in."""
    base = getattr(sys, "_base_executable", None) or sys.executable
    return str(Path(base).resolve()), str(Path(sys.base_prefix).resolve())


def bubblewrap() -> str | None:
    """Return the path of bubblewrap's program, None where it is not installed."""
    return shutil.which("bwrap")


def namespaces_command(program: str, scratch_mib: int, ready: int) -> list[str]:
    """Return the command that runs an answer in namespaces of its own: processes, files, network, users, IPC.

    It sees Python and the system's libraries, read-only, and an empty /tmp in memory of `scratch_mib`. When bubblewrap
    or its parent ends, everything in it ends.
    """
    executable, prefix = interpreter()
    command = [program, "--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    command += [
        "--unshare-cgroup-try",
        "--die-with-parent",
        "--new-session",
        "--cap-drop",
        "ALL",
    ]
    for folder in SYSTEM_FOLDERS:
        path = Path(folder)
        if path.is_symlink():
            command += ["--symlink", str(path.readlink()), folder]
        elif path.is_dir():
            command += ["--ro-bind", folder, folder]
    if not prefix.startswith("/usr"):
        command += ["--ro-bind", prefix, prefix]
    command += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache", "--ro-bind", str(INSIDE), RUNNER_FOLDER]
    for device in DEVICES:
        command += ["--dev-bind", device, device]
    command += ["--size", str(scratch_mib << 20), "--perms", "0777", "--tmpfs", "/tmp", "--chdir", "/tmp"]
    return [*command, "--remount-ro", "/", "--", executable, *PYTHON_OPTIONS, f"{RUNNER_FOLDER}/runner.py", str(ready)]


def plain_command(ready: int) -> list[str]:
    """Return the command that runs an answer without namespaces, under limits and the filter of system calls alone."""
    executable, _ = interpreter()
    return [executable, *PYTHON_OPTIONS, str(INSIDE / "runner.py"), str(ready)]
