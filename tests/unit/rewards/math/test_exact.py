"""Verdicts without algebra: equal texts, numbers, lists, words, and answers refused for their form alone."""

import random
import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_p2o.rewards.math.exact import parse_number
from megatron_p2o.rewards.math.grader import OpenComparison, local_verdict
from megatron_p2o.rewards.math.reading.latex import nesting_depth, outer_brackets, split_at
from megatron_p2o.rewards.math.reading.spelling import normal_form
from megatron_p2o.types import Problem


def verdict(gold: str, answer: str) -> bool | OpenComparison:
    return local_verdict(Problem(id="p", question="q", answer=gold), answer)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("42", "42."),
        ("42", "$42$"),
        ("42", "042"),
        ("42", "+42"),
        ("42", "42.0"),
        ("-3", "\u22123"),
        ("1234", "1,234"),
        ("1234", "1{,}234"),
        ("1234", "1 234"),
        ("1234", r"1\,234"),
        ("5", r"\$5.00"),
        (r"\frac{1}{2}", r"\dfrac{1}{2}"),
        (r"\frac{1}{2}", r"\frac12"),
        (r"\frac{1}{2}", "0.5"),
        (r"\frac{1}{2}", ".5"),
        (r"\frac{1}{2}", "3/6"),
        (r"-\frac{1}{2}", r"\frac{-1}{2}"),
        (r"1\frac{1}{2}", r"\frac{3}{2}"),
        (r"\frac{1}{3}", "0.333333"),
        ("0.1666667", r"\frac16"),
        ("0.5", r"50\%"),
        (r"25\%", "25"),
        (r"25\%", "0.25"),
        (r"30^\circ", "30"),
        ("(1,2)", r"\left( 1, 2 \right)"),
        ("(1,2)", "1, 2"),
        (r"\{1,2\}", r"\{2,1\}"),
        (r"\{1,2\}", "2,1"),
        ("1,2", "2,1"),
        ("12 45", "12  45"),
        ("12 45", "(12, 45)"),
        ("120_8", "120_{8}"),
        ("120_8", "(120)_8"),
        ("7", "7_{10}"),
        (r"\text{A}", "A"),
        ("A", r"\textbf{(A)}"),
        ("yes", r"\text{Yes.}"),
        (r"\text{no solution}", "No  solution"),
        ("3", "x=3"),
        ("3", r"x=\frac{6}{2}=3"),
        ("x=3", "x = 3"),
        (r"\pi r^2", r"\pi r^2"),
        ("5", r"5 \text{ apples}"),
        ("5", "5 cm"),
        (r"5\text{ cm}", "5"),
        (r"10\text{ cm}^2", r"10\,\mathrm{cm}^{2}"),
        (r"5\text{ cm}", r"5\text{ centimeters}"),
        (r"\frac{1}{2}\text{ kg}", "0.5"),
        (r"25\%", r"25\text{ percent}"),
        ("9" * 2000, "9" * 2000),
    ],
)
def test_equal_answer_is_accepted_without_algebra(gold: str, answer: str) -> None:
    assert verdict(gold, answer) is True


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("42", ""),
        ("42", "43"),
        ("42", "4 2"),
        ("9", r"9\%"),
        ("50", r"50\%"),
        (r"25\%", "26"),
        ("3", "3.0000001"),
        ("1000000", "1000000.0000004"),
        ("1000", "1.000"),
        (r"\frac{1}{3}", "0.33"),
        (r"\frac{1}{3}", "0.3333"),
        ("0.0000001", "0.0000002"),
        ("0.000000001", "0.0"),
        ("2", "1,2"),
        ("12", "1,2"),
        ("6", "1,2,3,4,5,6,7"),
        ("(1,2)", "(2,1)"),
        ("1,2", "(2,1)"),
        ("(1,2)", "[1,2]"),
        ("(1,2)", r"\{1,2\}"),
        ("[0,1]", "[0,1)"),
        ("12 45", "45 12"),
        ("12 45", "1245"),
        ("12 45", "12 4 5"),
        ("12 45", "12 45 3"),
        ("120_8", "120"),
        ("120", "120_8"),
        ("10101_2", "10101_3"),
        (r"\text{even}", r"\text{odd}"),
        (r"\text{no solution}", r"\text{one solution}"),
        ("evil", "live"),
        ("3", "1=3"),
        ("3", "1+1=4"),
        ("1", "2=1"),
        (r"5\text{ cm}", r"5\text{ m}"),
        (r"x\text{ meters}", r"x\text{ feet}"),
        ("9", r"9\text{ percent}"),
        ("(a,b)", r"\{a,b\}"),
    ],
)
def test_wrong_answer_is_refused_without_algebra(gold: str, answer: str) -> None:
    assert verdict(gold, answer) is False


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("x+1", "1+x"),
        ("2", r"\sqrt{4}"),
        ("2", r"\sqrt{4}=2"),
        ("y=x+1", "y=1+x"),
        (r"5\text{ cm}", r"\sqrt{25}\text{ centimeters}"),
        ("ab", "ba"),
        (r"2\pi\text{ cm}", r"\pi+\pi\text{ cm}"),
        (r"\sum_{k=1}^{n}k", "n(n+1)/2"),
    ],
)
def test_what_takes_algebra_is_left_open(gold: str, answer: str) -> None:
    assert verdict(gold, answer) == OpenComparison(normal_form(gold), normal_form(answer))


COSTLY = {
    "tower": ("2^{3^{4^{5}}}", r"9^{9^{9^9}}"),
    "bracketed tower": ("2^{3^{4}}", r"5^{\left(5^{\left(5^5\right)}-4\right)}"),
    "huge exponent": ("3^{20000}", "99999^{99999999}"),
    "high power of a sum": ("(a+b)^{100}", "(x+1)^{2000}-(x-1)^{2000}"),
    "factorial of a factorial": ("(3!)!", "((20!)!)!"),
    "huge factorial": ("2024!", "10000000!"),
    "huge binomial": (r"\binom{2024}{7}", r"\binom{1000000000}{500000000}"),
    "sum": (r"\sum_{k=1}^{20000}k", r"\sum_{k=1}^{1000000000}\frac{1}{k^3+1}"),
    "product": (r"\prod_{k=1}^{20000}k", r"\prod_{k=1}^{100000000}k"),
    "integral": (r"\int f(x) dx", r"\int_0^1\frac{\sin(x^{x})}{\ln(1+x^5)}dx"),
    "matrix": (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
}


@pytest.mark.parametrize("name", COSTLY)
def test_costly_form_is_refused_and_never_computed_here(name: str) -> None:
    gold, answer = COSTLY[name]
    assert verdict("x+1", answer) is False
    assert verdict(gold, answer) is not True


def test_long_or_deep_answer_is_refused_unless_the_gold_answer_is_so_too() -> None:
    long_sum = "+".join(["x"] * 300)
    assert verdict("x", long_sum) is False
    assert verdict(long_sum, long_sum.replace("x", "y")) == OpenComparison(long_sum, long_sum.replace("x", "y"))
    deep = "(" * 30 + "x" + ")" * 30
    assert verdict("x", deep) is False
    assert isinstance(verdict("(" * 20 + "x+1" + ")" * 20, deep), OpenComparison)


def test_request_that_would_not_fit_into_a_pipe_is_never_made() -> None:
    gold = "+".join(["x"] * 2000)
    assert verdict(gold, gold) is True
    assert isinstance(verdict(gold, gold.replace("x", "y")), OpenComparison)
    gold = "+".join(["x"] * 3000)
    assert verdict(gold, gold) is True
    assert verdict(gold, gold.replace("x", "y")) is False


def test_hostile_megabytes_are_refused_before_they_are_read() -> None:
    assert verdict("42", "7" * 1_000_000) is False
    assert verdict("42", "(" * 1_000_000) is False


LONG_WORK = {
    "huge factors": "*".join(["1e9999"] * 57),
    "long factors": "*".join(["1e1200"] * 57),
    "long denominators": "+".join(["1/3^{2000}"] * 36),
    "tiny terms": "+".join(["1e-9999"] * 50),
    "squares of squares": "(" * 20 + "9" * 300 + ")^2" * 20,
    "tower": "^".join(["2"] * 150),
    "factorials": "!".join(["9"] * 100),
    "binomials": r"\binom{999}{500}" * 20,
    "letters": "x" * 399,
    "list": "1," * 199 + "1",
    "signs": "-" * 399,
    "braces": "{" * 399,
    "both signs": r"\pm " * 99,
    "fractions of nothing": r"\frac" * 70,
    "roots": r"\sqrt" * 70 + "2",
    "tuples": "(1,2)" * 70,
    "equations": "x=1;" * 90,
    "thousands": "1,000" * 70,
    "unions": r"\cup" * 90,
}


@pytest.mark.parametrize("name", LONG_WORK)
@pytest.mark.parametrize("gold", ["42", "1,2,3", r"\frac{1}{3}", "x=1", r"(1,2)\cup(3,4)", r"5\text{ cm}"])
def test_long_work_of_any_kind_ends_and_is_not_accepted(gold: str, name: str) -> None:
    # As long as an answer may be.
    assert verdict(gold, LONG_WORK[name]) is not True


@pytest.mark.parametrize("answer", ["1e1100*1e1100*1e-1100*1e-1100", "1e9999/1e9999", "2^{9000}/2^{9000}"])
def test_numbers_that_grow_too_long_on_the_way_are_left_to_a_worker(answer: str) -> None:
    assert isinstance(verdict("1", answer), OpenComparison)
    assert verdict("1", answer.replace("9999", "99").replace("1100", "110").replace("9000", "90")) is True


@given(value=st.fractions(max_denominator=10**6), factor=st.integers(min_value=1, max_value=50))
def test_fraction_is_read_exactly_however_it_is_expanded(value: Fraction, factor: int) -> None:
    number = parse_number(rf"\frac{{{value.numerator * factor}}}{{{value.denominator * factor}}}")
    assert number is not None and number.value == value


@given(text=st.text(alphabet="0123456789.,/%+- \\frac{}^circ_xab()[]=<>!", max_size=20))
def test_any_text_equals_itself_and_nothing_raises(text: str) -> None:
    assert verdict(text, text) is True
    verdict("42", text)
    verdict(text, "x=1,(2)")


def test_numbers_agree_with_exact_arithmetic_on_random_pairs() -> None:
    generator = random.Random(7)
    for _ in range(500):
        gold = Fraction(generator.randint(-40, 40), generator.randint(1, 12))
        answer = gold if generator.random() < 0.5 else Fraction(generator.randint(-40, 40), generator.randint(1, 12))
        spelled = rf"\frac{{{3 * answer.numerator}}}{{{3 * answer.denominator}}}"
        assert verdict(f"{gold.numerator}/{gold.denominator}", spelled) is (gold == answer)


def test_rows_of_a_matrix_keep_their_separator() -> None:
    assert normal_form(r"\begin{pmatrix} 1 & 2 \\ 3 & \dfrac{1}{2} \end{pmatrix}") == (
        r"\begin{pmatrix}1&2\\3&\frac{1}{2}\end{pmatrix}"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(1,2]", ("(]", "1,2")),
        (r"\{a, f(b,c)\}", ("{}", "a, f(b,c)")),
        ("(1,2),(3,4)", ("", "(1,2),(3,4)")),
        ("(5)", ("()", "5")),
        ("(x+1)(x-1)", ("", "(x+1)(x-1)")),
        ("{1,2}", ("", "1,2")),
    ],
)
def test_outer_brackets_are_those_around_everything(text: str, expected: tuple[str, str]) -> None:
    assert outer_brackets(text) == expected


def test_nesting_counts_the_deepest_bracket_and_separators_inside_do_not_split() -> None:
    assert nesting_depth(r"(1+[2])\{\{3\}\}") == 2
    assert nesting_depth("(((") == 3
    assert split_at("f(a=b)=c", re.compile("=")) == (["f(a=b)", "c"], ["="])
    assert split_at(r"1,\begin{matrix}2,3\end{matrix},4", re.compile(",")) == (
        ["1", r"\begin{matrix}2,3\end{matrix}", "4"],
        [",", ","],
    )
