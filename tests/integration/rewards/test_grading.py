"""Grading at length: hundreds of answers made equal or different, and costly ones with no guard in front of algebra."""

import random
from collections.abc import Iterator

import pytest

from megatron_p2o.config.tree import GradingConfig
from megatron_p2o.rewards.math.grader import KNOWN, algebra_request
from megatron_p2o.rewards.registry import make_grader
from megatron_p2o.rewards.workers.grading_workers import GradingWorkers
from megatron_p2o.rewards.workers.processes import WorkerLimits
from megatron_p2o.types import CORRECT, INCORRECT, Problem

pytestmark = pytest.mark.slow

PATIENCE_S = 300.0
"""Longest wait for one answer, however busy the machine."""


def constructed_pairs(generator: random.Random, num_pairs: int) -> Iterator[tuple[str, str, bool]]:
    """Yield gold, answer, whether they are equal: known from how they are made."""
    for index in range(num_pairs):
        a, b, c = generator.randint(2, 60), generator.randint(2, 60), generator.randint(2, 9)
        x = generator.choice("xnt")
        equal = [
            (rf"{a}\sqrt{{{b}}}", rf"\sqrt{{{a * a * b}}}"),
            (rf"{x}^2+{a}{x}+{b}", rf"{b}+{x}({a}+{x})"),
            (rf"({x}+{a})({x}-{b})", rf"{x}^2+{a - b}{x}-{a * b}" if a > b else rf"{x}^2-{b - a}{x}-{a * b}"),
            (rf"\frac{{{a}\pi}}{{{b}}}", rf"\frac{{{a * c}}}{{{b * c}}}\pi"),
            (rf"{a}\cdot 10^{{{c}}}", str(a * 10**c)),
            (rf"{c}^{{{b}}}", str(c**b)),
            (rf"\frac{{{a}}}{{\sqrt{{{c}}}}}", rf"\frac{{{a}\sqrt{{{c}}}}}{{{c}}}"),
            (rf"y={a}{x}+{b}", rf"{b}+{a}{x}"),
            (rf"[{a},{a + b})", rf"{x}\in[{a},{a + b})"),
            (rf"{a}+{b}i", rf"{b}i+{a}"),
            (rf"\log_{{{c}}}{a}", rf"\frac{{\ln {a}}}{{\ln {c}}}"),
            (rf"\frac{{{a}}}{{{x}+{b}}}", rf"\frac{{{a * c}}}{{{c}{x}+{b * c}}}"),
        ]
        different = [
            (rf"{a}\sqrt{{{b}}}", rf"\sqrt{{{a * a * b + 1}}}"),
            (rf"{x}^2+{a}{x}+{b}", rf"{b}+{x}({a + 1}+{x})"),
            (rf"({x}+{a})({x}-{b})", rf"({x}+{a})({x}-{b + 1})"),
            (rf"\frac{{{a}\pi}}{{{b}}}", rf"\frac{{{a * c}}}{{{b * c + 1}}}\pi"),
            (rf"{a}\cdot 10^{{{c}}}", str(a * 10**c + 1)),
            (rf"{c}^{{{b}}}", str(c**b + 1)),
            (rf"\frac{{{a}}}{{\sqrt{{{c}}}}}", rf"\frac{{{a}\sqrt{{{c}}}}}{{{c + 1}}}"),
            (rf"y={a}{x}+{b}", rf"y={a}{x}+{b + 1}"),
            (rf"[{a},{a + b})", rf"{x}\in[{a},{a + b}]"),
            (rf"{a}+{b}i", rf"{a}-{b}i"),
            (rf"10^{{-{a}}}", rf"{c}\cdot 10^{{-{a}}}"),
            (rf"10^{{-{a}}}", "0"),
        ]
        is_equal = index % 2 == 0
        kinds = equal if is_equal else different
        yield (*kinds[(index // 2) % len(kinds)], is_equal)


def test_constructed_pairs_are_graded_right() -> None:
    grader = make_grader(GradingConfig(num_workers=2, deadline_s=PATIENCE_S))
    pairs = list(constructed_pairs(random.Random(3), 480))
    futures = [
        grader.submit(Problem(id="p", question="q", answer=gold), rf"so $\boxed{{{answer}}}$.")
        for gold, answer, _ in pairs
    ]
    grades = [future.result(PATIENCE_S) for future in futures]
    grader.close()
    expected = [CORRECT if is_equal else INCORRECT for _, _, is_equal in pairs]
    assert [pair for pair, grade, want in zip(pairs, grades, expected, strict=True) if grade != want] == []


COSTLY = {
    "tower": "9^{9^{9^9}}",
    "power of a power": "10^{10^{10}}",
    "factorial": "10000000!",
    "factorial of a factorial": "((20!)!)!",
    "binomial": r"\binom{1000000000}{500000000}",
    "a million digits": "7" * 1_000_000,
    "1,000 fractions": r"\frac{1}{1+" * 1000 + "1" + "}" * 1000,
    "5,000 parentheses": "(" * 5000 + "1" + ")" * 5000,
    "sum": r"\sum_{k=1}^{1000000000} \frac{1}{k^3+1}",
    "product": r"\prod_{k=1}^{100000000} k",
    "integral": r"\int_0^1 \frac{\sin(x^{x})}{\ln(1+x^5)+e^{x^2}} dx",
    "power of a sum": "(x+1)^{2000}-(x-1)^{2000}",
    "3,000 terms": "+".join(rf"\frac{{{i}}}{{{i + 1}}}" for i in range(1, 3001)),
    "trigonometry": r"\sin(x)^{40}\cos(3x+1)^{30}\tan(\sqrt{x+\sqrt{x+\sqrt{x}}})+\log(\sin(x)+\cos(x))",
    "matrix": r"\begin{pmatrix}" + r"\\".join("&".join("1" * 60) for _ in range(60)) + r"\end{pmatrix}",
}


@pytest.mark.parametrize("gold", ["42", r"\sum_{k=1}^{n} k^2"])
def test_costly_answers_that_reach_algebra_are_stopped_and_never_accepted(gold: str) -> None:
    # With a sum for gold answer, everything is shown to math-verify.
    deadline_s = 10.0 if gold == "42" else 2.0
    limits = WorkerLimits(
        memory_limit_mib=1024, deadline_s=deadline_s, timeout_s=PATIENCE_S, stall_timeout_s=PATIENCE_S
    )
    workers = GradingWorkers(None, limits, num_workers=2, known=algebra_request(*KNOWN))
    futures = {name: workers.submit(algebra_request(gold, answer)) for name, answer in COSTLY.items()}
    grades = {name: future.result(PATIENCE_S) for name, future in futures.items()}
    stopped = sum(
        count for outcome, count in workers.counts.items() if outcome in ("out_of_time", "crashed", "out_of_memory")
    )
    workers.close()
    assert {name for name, grade in grades.items() if grade == CORRECT} == set()
    assert sum(not grade.is_decided for grade in grades.values()) == stopped
    assert (stopped > 0) is (gold != "42"), "what is read here is decided without computing it"
