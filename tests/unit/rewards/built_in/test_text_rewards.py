"""`exact` and `regex`."""

from typing import Any

import pytest

from megatron_p2o.rewards.functions import RewardSpec
from megatron_p2o.testing.answers.graded import load_function
from megatron_p2o.types import Grade, Problem


def graded(function: str, response: str, answer: str | None = "Paris", row: Any = None, **arguments: Any) -> Grade:
    problem = Problem(id="p", question="q", answer=answer, columns=row or {"question": "q"})
    return load_function(RewardSpec(function=function, arguments=arguments))(problem, response, "stop")


@pytest.mark.parametrize(
    ("response", "arguments", "reward"),
    [
        (r"It is \boxed{Paris}.", {}, 1.0),
        (r"It is \boxed{ Paris }.", {}, 1.0),
        (r"It is \boxed{paris}.", {}, 0.0),
        (r"It is \boxed{paris}.", {"ignore_case": True}, 1.0),
        (r"It is \boxed{Paris, Texas}.", {}, 0.0),
        (r"\boxed{Paris} or \boxed{Rome}", {}, 0.0),
        ("It is Paris", {}, 0.0),
        ("It is Paris", {"extract": "response"}, 0.0),
        ("It is:\nParis\n", {"extract": "last_line"}, 1.0),
        ("<answer>Paris</answer>", {"extract": "answer_tag"}, 1.0),
    ],
)
def test_exact(response: str, arguments: dict[str, Any], reward: float) -> None:
    assert graded("exact", response, **arguments).reward == reward


@pytest.mark.parametrize(("function", "arguments"), [("exact", {}), ("regex", {"pattern": "Paris"})])
def test_the_last_line_counts_where_the_response_came_to_its_end(function: str, arguments: dict[str, Any]) -> None:
    reward = load_function(RewardSpec(function=function, arguments={"extract": "last_line", **arguments}))
    problem = Problem(id="p", question="q", answer="Paris")
    assert reward(problem, "It is:\nParis", "stop").reward == 1.0
    assert reward(problem, "It is:\nParis", "length").reward == 0.0


def test_exact_with_several_accepted_answers() -> None:
    row = {"accepted": ["NYC", "New York"]}
    assert graded("exact", r"\boxed{NYC}", None, row, answers_column="accepted").reward == 1.0
    assert graded("exact", r"\boxed{Paris}", None, row, answers_column="accepted").reward == 0.0


def test_exact_does_not_tell_the_answer() -> None:
    assert "Paris" not in graded("exact", r"\boxed{Rome}").feedback


@pytest.mark.parametrize(
    ("answer", "row", "arguments", "words"),
    [
        (None, None, {}, "p has no gold answer: set data.answer_field or answers_column"),
        ("a", None, {"answers_column": "accepted"}, "no column 'accepted'"),
        ("a", {"accepted": []}, {"answers_column": "accepted"}, "must be a list of texts"),
        ("a", {"accepted": "NYC"}, {"answers_column": "accepted"}, "must be a list of texts"),
        ("a", {"accepted": ["NYC", " "]}, {"answers_column": "accepted"}, "holds a blank answer"),
    ],
)
def test_exact_has_no_verdict_without_a_gold_answer(answer: Any, row: Any, arguments: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        graded("exact", r"\boxed{b}", answer, row, **arguments)


@pytest.mark.parametrize(
    ("response", "arguments", "reward"),
    [
        ("on 2024-05-01.", {"pattern": r"\d{4}-\d\d-\d\d"}, 1.0),
        ("on 2024-05-01.", {"pattern": r"\d{4}-\d\d-\d\d", "is_whole": True}, 0.0),
        ("2024-05-01", {"pattern": r"\d{4}-\d\d-\d\d", "is_whole": True}, 1.0),
        ("<think>2024-05-01</think> no", {"pattern": r"\d{4}-\d\d-\d\d"}, 0.0),
        ("<think>2024-05-01", {"pattern": r"\d{4}-\d\d-\d\d"}, 0.0),
        (r"\boxed{x7}", {"pattern": r"x\d", "extract": "boxed", "is_whole": True}, 1.0),
    ],
)
def test_regex(response: str, arguments: dict[str, Any], reward: float) -> None:
    assert graded("regex", response, **arguments).reward == reward


def test_a_problems_own_pattern_is_not_told() -> None:
    row = {"pattern": "^Paris$"}
    assert graded("regex", "Paris", row=row, pattern_column="pattern").reward == 1.0
    assert "Paris" not in graded("regex", "Rome", row=row, pattern_column="pattern").feedback
    assert "^Paris$" in graded("regex", "Rome", pattern="^Paris$").feedback


@pytest.mark.parametrize(
    ("function", "arguments", "words"),
    [
        ("exact", {"extract": "end"}, "extract='end' must be one of"),
        ("regex", {}, "needs either pattern, for all problems, or pattern_column"),
        ("regex", {"pattern": "a", "pattern_column": "b"}, "needs either pattern"),
        ("regex", {"pattern": ""}, "is blank, which every answer matches"),
        ("regex", {"pattern": "(a"}, "is no regular expression: missing \\)"),
    ],
)
def test_bad_settings_are_refused_at_the_start(function: str, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_function(RewardSpec(function=function, arguments=arguments))


def test_a_bad_pattern_in_a_row_is_no_verdict() -> None:
    with pytest.raises(ValueError, match="column 'pattern' of problem p='\\(a' is no regular expression"):
        graded("regex", "x", row={"pattern": "(a"}, pattern_column="pattern")
    with pytest.raises(ValueError, match="column 'pattern' of problem p='' is blank"):
        graded("regex", "x", row={"pattern": ""}, pattern_column="pattern")
