"""Runs an answer against its tests. What is expected is compared here, or in a process of the tests' own, and never
gets into the process of the answer."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_p2o.rewards.sandbox.code_tests import CallTest, CodeTest, ProgramTest, PythonTest
from megatron_p2o.rewards.sandbox.inside.values import decoded, encoded
from megatron_p2o.rewards.sandbox.process import Limits, ProcessEnd, SandboxedProcess, SandboxFailed
from megatron_p2o.rewards.sandbox.python_tests import names_for_tests

MAX_SHOWN_CHARACTERS = 300

FLOAT_TOLERANCE = 1e-9
"""Relative and absolute: sums in another order are no other answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sandbox:
    """How answers are run."""

    limits: Limits
    has_namespaces: bool

    def process(self, request: dict[str, Any]) -> SandboxedProcess:
        return SandboxedProcess(request, self.limits, self.has_namespaces)


@dataclass(frozen=True, kw_only=True, slots=True)
class TestOutcome:
    """What became of one test."""

    __test__ = False  # pytest collects what is called Test
    is_passed: bool
    detail: str = ""
    """What was wrong: input, got, expected."""


PASSED = TestOutcome(is_passed=True)


def check_sandbox(sandbox: Sandbox) -> None:
    """Return once a program has run in the sandbox. Raises `SandboxFailed`."""
    with sandbox.process({"mode": "program", "code": "print(input())"}) as process:
        ended = process.finish(b"ready\n")
    if ended.output != b"ready\n":
        raise SandboxFailed(f"a program does not run in it: {how(ended)}")


def outcomes(sandbox: Sandbox, code: str, tests: Sequence[CodeTest]) -> Iterator[TestOutcome]:
    """Yield the outcome of each test, all of one kind. Raises `SandboxFailed`."""
    programs = [test for test in tests if isinstance(test, ProgramTest)]
    calls = [test for test in tests if isinstance(test, CallTest)]
    python = [test for test in tests if isinstance(test, PythonTest)]
    if programs:
        yield from (run_program(sandbox, code, test) for test in programs)
    if calls:
        yield from run_calls(sandbox, code, calls)
    if python:
        yield from run_python(sandbox, code, python)


def run_program(sandbox: Sandbox, code: str, test: ProgramTest) -> TestOutcome:
    """Return whether the program prints what it should; spaces at the ends of lines and blank lines last are free."""
    with sandbox.process({"mode": "program", "code": code}) as process:
        ended = process.finish(test.standard_input.encode(errors="replace"))
    given = f"input {shown_value(test.standard_input)}"
    if ended.ending != "exited" or ended.status != 0:
        return TestOutcome(is_passed=False, detail=f"{given}: {how(ended)}")
    output = ended.output.decode(errors="replace")
    if lines_of(output) == lines_of(test.output):
        return PASSED
    return TestOutcome(
        is_passed=False, detail=f"{given}: got {shown_value(output)}, expected {shown_value(test.output)}"
    )


def run_calls(sandbox: Sandbox, code: str, tests: Sequence[CallTest]) -> Iterator[TestOutcome]:
    """Yield an outcome per test. All calls are made in one process; when it ends, what is left has failed."""
    with sandbox.process({"mode": "functions", "code": code}) as process:
        reply: dict[str, Any] | ProcessEnd = process.start()
        if isinstance(reply, ProcessEnd) or "error" in reply:
            yield from [TestOutcome(is_passed=False, detail=loading_fault(reply))] * len(tests)
            return
        for test in tests:
            if not isinstance(reply, ProcessEnd):
                process.send(call_of(test))
                reply = process.receive()
            yield call_outcome(reply, test)


def call_of(test: CallTest) -> dict[str, Any]:
    return {"call": test.function, "args": encoded(test.arguments), "kwargs": encoded(test.keywords)}


def call_outcome(reply: "dict[str, Any] | ProcessEnd", test: CallTest) -> TestOutcome:
    given = ", ".join([*map(repr, test.arguments), *(f"{name}={value!r}" for name, value in test.keywords.items())])
    call = f"{test.function}({given[:MAX_SHOWN_CHARACTERS]})"
    if isinstance(reply, ProcessEnd):
        return TestOutcome(is_passed=False, detail=f"{call}: {how(reply)}")
    if "value" not in reply:
        return TestOutcome(is_passed=False, detail=f"{call}: {error_text(reply.get('error'))}")
    try:
        value = decoded(reply["value"])
    except (ValueError, RecursionError):
        return TestOutcome(is_passed=False, detail=f"{call}: no plain value")
    if is_json_equal(value, test.expected) or (test.is_wrapped and is_json_equal([value], test.expected)):
        return PASSED
    return TestOutcome(
        is_passed=False, detail=f"{call}: got {shown_value(value)}, expected {shown_value(test.expected)}"
    )


def run_python(sandbox: Sandbox, code: str, tests: Sequence[PythonTest]) -> Iterator[TestOutcome]:
    """Yield an outcome per test. The tests run in one process, the answer in another: its functions are called over."""
    with sandbox.process({"mode": "functions", "code": code}) as answer:
        loaded = answer.start()
        if isinstance(loaded, ProcessEnd) or not isinstance(names := loaded.get("functions"), list):
            yield from [TestOutcome(is_passed=False, detail=loading_fault(loaded))] * len(tests)
            return
        listed = [(test.code, test.entry_point) for test in tests]
        functions = names_for_tests(names, listed)
        request = {"mode": "tests", "tests": listed, "functions": functions}
        with sandbox.process(request) as tester:
            message = tester.start()
            for _ in tests:
                while not isinstance(message, ProcessEnd) and "call" in message:
                    tester.send(reply_of(answer, message))
                    message = tester.receive()
                if isinstance(message, ProcessEnd) or "outcome" not in message:
                    raise ValueError(f"the tests themselves do not run: {how(message)}")
                detail = error_text(message["outcome"])
                yield TestOutcome(is_passed=not detail, detail=detail)
                message = tester.receive()


def reply_of(answer: SandboxedProcess, call: dict[str, Any]) -> dict[str, Any]:
    """Return the answer's reply to a call of the tests, checked: only plain values get to them."""
    answer.send(call)
    reply = answer.receive()
    if isinstance(reply, ProcessEnd):
        return {"error": how(reply)}
    if "value" not in reply:
        return {"error": error_text(reply.get("error"))}
    try:
        return {"value": encoded(decoded(reply["value"]))}
    except (ValueError, TypeError, RecursionError):
        return {"error": "it returned no plain value"}


def is_json_equal(value: Any, expected: Any) -> bool:
    """Return whether a value is what JSON expects: tuples are lists, keys of objects are texts, floats are near."""
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(value, list | tuple) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(is_json_equal, value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        named = {key if isinstance(key, str) else shown_value(key): entry for key, entry in value.items()}
        return named.keys() == expected.keys() and all(is_json_equal(named[key], expected[key]) for key in expected)
    if isinstance(value, float) or isinstance(expected, float):
        return is_near(value, expected)
    return bool(value == expected)


def is_near(value: Any, expected: Any) -> bool:
    try:
        return math.isclose(value, expected, rel_tol=FLOAT_TOLERANCE, abs_tol=FLOAT_TOLERANCE)
    except (TypeError, OverflowError):
        return False


def lines_of(output: str) -> list[str]:
    lines = [line.rstrip() for line in output.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def loading_fault(reply: "dict[str, Any] | ProcessEnd") -> str:
    return how(reply) if isinstance(reply, ProcessEnd) else f"the code does not load: {error_text(reply.get('error'))}"


def how(end: "dict[str, Any] | ProcessEnd") -> str:
    """Return how a process ended, for people and for reflection."""
    if not isinstance(end, ProcessEnd):
        return f"no result: {end!r:.{MAX_SHOWN_CHARACTERS}}"
    if end.ending != "exited":
        causes = {"processor_time": "computes too long", "output": "prints too much", "waiting": "waits too long"}
        return f"it {causes[end.ending]} and was ended"
    last = end.errors.decode(errors="replace").strip().rpartition("\n")[2][:MAX_SHOWN_CHARACTERS]
    return f"it ended with status {end.status}" + (f" ({last})" if last else "")


def error_text(value: Any) -> str:
    return value[: 4 * MAX_SHOWN_CHARACTERS] if isinstance(value, str) else "no reply"


def shown_value(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python shows no number of thousands of digits
        return "a number too long to show"
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}…"
