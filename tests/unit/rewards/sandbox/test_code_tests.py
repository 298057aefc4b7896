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
        ([{"input": "{", "output": "3", "testtype": "functional"}], "Expecting"),
    ],
)
def test_other_columns_are_refused(column: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        code_tests(column, None)
