"""`json_schema`: documents that a schema accepts, read strictly."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from megatron_p2o.rewards.built_in import json_schema
from megatron_p2o.rewards.built_in.json_schema import MAX_DEPTH, NotJson, is_same, parsed_json
from megatron_p2o.rewards.functions import RewardSpec
from megatron_p2o.testing.answers.graded import load_function
from megatron_p2o.types import Grade, Problem

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}, "day": {"format": "date"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
DRAFT_7 = "http://json-schema.org/draft-07/schema#"
GOOD = '{"name": "Ann", "age": 3}'


def graded(response: str, row: Any = None, **arguments: Any) -> Grade:
    problem = Problem(id="p", question="q", answer=None, columns=row or {})
    return load_function(RewardSpec(function="json_schema", arguments=arguments))(problem, response, "stop")


@pytest.mark.parametrize(
    "response",
    [
        GOOD,
        f"  {GOOD}\n",
        f"Here:\n```json\n{GOOD}\n```\nDone.",
        f"<think>{{</think>{GOOD}",
        f"```\n{{\n```\n```\n{GOOD}\n```",
    ],
)
def test_a_document_is_found_in_a_response(response: str) -> None:
    assert graded(response, schema=SCHEMA).reward == 1.0


@pytest.mark.parametrize(
    ("response", "feedback"),
    [
        ('{"name": "Ann", "age": -1}', r"breaks its schema at $.age: -1 is less than the minimum of 0"),
        ('{"name": "Ann"}', "'age' is a required property"),
        ('{"name": "Ann", "age": 3, "x": 1}', "Additional properties are not allowed"),
        ('{"name": "Ann", "age": 3, "day": "2024-13-01"}', "is not a 'date'"),
        ("[]", "is not of type 'object'"),
        (f"The answer is {GOOD}", "not a JSON document: Expecting value at line 1, column 1"),
        (f"{GOOD} and more", "Extra data"),
        (f"<think>{GOOD}", "the thinking is not closed"),
        ("", "not a JSON document"),
        ('{"name": "Ann", "name": "Bob", "age": 3}', "two members 'name'"),
        ('{"name": "Ann", "age": NaN}', "NaN is no JSON number"),
        ('{"name": "Ann", "age": -Infinity}', "-Infinity is no JSON number"),
        ('{"name": "Ann", "age": 1e999}', "the number 1e999 is too large"),
        ('{"name": "Ann", "age": ' + "9" * 5000 + "}", "is too long"),
        ("[" * 100_000, "nested more than 64 deep"),
        ("[" * 70 + "]" * 70, "nested more than 64 deep"),
        ('{"name": "\x01", "age": 3}', "Invalid control character"),
        ("{'name': 'Ann', 'age': 3}", "Expecting property name"),
    ],
)
def test_feedback_says_where_and_why(response: str, feedback: str) -> None:
    grade = graded(response, schema=SCHEMA)
    assert grade.reward == 0.0
    assert feedback in grade.feedback
    assert len(grade.feedback) < 500


def test_a_problems_own_schema_is_not_told() -> None:
    row = {"schema": {"properties": {"city": {"const": "Paris"}}}}
    assert graded('{"city": "Paris"}', row, schema_column="schema").reward == 1.0
    assert graded('{"city": "Paris"}', {"schema": json.dumps(row["schema"])}, schema_column="schema").reward == 1.0
    grade = graded('{"city": "Rome"}', row, schema_column="schema")
    assert (grade.reward, grade.feedback) == (0.0, "The JSON document breaks its schema at $.city (const).")


def test_the_document_may_have_to_be_the_expected_one() -> None:
    row = {"gold": {"age": 3, "name": "Ann"}}
    assert graded(GOOD, row, schema=SCHEMA, equal_to_column="gold").reward == 1.0
    assert graded(GOOD, {"gold": json.dumps(row["gold"])}, schema=SCHEMA, equal_to_column="gold").reward == 1.0
    other = graded('{"name": "Bob", "age": 3}', row, schema=SCHEMA, equal_to_column="gold")
    assert other.reward == 0.0
    assert "Ann" not in other.feedback


def test_a_schema_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    assert graded(GOOD, schema=str(path)).reward == 1.0


def test_a_schema_that_names_an_address_opens_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: Any, **__: Any) -> None:
        raise AssertionError("it went to the network")

    monkeypatch.setattr(urllib.request, "urlopen", opened)
    with pytest.raises(Exception, match="Unresolvable"):
        graded("{}", schema={"$ref": "http://127.0.0.1:9/schema.json"})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "needs either schema, for all problems, or schema_column"),
        ({"schema": {"type": "objekt"}}, "is no JSON schema: at \\$.type"),
        ({"schema": "/nowhere.json"}, "schema='/nowhere.json' must be a schema or a JSON file"),
    ],
)
def test_bad_settings_are_refused_at_the_start(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_function(RewardSpec(function="json_schema", arguments=arguments))


def test_nesting_up_to_the_limit_is_read() -> None:
    text = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parsed_json(text) == json.loads(text)
    with pytest.raises(NotJson):
        parsed_json(f"[[{text}]]")


def test_true_is_not_one_and_order_does_not_count() -> None:
    assert is_same({"a": 1, "b": [1.0]}, {"b": [1], "a": 1})
    assert not is_same([True], [1])
    assert not is_same([1, 2], [2, 1])
    assert not is_same({"a": None}, {})


@pytest.mark.parametrize(
    ("schema", "fault"),
    [
        ({"typ": "object"}, "the unknown keyword 'typ' at $ (did you mean 'type'?), which would be passed over"),
        ({"properties": {"a": {"minimun": 3}}}, "'minimun' at $.properties.a (did you mean 'minimum'?)"),
        ({"anyOf": [{"const": 1}, {"zzz": 1}]}, "'zzz' at $.anyOf.1, which"),
        ({"definitions": {"a": {"requird": []}}}, "'requird' at $.definitions.a (did you mean 'required'?)"),
        ({"$defs": {"a": {"items": {"foo": 1}}}}, "'foo' at $.$defs.a.items"),
        ({"dependencies": {"a": ["b"]}}, "'dependencies' at $"),  # of draft 7: the default draft passes it over
        ({"$schema": DRAFT_7, "items": [{"prefixItems": []}]}, "'prefixItems' at $.items.0"),
        ({"format": "date-time"}, "a format at $ that is not checked here: 'date-time'"),
        ({"$schema": "http://example.com/none"}, "a $schema that is not known: http://example.com/none"),
        ({"$schema": 7}, "a $schema that is no text: 7"),
    ],
)
def test_a_schema_that_says_something_in_vain_is_refused(schema: Any, fault: str) -> None:
    with pytest.raises(ValueError) as refused:
        graded("1", schema=schema)
    assert fault in str(refused.value)
    with pytest.raises(ValueError) as refused:
        graded("1", row={"own": schema}, schema_column="own")
    assert fault in str(refused.value) and "column 'own' of problem p has" in str(refused.value)


def test_what_only_looks_like_a_keyword_is_none() -> None:
    described = {"title": "t", "x-unit": "m", "$comment": "c", "deprecated": True, "examples": [{"minimun": 1}]}
    values = {"properties": {"typ": {"type": "integer"}}, "default": {"typo": 1}, "enum": [{"typ": 1}], "if": True}
    assert graded('{"typ": 1}', schema={**described, **values, "then": {"minContains": 0}}).reward == 1.0
    assert graded("1", schema={"$schema": DRAFT_7, "definitions": {}, "dependencies": {"a": ["b"]}}).reward == 1.0


def test_the_schema_of_a_problem_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    reward = load_function(RewardSpec(function="json_schema", arguments={"schema_column": "own"}))
    monkeypatch.setattr(json_schema, "check_keywords", lambda schema, kind, what: checked.append(what))
    for name in ("once", "other"):
        problem = Problem(id=name, question="q", answer=None, columns={"own": {"const": name}})
        for said in ("once", "other", "once"):
            assert reward(problem, f'"{said}"', "stop").reward == (said == name)
    assert checked == ["column 'own' of problem once", "column 'own' of problem other"]
