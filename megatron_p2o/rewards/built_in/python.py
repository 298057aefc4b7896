"""`python`: the answer is Python code, and the row's unit tests decide. Answers run in a sandbox."""

from collections.abc import Sequence

from megatron_p2o.rewards.built_in.columns import column
from megatron_p2o.rewards.built_in.final_answer import fenced_blocks, without_thinking
from megatron_p2o.rewards.sandbox.code_tests import CodeTest, code_tests
from megatron_p2o.rewards.sandbox.process import Limits, SandboxFailed
from megatron_p2o.rewards.sandbox.verdict import Sandbox, TestOutcome, check_sandbox, outcomes
from megatron_p2o.types import CORRECT, FinishReason, Grade, Problem

SANDBOXES = {"namespaces": True, "limits": False}
"""Setting to whether answers get namespaces of their own."""

LEAST_MEMORY_MIB = 64

CODE_LABELS = ("", "python", "py", "python3")


class PythonReward:
    """1 where the code passes all tests of its row, else 0; or the share that it passes."""

    def __init__(
        self,
        *,
        tests_column: str = "tests",
        entry_point_column: str = "entry_point",
        is_partial: bool = False,
        sandbox: str = "namespaces",
        processor_s: int = 10,
        memory_mib: int = 512,
        scratch_mib: int = 64,
        output_kib: int = 1024,
    ) -> None:
        """Prepare, and run a program in the sandbox to see that it can be made.

        Args:
            tests_column: column with the tests, in any form of `code_tests`.
            entry_point_column: column with the name of the function that tests call, where they do not say it.
            is_partial: whether the reward is the share of tests passed; False: 1 for all of them.
            sandbox: "namespaces" (bubblewrap: no file of this machine but Python's and the system's libraries, no
                network, no process to see), or "limits": the limits and the filter of system calls alone.
            processor_s: processor time of one process, whole seconds: one run of a program, or all calls of functions.
            memory_mib: its address space.
            scratch_mib: its files in /tmp.
            output_kib: what it may print or return.

        Raises:
            ValueError: an argument is out of range, or the sandbox cannot be made.
        """
        if sandbox not in SANDBOXES:
            raise ValueError(f"python sandbox={sandbox!r} must be one of {', '.join(SANDBOXES)}")
        sizes = {"processor_s": processor_s, "memory_mib": memory_mib, "scratch_mib": scratch_mib}
        for name, value in {**sizes, "output_kib": output_kib}.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"python {name}={value!r} must be a whole number of at least 1")
        if memory_mib < LEAST_MEMORY_MIB:
            raise ValueError(f"python memory_mib={memory_mib} must be at least {LEAST_MEMORY_MIB}: Python takes 40")
        self._tests_column, self._entry_point_column = tests_column, entry_point_column
        self._is_partial = is_partial
        limits = Limits(**sizes, output_bytes=output_kib << 10)
        self._sandbox = Sandbox(limits=limits, has_namespaces=SANDBOXES[sandbox])
        try:
            check_sandbox(self._sandbox)
        except SandboxFailed as error:
            raise ValueError(refusal(sandbox, str(error))) from error

    def __call__(self, problem: Problem, response: str, finish_reason: FinishReason) -> Grade:
        tests = self._tests(problem)
        code = code_in(response)
        if code is None:
            return Grade(reward=0.0, reason="no code", feedback="The response has no closed block of Python code.")
        done: list[TestOutcome] = []
        for outcome in outcomes(self._sandbox, code, tests):
            done.append(outcome)
            if not outcome.is_passed and not self._is_partial:
                break
        return tests_grade(done, len(tests), self._is_partial)

    def _tests(self, problem: Problem) -> list[CodeTest]:
        """Return the tests of a problem's row. Raises `ValueError`."""
        entry_point = problem.columns.get(self._entry_point_column)
        tests = column(problem, self._tests_column, "tests_column")
        try:
            return code_tests(tests, entry_point if isinstance(entry_point, str) else None)
        except ValueError as error:
            raise ValueError(f"column {self._tests_column!r} of problem {problem.id}: {error}") from error


def code_in(response: str) -> str | None:
    """Return the last closed block of Python code after the thinking, None without one."""
    said = without_thinking(response)
    blocks = [] if said is None else [text for label, text in fenced_blocks(said) if label in CODE_LABELS]
    return blocks[-1] if blocks else None


def tests_grade(done: Sequence[TestOutcome], num_tests: int, is_partial: bool) -> Grade:
    """Return the share of the tests that are passed, or 0 without all; the feedback is on the first that is not."""
    failed = [(number, outcome) for number, outcome in enumerate(done, 1) if not outcome.is_passed]
    if not failed:
        return CORRECT
    number, first = failed[0]
    feedback = f"Test {number} of {num_tests} fails: {first.detail}"
    share = (num_tests - len(failed)) / num_tests if is_partial else 0.0
    return Grade(reward=share, reason=f"test {number} of {num_tests} fails", feedback=feedback)


def refusal(sandbox: str, why: str) -> str:
    """Return what to do where the sandbox cannot be made."""
    if sandbox == "limits":
        return f"python sandbox=limits cannot be made: {why}. It needs Linux on x86_64 or aarch64 with seccomp filters"
    return (
        f"python sandbox=namespaces cannot be made: {why}. Install bubblewrap (Debian: apt-get install bubblewrap) and "
        "let unprivileged users make user namespaces; in a container this may need --security-opt seccomp=unconfined. "
        "sandbox: limits runs answers without namespaces: they can then read every file that this user can read"
    )
