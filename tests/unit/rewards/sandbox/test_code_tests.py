"""The forms that tests have in data sets."""

import json
from typing import Any

import pytest

from megatron_p2o.rewards.sandbox.code_tests import CallTest, ProgramTest, PythonTest, code_tests


def test_forms_of_programs() -> None:
    expected = [ProgramTest(standard_input="1 2", output="3"), ProgramTest(standard_input="a\nb", output="c")]
    listed = [{"input": "1 2", "output": "3"}, {"input": "a\nb", "output": "c", "testtype": "stdin"}]
    apps = {"inputs": ["1 2", ["a", "b"]], "outputs": ["3", "c"]}
    for column in (listed, apps, json.dumps(listed), json.dumps(apps)):
        assert code_tests(column, None) == expected


def test_forms_of_calls() -> None:
    expected = [CallTest(function="f", arguments=[[1], 2], expected=3)]
    for column, entry_point in [
        ([{"args": [[1], 2], "expected": 3}], "f"),
        ([{"args": [[1], 2], "expected": 3, "fn_name": "f"}], None),
        ({"inputs": [[[1], 2]], "outputs": [3], "fn_name": "f"}, None),
        ([{"input": "[1]\n2\n", "output": "3", "testtype": "functional"}], "f"),
    ]:
        assert code_tests(column, entry_point) == expected


def test_forms_of_python() -> None:
    assert code_tests("assert f(1)", "f") == [PythonTest(code="assert f(1)", entry_point="f")]
    assert code_tests(["assert f(1)", "assert f(2)"], None) == [PythonTest(code=f"assert f({n})") for n in (1, 2)]
    assert code_tests('["assert f(1)"]', None) == [PythonTest(code="assert f(1)")]


def test_a_check_is_run_by_its_entry_point_or_by_the_code_itself() -> None:
    check = "def check(candidate):\n    assert candidate(1) == 2"
    for code, entry_point in [(check, "f"), (f"{check}\ncheck(f)", None)]:
        assert code_tests(code, entry_point) == [PythonTest(code=code, entry_point=entry_point)]


def test_code_that_only_prepares_is_no_test_of_its_own() -> None:
    listed = ["import math", "def near(a, b):\n    return math.isclose(a, b)", "assert near(f(1), 2)", "assert f(2)"]
    assert code_tests(listed, None) == [PythonTest(code="\n".join(listed[:3])), PythonTest(code="assert f(2)")]


def test_an_output_of_apps_may_be_a_list_with_the_value_unless_the_function_returns_lists() -> None:
    def are_wrapped(outputs: list[Any]) -> list[bool]:
        tests = code_tests({"inputs": [[1]] * len(outputs), "outputs": outputs, "fn_name": "f"}, None)
        return [test.is_wrapped for test in tests if isinstance(test, CallTest)]

    assert are_wrapped([[5], 6]) == [True, False]
    assert are_wrapped([[5], [5, 6]]) == [False, False]
    assert are_wrapped([[5], []]) == [False, False]


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ("  ", "blank"),
        ([], "no tests"),
        (3, "no tests"),
        ([3], "a test must be Python code or an object"),
        ([{"args": [1]}], "needs `expected`"),
        ([{"args": 1, "expected": 1, "fn_name": "f"}], "`args` must be a list"),
        ([{"args": [1], "expected": 1}], "a function whose name is not given"),
        ([{"input": "1"}], "texts `input` and `output`"),
        ({"inputs": [], "outputs": []}, "not empty"),
        ({"inputs": ["1"], "outputs": ["1", "2"]}, "as long as each other"),
        ({"input": "1", "output": "2"}, "lists `inputs` and `outputs`"),
        ("# later", "checks nothing"),
        ("METADATA = dict(author='a')\ndef check(candidate):\n    assert candidate(1) == 2", "checks nothing"),
        ("import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        assert f(1)", "checks nothing"),
        ("def test():\n    assert f(1)\nif __name__ == '__main__':\n    test()", "checks nothing"),
        (["import math"], "checks nothing"),
        ("assert f(1) ==", "no Python code"),
        ('[{"args": [1], "expected"', "no Python code"),
        ([{"input": "{", "output": "3", "testtype": "functional"}], "Expecting"),
    ],
)
def test_other_columns_are_refused(column: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        code_tests(column, None)
