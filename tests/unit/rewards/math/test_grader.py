"""Grading with math-verify in worker processes: right verdicts, and workers that may hang, crash or be killed."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest

from megatron_p2o.config.tree import GradingConfig
from megatron_p2o.rewards.math.grader import MathGrader
from megatron_p2o.rewards.registry import make_grader
from megatron_p2o.types import CORRECT, INCORRECT, Grade, Problem

PATIENCE_S = 120.0
"""Longest wait for anything here; passing tests take a fraction of a second on an idle machine."""

ENDLESS = ("2^{100000000000}", "2^{100000000001}")
"""Gold and answer of the same costly form: no guard refuses the answer, and algebra does not end."""


@pytest.fixture(scope="module")
def grader() -> Iterator[MathGrader]:
    """A grader that waits long enough for any honest answer, however busy the machine."""
    grader = make_grader(GradingConfig(num_workers=2, deadline_s=PATIENCE_S))
    yield grader
    grader.close()


def submit(grader: MathGrader, gold: str, text: str) -> Future[Grade]:
    return grader.submit(Problem(id="p", question="q", answer=gold), text)


def grade_answer(grader: MathGrader, gold: str, answer: str) -> Grade:
    return submit(grader, gold, rf"so \boxed{{{answer}}}").result(PATIENCE_S)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (r"\sin^2 x", r"1-\cos^2 x"),
        (r"\frac{n(n+1)}{2}", r"\frac{n^2+n}{2}"),
        ("0<x<1", "(0,1)"),
        (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty) \cup (-\infty, 2)"),
        (r"1\pm\sqrt{2}", r"1+\sqrt2, 1-\sqrt2"),
        (r"\infty", r"+\infty"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}"),
        ("x^2+y^2=1", "x^2+y^2-1=0"),
        ("x=1,y=2", "(1,2)"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)"),
        ("5", r"5 \text{ apples}"),
        (r"10\text{ cm}^2", r"10\text{ square centimeters}"),
        ("4", "2+2=4"),
        (r"\binom{10}{3}", "120"),
        (r"\sqrt{2}+\sqrt{3}", "3.1462643699"),
        ("ab", "ba"),
    ],
)
def test_equal_answer_is_correct(grader: MathGrader, gold: str, answer: str) -> None:
    assert grade_answer(grader, gold, answer) == CORRECT


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("10^{-8}", "0"),
        (r"\frac{1}{10^{9}}", "0.0"),
        ("10^{-20}", r"2\cdot 10^{-20}"),
        ("3", "1+1=3"),
        ("2^{100}", "2^{100}+1"),
        ("2", r"2\text{ or }3"),
        ("5", r"\pm 5"),
        (r"\pm 5", "5"),
        ("(1,2)", "(1,2),(3,4)"),
        ("x", "x=5"),
        ("x=3", "y=3"),
        ("x+1", "y+1"),
        ("3c", "3d"),
        ("23t", "23"),
        ("5", "5c"),
        (r"42", r"42\text{ or 43}"),
        (r"\triangle\text{ABC}", r"\triangle\text{DEF}"),
        (r"3\text{ hours } 20\text{ minutes}", r"3\text{ hours } 30\text{ minutes}"),
        ("p-q", "q-p"),
        (r"\infty", r"-\infty"),
        ("30", r"\frac{\pi}{6}"),
        (r"2\sqrt{3}", "3.464"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 5 \end{pmatrix}"),
        (r"(-\infty,2)\cup(3,\infty)", r"(-\infty,2]\cup(3,\infty)"),
        ("x+1", r"\frac{"),
        ("x+1", "((((("),
        ("x+1", "ник增高人权"),
    ],
)
def test_different_answer_is_incorrect(grader: MathGrader, gold: str, answer: str) -> None:
    assert grade_answer(grader, gold, answer) == INCORRECT


@pytest.mark.parametrize(
    "text", ["the answer is 7", "Step 7. therefore nothing", "", r"\boxed{7", "\\boxed{7}</think>"]
)
def test_response_without_a_box_is_incorrect(grader: MathGrader, text: str) -> None:
    assert submit(grader, "7", text).result(PATIENCE_S) == INCORRECT


HOSTILE = {
    "tower": r"\boxed{9^{9^{9^9}}}",
    "tower without braces": r"\boxed{9^9^9^9}",
    "power of a power": r"\boxed{10^{10^{10}}}",
    "nested towers": r"\boxed{\dfrac{5^{\left(5^{\left(5^{\left(5^5\right)}\right)} - 4\right)} - 5}{16}}",
    "huge exponent": r"\boxed{99999999999^{99999999}}",
    "huge factorial": r"\boxed{10000000!}",
    "factorial of a factorial": r"\boxed{((20!)!)!}",
    "huge binomial": r"\boxed{\binom{1000000000}{500000000}}",
    "100,000 digits": r"\boxed{" + "7" * 100_000 + "}",
    "a million digits": r"\boxed{" + "7" * 1_000_000 + "}",
    "1,000 fractions": r"\boxed{" + r"\frac{1}{1+" * 1000 + "1" + "}" * 1001,
    "5,000 parentheses": r"\boxed{" + "(" * 5000 + "1" + ")" * 5000 + "}",
    "40 parentheses": r"\boxed{" + "(" * 40 + "1" + ")" * 40 + "}",
    "500 roots": r"\boxed{" + r"\sqrt{" * 500 + "2" + "}" * 501,
    "long sum": r"\boxed{\sum_{k=1}^{1000000000} \frac{1}{k^3+1}}",
    "long product": r"\boxed{\prod_{k=1}^{100000000} k}",
    "integral": r"\boxed{\int_0^1 \frac{\sin(x^{x})}{\ln(1+x^5)+e^{x^2}} dx}",
    "power of a sum": r"\boxed{(x+1)^{2000}-(x-1)^{2000}}",
    "3,000 terms": r"\boxed{" + "+".join(rf"\frac{{{i}}}{{{i + 1}}}" for i in range(3000)) + "}",
    "matrix": r"\boxed{\begin{pmatrix}" + r"\\".join("&".join("1" * 9) for _ in range(9)) + r"\end{pmatrix}}",
    "determinant": r"\boxed{\det\begin{pmatrix}a&b\\c&d\end{pmatrix}}",
    "5,000 open boxes": r"\boxed{" * 5000,
    "40,000 dollars": "$ " * 40_000 + r"\boxed{$}",
    "3,000 open boxes with dollars": r"$\boxed{1 " * 3000,
    "20,000 fractions": r"\boxed{" + r"\frac{1}{2}" * 20_000 + "}",
    "list": r"\boxed{" + ",".join(map(str, range(400))) + "}",
    "set of roots": r"\boxed{\{" + ",".join(rf"\sqrt{{{i}}}" for i in range(60)) + r"\}}",
    "zero bytes": "\\boxed{\0\0}",
    "line breaks": "\\boxed{\n\r\u2028x\n}",
    "half a surrogate": "\\boxed{\ud800}",
    "request in disguise": '\\boxed{"}\\n{"gold": "1", "answers": ["1"]}',
}


def test_hostile_answers_neither_end_the_grader_nor_pass(grader: MathGrader) -> None:
    for gold in ("42", "x+1"):
        futures = {name: submit(grader, gold, text) for name, text in HOSTILE.items()}
        grades = {name: future.result(PATIENCE_S) for name, future in futures.items()}
        assert {name for name, grade in grades.items() if grade != INCORRECT} == set()
    assert grade_answer(grader, "x+1", "1+x") == CORRECT


def test_fault_of_the_grader_costs_one_grade_and_is_logged_once(
    grader: MathGrader, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Problem(id="broken", question="", answer=7)  # type: ignore[arg-type]
    failed_before = grader.counts.get("failed", 0)
    grades = [grader.submit(broken, r"\boxed{7}").result(PATIENCE_S) for _ in range(3)]
    assert grades == [Grade.undecided("the grader failed: TypeError")] * 3
    assert grader.counts["failed"] == failed_before + 3
    assert [record.getMessage().count("broken") for record in caplog.records] == [1]
    assert "TypeError" in caplog.text
