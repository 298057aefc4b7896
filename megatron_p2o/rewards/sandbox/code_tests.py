"""Unit tests of code as rows give them, in the forms that data sets have."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_p2o.rewards.sandbox.python_tests import checks_something


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgramTest:
    """The answer, run as a program on `standard_input`, prints `output`."""

    standard_input: str
    output: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CallTest:
    """The answer's function returns `expected`."""

    function: str
    arguments: list[Any]
    keywords: dict[str, Any] = field(default_factory=dict[str, Any])
    expected: Any
    is_wrapped: bool = False
    """Whether `expected` may be a list of one that holds the value, as APPS writes it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PythonTest:
    """Python code that calls the answer's functions and raises where they are wrong."""

    code: str
    entry_point: str | None = None
    """Function that a `check` which the code defines is called with."""


CodeTest = ProgramTest | CallTest | PythonTest


def code_tests(column: Any, entry_point: str | None) -> list[CodeTest]:
    """Return the tests in a column.

    It is Python code, or a list of (MBPP: `["assert f(1) == 2", ...]`; HumanEval: code that defines `check`); a list of
    objects with `input` and `output` (programs; with `"testtype": "functional"` the arguments, as JSON, a line each) or
    with `args` and `expected`; or an object with `inputs`, `outputs` and perhaps `fn_name` (APPS, TACO). JSON may be a
    text.

    Raises:
        ValueError: it has no test, or not one of these forms, or a function's name is missing, or Python code is none
            or checks nothing.
    """
    if isinstance(column, str):
        column = _json_or_code(column)
    if isinstance(column, str):
        return _python_tests([column], entry_point)
    if isinstance(column, Mapping):
        return _apps_tests(column, entry_point)
    if not isinstance(column, Sequence) or not column:
        raise ValueError("there are no tests in it: give Python code, or a list of tests")
    if all(isinstance(test, str) for test in column):
        return _python_tests(column, entry_point)
    return [_listed_test(test, entry_point) for test in column]


def _python_tests(texts: Sequence[str], entry_point: str | None) -> list[CodeTest]:
    """Return a test per text that checks something; one that only prepares belongs to the next."""
    tests: list[CodeTest] = []
    before: list[str] = []
    for text in texts:
        before.append(text)
        if checks_something(text, entry_point):
            tests.append(PythonTest(code="\n".join(before), entry_point=entry_point))
            before = []
    if not tests:
        raise ValueError(
            "its Python code checks nothing, so that every answer would pass: it must call functions or assert, and a "
            "`check` that it defines needs the function's name (entry_point_column); classes of unittest are not run"
        )
    return tests


def _json_or_code(text: str) -> Any:
    if not text.strip():
        raise ValueError("there are no tests in it: it is blank")
    try:
        return json.loads(text)
    except ValueError:
        return text


def _apps_tests(column: Mapping[str, Any], entry_point: str | None) -> list[CodeTest]:
    inputs, outputs = column.get("inputs"), column.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or not inputs or len(inputs) != len(outputs):
        raise ValueError("an object must have lists `inputs` and `outputs`, as long as each other and not empty")
    function = column.get("fn_name") or entry_point
    if not function:
        return [ProgramTest(standard_input=_text(given), output=_text(said)) for given, said in zip(inputs, outputs)]
    calls = [_call(function, given, said) for given, said in zip(inputs, outputs)]
    if any(isinstance(said, list) and len(said) != 1 for said in outputs):
        return [*calls]  # the function returns lists: none of them holds the value
    return [replace(call, is_wrapped=isinstance(call.expected, list)) for call in calls]


def _text(lines: Any) -> str:
    return "\n".join(map(str, lines)) if isinstance(lines, list) else str(lines)


def _listed_test(test: Any, entry_point: str | None) -> CodeTest:
    if not isinstance(test, Mapping):
        raise ValueError(f"a test must be Python code or an object, and not {test!r:.80}")
    if "args" in test or "kwargs" in test:
        if "expected" not in test:
            raise ValueError("a test with `args` needs `expected`")
        return _call(test.get("fn_name") or entry_point, test.get("args", []), test["expected"], test.get("kwargs", {}))
    if not isinstance(test.get("input"), str) or not isinstance(test.get("output"), str):
        raise ValueError("a test must have texts `input` and `output`, or `args` and `expected`")
    if test.get("testtype") == "functional":
        arguments = [json.loads(line) for line in test["input"].splitlines() if line.strip()]
        return _call(entry_point, arguments, json.loads(test["output"]))
    return ProgramTest(standard_input=test["input"], output=test["output"])


def _call(function: Any, arguments: Any, expected: Any, keywords: Any = None) -> CallTest:
    if not isinstance(function, str) or not function:
        raise ValueError("its tests call a function whose name is not given: see entry_point_column")
    if not isinstance(arguments, list) or not isinstance(keywords or {}, dict):
        raise ValueError("a test's `args` must be a list, its `kwargs` an object")
    return CallTest(function=function, arguments=arguments, keywords=keywords or {}, expected=expected)
