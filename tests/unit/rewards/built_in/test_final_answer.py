"""Where the answer of a response is looked for."""

import pytest

from megatron_p2o.rewards.built_in.final_answer import Extract, checked_extract, fenced_blocks, final_answer

RESPONSE = r"""<think>
\boxed{0} <answer>0</answer>
```
0
```
</think>
First \boxed{1}, then \boxed{2}.
<answer>3</answer> no: <answer>
4 </answer>
```json
5
```
```python
6
7
```
Done.
"""


@pytest.mark.parametrize(
    ("extract", "answer"),
    [("boxed", "2"), ("answer_tag", "4"), ("code_block", "6\n7"), ("last_line", "Done.")],
)
def test_the_last_one_counts(extract: Extract, answer: str) -> None:
    assert final_answer(RESPONSE, extract) == answer


def test_the_last_line_of_a_response_that_was_cut_off_is_no_answer() -> None:
    assert final_answer("The sum is\n12", "last_line", "stop") == "12"
    assert final_answer("The sum is\n12", "last_line", "length") is None
    assert final_answer("\\boxed{12} is the s", "boxed", "length") == "12", "it is closed"


@pytest.mark.parametrize("extract", ["response", "boxed", "answer_tag", "code_block", "last_line"])
def test_an_answer_in_open_thinking_is_none(extract: Extract) -> None:
    assert final_answer(f"<think>{RESPONSE.replace('</think>', '')}", extract) is None


@pytest.mark.parametrize(
    ("response", "extract"),
    [
        ("nothing", "boxed"),
        ("<answer>4", "answer_tag"),
        ("<answer>3</answer> <answer>4", "answer_tag"),
        ("```\n4", "code_block"),
        (" \n ", "last_line"),
    ],
)
def test_what_is_not_closed_is_no_answer(response: str, extract: Extract) -> None:
    assert final_answer(response, extract) is None


def test_all_of_a_response_without_thinking() -> None:
    assert final_answer("<think>x</think>\n a b \n", "response") == "a b"
    assert final_answer("", "response") == ""


def test_a_fence_is_closed_by_its_own_mark_alone() -> None:
    text = "````md\n```python\nx\n```\n````\n~~~\ny\n```\n~~~~\n```\nopen"
    assert fenced_blocks(text) == [("md", "```python\nx\n```"), ("", "y\n```")]


def test_an_unknown_place_is_refused() -> None:
    with pytest.raises(ValueError, match="exact extract='box' must be one of response, last_line, boxed, answer_tag"):
        checked_extract("box", "exact")
