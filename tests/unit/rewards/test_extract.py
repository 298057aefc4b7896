"""Finding the final answer in a response."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_p2o.rewards.extract import last_boxed


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{41} no wait \boxed{42}", "42"),
        (r"\boxed{ \frac{1}{2} }", r"\frac{1}{2}"),
        (r"\boxed {7} and \fbox{8}", "8"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\}}", r"\}"),
        (r"a row \\\boxed{3}", "3"),
        (r"\boxed{}", ""),
        (r"} } \boxed{3} {", "3"),
        ("a \\boxed{1 that was never closed\n\n\\boxed{2}", "2"),
        (r"\boxed{-\boxed{3}}", "-{3}"),
        (r"\boxed{4+\boxed{3}}", "4+{3}"),
        (r"\boxed{\frac{\boxed{3}}{7}}", r"\frac{{3}}{7}"),
        (r"\boxed{\boxed{3}\%}", r"{3}\%"),
        (r"\boxed{3 \text{ or } \boxed{4}}", r"3 \text{ or } {4}"),
        (r"\boxed{4\phantom{\boxed{3}}}", r"4\phantom{{3}}"),
        (r"\boxed{ \fbox{ \boxed{3} } }", "3"),
        (r"\boxed{\boxed{3}\boxed{4}}", "{3}{4}"),
        (r"\boxed{3}. Actually, \boxed 5", "5"),
        (r"$\boxed5$.", "5"),
        (r"\boxed{\boxed 5}", "5"),
        (r"\boxed{3}, as \boxed asks; no other \boxed.", "3"),
        (r"\boxed{3} no: \\boxed{4}", "4"),
        (r"\boxed{3}, \boxed{4}", "4"),
        ("% \\boxed{3}\n\\boxed{4}", "4"),
        ("\\boxed{4}\n % or \\boxed{3}", "4"),
        (r"25% of 12 is \boxed{3}", "3"),
        (r"25 % or p% of 12 is \boxed{3}", "3"),
        (r"\boxed{3}\%, not \boxed{4}", "4"),
        (r"\boxed{25%}", "25%"),
        (r"\boxed{42}. \iffalse \boxed{3} \fi", "42"),
        (r"\boxed{\iffalse 4 \fi 3}", "3"),
        (r"\boxed{4} <!-- \boxed{3} -->", "4"),
        (r"\boxed{4} \begin{comment} \boxed{3} \end{comment}", "4"),
        (r"\boxed{4} or % \boxed{3}", "4"),
        ("\\boxed{4 or % }\n3}", "4 or \n3"),
        ("thoughts that the prompt opened \\boxed{1}</think> \\boxed{2}", "2"),
        ("<think>a</think>\\boxed{1}<think>b</think>\\boxed{2}", "2"),
        ("<think>\\boxed{1}</think> is \\boxed{2}", "2"),
        ("\\boxed{1}</think>\\boxed{2}</think>\\boxed{3}", "3"),
    ],
)
def test_last_balanced_box_is_the_answer(text: str, answer: str) -> None:
    assert last_boxed(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        "",
        "42",
        "the answer is $42$",
        r"\boxed{42",
        r"\boxed 42",
        r"\boxed{3}. No, \boxed 42",
        r"\boxed{3}. No, \boxed5+1",
        r"\boxed{3}. No, \boxed\pi",
        r"\boxed{3}. No, \boxed-3",
        r"\boxed{3 + \boxed-5}",
        r"\boxed{3}. No, \boxed",
        r"%\boxed{3}",
        r"boxed{42}",
        r"\boxed{4\}",
        "\\boxed{1}</think> done",
        r"\boxed{42}. Wait, I forgot a case: \boxed{17",
        r"\boxed{42} or rather \boxed{\frac{1}{2}",
        r"\boxed{1} \boxed{2 { \boxed{3}} \boxed{",
        r"\boxed{4+\boxed{3}",
        r"\boxed{1 { \boxed{2}",
        r"\iffalse \boxed{3}",
        r"\boxed{3}% \boxed{4}",
        r"<think>perhaps \boxed{42}, but",
        r"<think>a</think>\boxed{42}<think>or \boxed{43}",
    ],
)
def test_response_that_is_cut_off_or_boxes_nothing_after_thinking_has_no_answer(text: str) -> None:
    assert last_boxed(text) is None


BRACES = st.recursive(
    st.text(alphabet="ab1 +", max_size=4), lambda inner: st.lists(inner.map(lambda part: f"{{{part}}}")).map("x".join)
)


@given(before=st.text(alphabet="{}ab\\ ", max_size=12), content=BRACES, after=st.text(alphabet="}ab ", max_size=8))
def test_balanced_content_comes_back_whatever_stands_around_it(before: str, content: str, after: str) -> None:
    # The blank keeps a backslash at the end of `before` from escaping the box.
    assert last_boxed(f"{before} \\boxed{{{content}}}{after}") == content.strip()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{" * 150_000, None),
        (r"\boxed{" * 100_000 + "}" * 100_000, ""),
        ("{" * 1_000_000 + r"\boxed{1}", "1"),
        (r"\boxed" + " " * 1_000_000, None),
        (r"\boxed " * 150_000 + "{1}", "1"),
        (r"\boxed{1}" + "\\" * 1_000_000, "1"),
        (r"\boxed{1}" * 100_000, "1"),
        ("</think>" * 125_000 + r"\boxed{1}", "1"),
        (r"\boxed{" * 100_000 + r"\boxed{1}", None),
        ("5" + " " * 1_000_000 + r"\boxed{1}", "1"),
        (r"\iffalse" * 125_000 + r"\fi\boxed{1}", "1"),
        ("% " * 500_000 + "\n" * 500_000 + r"\boxed{1}", "1"),
    ],
)
def test_hostile_megabytes_are_read_in_one_pass(text: str, answer: str | None) -> None:
    # Anything worse than linear would take hours here.
    assert last_boxed(text) == answer


PIECES = (
    *("\\boxed{", "\\boxed", "\\fbox{", "\\fbox 7", "\\boxed{3}", "{", "}", "\\{", "\\}", "\\", "\\\\", "%", "\\%"),
    *("5%", "5 %", "\n", "\n\n", " ", "12", "x", ".", "a b", "$", "\r", "\u2028"),
)


def test_what_stands_before_the_first_box_decides_nothing() -> None:
    generator = random.Random(0)
    noise = [piece for piece in PIECES if "box" not in piece and "%" not in piece]
    num_answers = 0
    for _ in range(3000):
        response = "".join(generator.choices(PIECES, k=generator.randint(1, 20)))
        before = "".join(generator.choices(noise, k=generator.randint(1, 20)))
        answer = last_boxed(response)
        assert last_boxed(f"{before}\n\n{response}") == answer, (before, response)
        num_answers += answer is not None
    assert num_answers > 100
