"""What an answer cannot do in the sandbox, tried."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_p2o.rewards.sandbox.namespaces import bubblewrap
from megatron_p2o.rewards.sandbox.process import Limits, ProcessEnd, ProcessTree, SandboxedProcess, SandboxFailed
from megatron_p2o.rewards.sandbox.verdict import Sandbox, check_sandbox

LIMITS = Limits(processor_s=1, memory_mib=256, scratch_mib=4, output_bytes=1 << 18, waiting_samples=4)


def namespaces_work() -> bool:
    try:
        check_sandbox(Sandbox(limits=LIMITS, has_namespaces=True))
    except SandboxFailed:
        return False
    return True


NAMESPACES = pytest.param(
    True,
    id="namespaces",
    marks=pytest.mark.skipif(not namespaces_work(), reason="bubblewrap is not installed or makes no namespaces here"),
)
BOTH = pytest.mark.parametrize("has_namespaces", [NAMESPACES, pytest.param(False, id="limits")])
ONLY_NAMESPACES = pytest.mark.parametrize("has_namespaces", [NAMESPACES])


def run(code: str, has_namespaces: bool, standard_input: bytes = b"", limits: Limits = LIMITS) -> ProcessEnd:
    with SandboxedProcess({"mode": "program", "code": code}, limits, has_namespaces) as process:
        return process.finish(standard_input)


def last_error(ended: ProcessEnd) -> str:
    return ended.errors.decode().strip().rpartition("\n")[2]


@BOTH
def test_a_program_reads_its_input_and_prints(has_namespaces: bool) -> None:
    ended = run("import sys\nprint(sys.stdin.read()[::-1])\nsys.exit(3)", has_namespaces, b"abc")
    assert (ended.ending, ended.status, ended.output) == ("exited", 3, b"cba\n")


@BOTH
def test_a_megabyte_goes_in_while_much_comes_out(has_namespaces: bool) -> None:
    limits = Limits(processor_s=5, memory_mib=256, scratch_mib=4, output_bytes=1 << 22)
    code = "import sys\nfor line in sys.stdin: print(line.strip())"
    given = b"0123456789\n" * 100_000
    ended = run(code, has_namespaces, given, limits)
    assert (ended.ending, ended.output) == ("exited", given)


@BOTH
@pytest.mark.parametrize(
    "code",
    [
        "import os; os.fork()",
        "import os; os.posix_spawn('/bin/sh', ['sh'], {})",
        "import os; os.execv('/bin/sh', ['sh'])",
        "import subprocess; subprocess.run(['true'])",
        "import multiprocessing; multiprocessing.Process(target=print).start()",
        "import socket; socket.socket()",
        "import os, signal; os.kill(os.getppid(), signal.SIGKILL)",
        "import os, signal; os.kill(-1, signal.SIGKILL)",
        "import signal, os; signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9)",
        "import signal, threading; signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)",
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (1, 1))",
        "import os; os.memfd_create('x')",
    ],
)
def test_a_forbidden_system_call_is_refused(code: str, has_namespaces: bool) -> None:
    ended = run(code, has_namespaces)
    assert ended.status == 1
    assert "PermissionError" in last_error(ended) or "not allowed to raise maximum limit" in last_error(ended)


@BOTH
def test_a_fork_bomb_by_raw_system_calls_makes_no_process(has_namespaces: bool) -> None:
    code = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for number in (56, 57, 58, 435) if __import__("os").uname().machine == "x86_64" else (220, 435):
    print(libc.syscall(number, 17, 0, 0, 0, 0), ctypes.get_errno())
"""
    ended = run(code, has_namespaces)
    assert ended.status == 0
    assert {line.split()[0] for line in ended.output.decode().splitlines()} == {"-1"}


@BOTH
def test_threads_run(has_namespaces: bool) -> None:
    code = "import threading\nt = threading.Thread(target=print, args=('hi',))\nt.start()\nt.join()"
    assert run(code, has_namespaces).output == b"hi\n"


@BOTH
def test_endless_computation_ends_by_processor_time(has_namespaces: bool) -> None:
    assert run("while True: pass", has_namespaces).ending == "processor_time"


@BOTH
@pytest.mark.parametrize(
    "evasion",
    ["signal.signal(signal.SIGXCPU, signal.SIG_IGN)", "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGXCPU])"],
)
def test_ignoring_the_signal_of_the_limit_does_not_help(evasion: str, has_namespaces: bool) -> None:
    code = f"import signal\n{evasion}\nwhile True: pass"
    assert run(code, has_namespaces).ending == "processor_time"


@BOTH
@pytest.mark.parametrize(
    "code",
    [
        "import time; time.sleep(1000)",
        "import threading; threading.Event().wait()",
        "import time\nwhile True:\n    time.sleep(0.02); print('x', flush=True)",
        "import os, time\nos.close(1); os.close(2); time.sleep(1000)",
        "import os, signal, time\nsignal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)\n"
        "signal.signal(signal.SIGALRM, lambda *_: None)\nwhile True: signal.pause()",
    ],
)
def test_waiting_for_nothing_ends_whatever_else_it_does(code: str, has_namespaces: bool) -> None:
    assert run(code, has_namespaces).ending == "waiting"


@BOTH
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_endless_output_ends(stream: str, has_namespaces: bool) -> None:
    ended = run(f"import sys\nwhile True: sys.{stream}.write('x' * 10000)", has_namespaces)
    assert ended.ending == "output"


@BOTH
def test_exhausted_memory_is_the_answers_error(has_namespaces: bool) -> None:
    ended = run("x = []\nwhile True: x.append(bytearray(1 << 20))", has_namespaces)
    assert (ended.ending, ended.status, last_error(ended)) == ("exited", 1, "MemoryError")


@BOTH
def test_an_answer_cannot_pass_for_one_that_was_killed_from_outside(has_namespaces: bool) -> None:
    ended = run("import os; os._exit(137)", has_namespaces)
    assert ended.ending == "exited"
    assert ended.status not in (0, 137)


@BOTH
def test_being_killed_from_outside_says_nothing_about_the_answer(has_namespaces: bool) -> None:
    with SandboxedProcess({"mode": "functions", "code": "def f(): 1"}, LIMITS, has_namespaces) as process:
        assert process.start() == {"functions": ["f"]}
        family = psutil.Process(process._process.pid).children(recursive=True)
        os.kill(family[-1].pid if family else process._process.pid, signal.SIGKILL)
        with pytest.raises(SandboxFailed, match="killed from outside"):
            process.receive()


@BOTH
def test_the_environment_holds_nothing(has_namespaces: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2O_JUDGE_API_KEY", "sk-very-secret")
    ended = run("import os; print(dict(os.environ))", has_namespaces)
    assert b"secret" not in ended.output
    assert b"PYTHONHASHSEED" in ended.output


@BOTH
def test_no_descriptor_is_inherited(has_namespaces: bool) -> None:
    ours, theirs = socket.socketpair()
    os.set_inheritable(theirs.fileno(), True)
    with ours, theirs:
        code = "import os\nfor n in range(3, 64):\n  try: os.fstat(n); print(n)\n  except OSError: pass"
        assert run(code, has_namespaces).output == b""


@BOTH
def test_the_same_program_prints_sets_in_the_same_order(has_namespaces: bool) -> None:
    code = "print({'a', 'b', 'c', 'd', 'e'})"
    assert run(code, has_namespaces).output == run(code, has_namespaces).output


@ONLY_NAMESPACES
def test_no_file_of_this_machine_is_seen(has_namespaces: bool, tmp_path: Path) -> None:
    secret = tmp_path / "tests.jsonl"
    secret.write_text("expected")
    code = f"""
import os
os.symlink({str(secret)!r}, "/tmp/link")
for path in ({str(secret)!r}, "/tmp/link", "/proc/1/root{secret}", "/etc/passwd", "{Path(__file__)}"):
    try:
        print(open(path).read())
    except OSError as error:
        print(type(error).__name__)
print(sorted(os.listdir("/tmp")))
"""
    ended = run(code, has_namespaces)
    assert ended.output.decode().splitlines() == ["FileNotFoundError"] * 5 + ["['link']"], ended.errors


@ONLY_NAMESPACES
def test_nothing_but_a_small_tmp_can_be_written(has_namespaces: bool) -> None:
    code = """
import os
for folder in ("/", "/usr", "/dev", "/p2o", "/lib", "/var", "/home"):
    try:
        open(folder + "/x", "w")
        print("wrote in", folder)
    except OSError as error:
        pass
files = 0
try:
    while True:
        with open(f"/tmp/{files}", "wb") as file:
            file.write(bytes(1 << 20))
        files += 1
except OSError as error:
    print(files, os.strerror(error.errno))
"""
    assert run(code, has_namespaces).output == b"4 No space left on device\n"


@pytest.mark.parametrize("has_namespaces", [pytest.param(False, id="limits")])
def test_without_namespaces_no_file_is_changed(has_namespaces: bool, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    code = f"""
import os
path = {str(kept)!r}
tries = [lambda: open(path, "w"), lambda: open(path, "a"), lambda: open(path + "2", "x"), lambda: os.remove(path),
    lambda: os.truncate(path, 0), lambda: os.rename(path, path + "3"), lambda: os.chmod(path, 0),
    lambda: os.symlink(path, path + "4"), lambda: os.mkdir(path + "5"), lambda: os.utime(path),
    lambda: os.link(path, path + "6"),
    lambda: os.open(path, os.O_RDWR), lambda: os.setxattr(path, "user.a", b"1")]
for index, attempt in enumerate(tries):
    try:
        attempt()
        print(index)
    except PermissionError:
        pass
"""
    ended = run(code, has_namespaces)
    assert (ended.output, ended.status) == (b"", 0), ended.errors
    assert kept.read_text() == "as it was"
    assert list(tmp_path.iterdir()) == [kept]


PARENT = """
import os, sys
from megatron_p2o.rewards.sandbox.process import Limits, SandboxedProcess
limits = Limits(processor_s=60, memory_mib=256, scratch_mib=4, output_bytes=1000, waiting_samples=10**6)
code = "import ctypes\\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\\nimport time\\nwhile True: time.sleep(1)"
process = SandboxedProcess({"mode": "program", "code": code}, limits, sys.argv[1] == "True")
process.wait_until_ready()
print("ready", flush=True)
process.finish(b"") if False else input()
"""


@BOTH
def test_nothing_outlives_the_worker_that_ran_it(has_namespaces: bool) -> None:
    command = [sys.executable, "-c", PARENT, str(has_namespaces)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        family = psutil.Process(parent.pid).children(recursive=True)
        assert family
        parent.kill()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert alive == []


@BOTH
def test_closing_ends_everything(has_namespaces: bool) -> None:
    code = "import time\ndef f(): time.sleep(1000)"
    with SandboxedProcess({"mode": "functions", "code": code}, LIMITS, has_namespaces) as process:
        process.start()
        family = [psutil.Process(process._process.pid), *psutil.Process(process._process.pid).children(recursive=True)]
    _, alive = psutil.wait_procs(family, timeout=60)
    assert alive == []


@BOTH
@pytest.mark.parametrize("junk", [b"[1]\n", b"{\n", b"\xff\xfe\n", b"[" * 100_000 + b"\n", b"9" * 5000 + b"\n"])
def test_a_reply_that_is_none_is_told(junk: bytes, has_namespaces: bool) -> None:
    code = f"import os\ndef f():\n  for n in range(3, 64):\n    try: os.write(n, {junk!r})\n    except OSError: pass"
    with SandboxedProcess({"mode": "functions", "code": code}, LIMITS, has_namespaces) as process:
        process.start()
        process.send({"call": "f", "args": [], "kwargs": {"dict": []}})
        assert process.receive() == {"error": "the answer's process wrote no reply"}


def test_a_missing_sandbox_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert bubblewrap() is None
    with pytest.raises(SandboxFailed, match="bubblewrap is not installed"):
        run("print(1)", has_namespaces=True)


def test_a_sandbox_that_bubblewrap_cannot_make_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "bwrap"
    program.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(SandboxFailed, match="cannot be made: bwrap: No permissions to create new namespace"):
        run("print(1)", has_namespaces=True)


def test_a_busy_process_does_not_wait_and_a_sleeping_one_does() -> None:
    with subprocess.Popen([sys.executable, "-c", "print(1, flush=True)\nwhile True: pass"], stdout=-1) as busy:
        assert busy.stdout is not None
        busy.stdout.readline()
        assert not any(ProcessTree(busy.pid).is_waiting for _ in range(20))
        busy.kill()
    with subprocess.Popen(["sleep", "1000"]) as asleep:
        while not ProcessTree(asleep.pid).is_waiting:
            time.sleep(0.01)
        asleep.kill()


def test_requests_are_json() -> None:
    # What `inside/runner.py` reads: text of any kind survives.
    assert json.loads(json.dumps({"code": "\ud800é\x00"}))["code"] == "\ud800é\x00"
