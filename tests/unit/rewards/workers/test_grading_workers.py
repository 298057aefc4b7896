"""Grading workers that hang, stop, crash or are killed: no answer suffers from another's, none is decided by time."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import kill
from pathlib import Path

import psutil
import pytest

from megatron_p2o.config.tree import GradingConfig
from megatron_p2o.rewards.math.grader import KNOWN, MathGrader, algebra_request
from megatron_p2o.rewards.workers.grading_workers import GradingWorkers
from megatron_p2o.rewards.workers.lane import UNDECIDED
from megatron_p2o.rewards.workers.processes import GraderFailed, WorkerLimits
from megatron_p2o.types import CORRECT, INCORRECT, Grade, Problem

PATIENCE_S = 120.0
"""Longest wait for anything here; passing tests take a fraction of a second on an idle machine."""

ENDLESS = (r"\sum_{k=0}^{0}2^{100000000000}", r"\sum_{k=0}^{0}2^{100000000001}")
"""Gold and answer of the same costly form: no guard refuses the answer, and algebra does not end."""

RIGHT, WRONG = algebra_request("x+1", "1+x"), algebra_request("x+1", "2+x")

MANY_CHARACTERS = 4_000_000
"""More than a socket holds: who writes them waits for the reader."""


def limits_of(**limits: float) -> WorkerLimits:
    wide = {"deadline_s": PATIENCE_S, "memory_limit_mib": 512, "timeout_s": PATIENCE_S, "stall_timeout_s": PATIENCE_S}
    return WorkerLimits(**{**wide, **limits})  # pyright: ignore[reportArgumentType]


@contextmanager
def workers_of(num_workers: int = 1, recycle_after: int = 5000, **limits: float) -> Iterator[GradingWorkers]:
    workers = GradingWorkers(None, limits_of(**limits), num_workers, algebra_request(*KNOWN), recycle_after)
    try:
        yield workers
    finally:
        workers.close()


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def processor_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def new_worker(workers: GradingWorkers, *old: int) -> int:
    """Wait for a single worker that is none of `old` and return its process id."""
    wait_until(lambda: [pid for pid in workers.worker_pids if pid not in old])
    (pid,) = workers.worker_pids
    return pid


def test_an_answer_that_uses_up_its_processor_time_is_an_error_and_its_neighbours_are_graded() -> None:
    with workers_of(deadline_s=1.0) as workers:
        futures = [workers.submit(request) for request in [RIGHT, algebra_request(*ENDLESS), WRONG] * 3]
        grades = [future.result(PATIENCE_S) for future in futures]
        assert grades == [CORRECT, Grade.undecided(UNDECIDED["out_of_time"]), INCORRECT] * 3
        assert workers.counts == {"graded": 6, "out_of_time": 3}


def test_time_that_passes_without_the_processor_decides_nothing() -> None:
    with workers_of(deadline_s=1.0) as workers:
        assert workers.submit(RIGHT).result(PATIENCE_S) == CORRECT
        (worker,) = workers.worker_pids
        kill(worker, signal.SIGSTOP)
        answer = workers.submit(RIGHT)
        wait_until(answer.running)
        time.sleep(3.0)  # three times the deadline
        kill(worker, signal.SIGCONT)
        assert answer.result(PATIENCE_S) == CORRECT
        assert workers.worker_pids == [worker] and workers.counts == {"graded": 2}


def test_an_answer_whose_worker_is_killed_is_graded_by_another() -> None:
    gold, answer = ENDLESS
    with workers_of() as workers:
        lost = workers.submit(algebra_request(gold, answer))
        waiting = [workers.submit(RIGHT) for _ in range(3)]
        first = new_worker(workers)
        kill(first, signal.SIGKILL)
        second = new_worker(workers, first)
        assert not lost.done()
        kill(second, signal.SIGKILL)
        assert lost.result(PATIENCE_S) == Grade.undecided(UNDECIDED["crashed"]), "two workers were lost over it"
        assert [future.result(PATIENCE_S) for future in waiting] == [CORRECT] * 3
        assert workers.counts == {"tried_again": 1, "crashed": 1, "graded": 3}


@pytest.mark.parametrize("num_characters", [1, MANY_CHARACTERS])
def test_an_answer_whose_worker_is_stopped_is_graded_by_another(num_characters: int) -> None:
    # Long enough for a busy machine, on which a worker that may run does run now and then.
    with workers_of(stall_timeout_s=3.0) as workers:
        assert workers.submit(RIGHT).result(PATIENCE_S) == CORRECT
        (stopped,) = workers.worker_pids
        kill(stopped, signal.SIGSTOP)
        assert workers.submit({**RIGHT, "padding": " " * num_characters}).result(PATIENCE_S) == CORRECT
        assert workers.worker_pids != [stopped] and not is_alive(stopped)
        assert workers.counts == {"graded": 2, "tried_again": 1}


def test_an_answer_outlives_the_server_that_forks_workers() -> None:
    with workers_of(num_workers=2) as workers:
        assert [workers.submit(RIGHT).result(PATIENCE_S) for _ in range(2)] == [CORRECT] * 2
        worker = psutil.Process(workers.worker_pids[0])
        endless = workers.submit(algebra_request(*ENDLESS))
        wait_until(endless.running)
        server = worker.parent()
        assert server is not None and Path(server.cmdline()[2]).name == "fork_server.py"
        kill(server.pid, signal.SIGKILL)
        assert workers.submit(RIGHT).result(PATIENCE_S) == CORRECT
        wait_until(lambda: not is_alive(worker.pid))
        assert not endless.done(), "a worker of the next server has it"


def test_worker_that_died_idle_costs_no_grade() -> None:
    with workers_of(recycle_after=2) as workers:
        assert workers.submit(RIGHT).result(PATIENCE_S) == CORRECT
        (first,) = workers.worker_pids
        kill(first, signal.SIGKILL)
        wait_until(lambda: workers.worker_pids == [])
        assert workers.submit(WRONG).result(PATIENCE_S) == INCORRECT
        assert workers.submit({"gold": "x+1", "answers": ["1+x", "x+1"]}).result(PATIENCE_S) == CORRECT
        (second,) = workers.worker_pids
        assert workers.submit({"gold": "x+1", "answers": ["1+x", "x+2"]}).result(PATIENCE_S) == INCORRECT
        assert workers.worker_pids != [second], "replaced after two answers"
        assert workers.counts == {"graded": 4, "recycled": 1}


def test_answer_that_needs_too_much_memory_is_an_error() -> None:
    with workers_of(memory_limit_mib=160) as workers:
        futures = [
            workers.submit(algebra_request(r"\sum_{k=0}^{0}2^{2000000000}", r"\sum_{k=0}^{0}4^{1000000000}")),
            workers.submit(RIGHT),
        ]
        too_much, right = (future.result(PATIENCE_S) for future in futures)
        assert too_much == Grade.undecided(UNDECIDED["out_of_memory"]) and right == CORRECT
        assert workers.counts == {"tried_again": 1, "out_of_memory": 1, "graded": 1}


def test_pool_whose_workers_cannot_start_fails_every_answer() -> None:
    # Too little memory to import math-verify.
    with workers_of(memory_limit_mib=24) as workers:
        futures = [workers.submit(RIGHT) for _ in range(3)]
        for future in futures:
            with pytest.raises(
                GraderFailed, match=r"no grading worker starts \(crashed\): run .*grading.memory_limit_mib"
            ):
                future.result(PATIENCE_S)
        with pytest.raises(GraderFailed, match="no grading worker starts"):
            workers.check()


def test_machine_that_starts_no_process_fails_every_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with workers_of() as workers:
        monkeypatch.setattr(sys, "executable", "/nonexistent/python")
        for _ in range(2):
            with pytest.raises(GraderFailed, match="No such file or directory: '/nonexistent/python'"):
                workers.submit(RIGHT).result(PATIENCE_S)


def test_check_passes_where_answers_are_graded() -> None:
    with workers_of() as workers:
        workers.check()
        workers.check()


@pytest.mark.parametrize("seconds", [float("inf"), float("nan"), 0.0, -1.0])
@pytest.mark.parametrize("name", ["deadline_s", "timeout_s", "stall_timeout_s"])
def test_limits_must_be_positive_and_finite(name: str, seconds: float) -> None:
    with pytest.raises(ValueError, match=f"{name}=.* must be positive and finite"):
        GradingWorkers(None, limits_of(**{name: seconds}), 1, RIGHT)


def test_closing_ends_what_is_running_and_waiting_as_errors() -> None:
    gold, answer = ENDLESS
    with workers_of() as workers:
        futures = [workers.submit(algebra_request(gold, answer)) for _ in range(3)]
        cancelled = workers.submit(RIGHT)
        assert cancelled.cancel()
        worker = new_worker(workers)
        server = psutil.Process(worker).ppid()
        workers.close()
        assert [future.result(PATIENCE_S) for future in futures] == [Grade.undecided("the grader was closed")] * 3
        assert workers.worker_pids == [] and not is_alive(worker) and not is_alive(server)
        with pytest.raises(RuntimeError, match="the grader is closed"):
            workers.submit(RIGHT)


def test_workers_start_with_all_that_algebra_imports() -> None:
    script = (
        "import sys\n"
        "from megatron_p2o.rewards.workers.algebra import WARM_UP\n"
        "from megatron_p2o.rewards.workers.algebra import is_match\n"
        "print([is_match([answer], gold) for gold, answer in WARM_UP])\n"
        "before = set(sys.modules)\n"
        r"pairs = [(r'\cos^2 x', r'1-\sin^2 x'), ('a(b+c)', 'ab+ac'), ('1<y<2', '(1,2)'), (r'\{1,2\}', '2,1')]"
        "\n"
        "print([is_match([answer], gold) for gold, answer in pairs], set(sys.modules) - before)\n"
    )
    completed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE_S)
    warm, first = completed.stdout.splitlines()
    assert warm == str([True] * 13 + [False])
    assert first == "[True, True, True, True] set()"


def run_parent(script: str) -> subprocess.Popen[str]:
    preamble = (
        "from megatron_p2o.config.tree import GradingConfig\n"
        "from megatron_p2o.rewards.math.grader import MathGrader\n"
        "from megatron_p2o.types import Problem\n"
        f"grader = MathGrader(GradingConfig(num_workers=1, deadline_s={PATIENCE_S}))\n"
        "def submit(gold, text): return grader.submit(Problem(id='p', question='q', answer=gold), text)\n"
    )
    return subprocess.Popen([sys.executable, "-c", preamble + script], stdout=subprocess.PIPE, text=True)


def test_no_worker_outlives_a_parent_that_is_killed() -> None:
    gold, answer = ENDLESS[0], rf"\boxed{{{ENDLESS[1]}}}"
    script = (
        f"endless = submit({gold!r}, {answer!r})\n"
        "import time\n"
        "while not grader.worker_pids: time.sleep(0.02)\n"
        "print(*grader.worker_pids, flush=True)\n"
        f"time.sleep({PATIENCE_S})\n"
    )
    with run_parent(script) as parent:
        try:
            assert parent.stdout is not None
            (worker,) = [int(pid) for pid in parent.stdout.readline().split()]
            server = psutil.Process(worker).ppid()
            # Now the worker computes and no longer reads: a closed socket would not end it.
            wait_until(lambda: processor_seconds(worker) > 0.1)
            assert is_alive(worker) and is_alive(server)
        finally:
            parent.kill()
    wait_until(lambda: not is_alive(worker) and not is_alive(server))


def test_answers_without_algebra_start_nothing_and_import_no_algebra() -> None:
    script = (
        "grades = [submit('42', r'\\boxed{' + answer + '}').result().reward for answer in ('42.0', '9^{9^9}')]\n"
        "import sys\n"
        "print(grades, grader.worker_pids, {'sympy', 'math_verify', 'torch'} & set(sys.modules), grader.counts)\n"
        "grader.close()\n"
    )
    with run_parent(script) as parent:
        output, _ = parent.communicate(timeout=PATIENCE_S)
    assert output.strip() == "[1.0, 0.0] [] set() {'quick': 2}"
    assert parent.returncode == 0


def test_grader_that_cannot_work_says_so_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    grader = MathGrader(GradingConfig(num_workers=1))
    try:
        monkeypatch.setattr(sys, "executable", "/nonexistent/python")
        with pytest.raises(GraderFailed):
            grader.check()
        verdict = grader.submit(Problem(id="p", question="q", answer="x+1"), r"\boxed{1+x}")
        with pytest.raises(GraderFailed):
            verdict.result(PATIENCE_S)
        quick = grader.submit(Problem(id="p", question="q", answer="42"), r"\boxed{42}")
        assert quick.result(PATIENCE_S) == CORRECT
    finally:
        grader.close()
