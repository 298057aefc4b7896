"""TrialReplies that a template tells, in whatever spelling."""

import pytest

from megatron_p2o.evolve.reflection.leaks import leaked_answer


@pytest.mark.parametrize(
    ("template", "answer"),
    [
        ("The sum is 1234, remember.", "1234"),
        ("Use 1,234 as the constant.", "1234"),
        ("Remember 1234.", "1,234"),
        ("Remember 1{,}234.", r"1\,234"),
        ("It is about 16,386.20 dollars.", r"\$16386.2"),
        (r"For such triangles answer \frac{17}{42}.", r"\frac{17}{42}"),
        (r"Often $\dfrac {17} {42}$ is close, so \frac {17} {42}.", r"\frac{17}{42}"),
        ("The answer is 3/7.", r"\frac{3}{7}"),
        (r"The ratio is \frac{3}{4}.", "0.75"),
        ("It is three parts in four: 75%.", r"\frac34"),
        ("Say ½ · 7 or 7/4 at last.", r"1\frac{3}{4}"),
        ("This gives √17.", r"\sqrt{17}"),
        ("The distance is 2 sqrt 13.", r"2\sqrt{13}"),
        ("Convert to (3, pi/2).", r"(3, \frac{\pi}{2})"),
        ("Use x**2 + 1.", "x^2+1"),
        ("Use x² + 1.", "x^2+1"),
        ("It is 10^9.", "10^{9}"),
        ("It is 1000000000.", "10^{9}"),
        ("The speed is 300,000,000.", r"3\times 10^8"),
        ("The speed is 3e8.", r"3\times 10^{8}"),
        ("Turn it by 90 degrees.", r"90^\circ"),
        ("The root is 1234.", "-1234"),
        ("The pair (12, 85) is typical.", "12, 85"),
        ("The pair is 81, 256.", "81,256"),
        ("Remember X^2 + 12.", "x^2+12"),
        ("It is Monday morning.", "monday morning"),
    ],
)
def test_answer_in_a_template_is_found(template: str, answer: str) -> None:
    assert leaked_answer(template, ["999999", answer]) == answer


@pytest.mark.parametrize(
    ("template", "answer"),
    [
        ("Work in 7 steps, and check step 7 twice.", "7"),
        ("At most 12 lines.", "12"),
        ("Work with 100% care.", "100"),
        ("Halve it: 1/2 is a half.", "0.5"),
        ("If there is no solution, say none.", "none"),
        ("The year 12345 is far.", "1234"),
        ("The year 1,234,567 is far.", "1234"),
        ("Write 12 first and 85 later.", "12, 85"),
        ("The answer is 3/8.", r"\frac{3}{7}"),
        ("Think.", ""),
        ("", "1234"),
        ("Use x^2.", "x^2 + 12"),
    ],
)
def test_trivial_or_absent_answers_are_no_leak(template: str, answer: str) -> None:
    assert leaked_answer(template, [answer]) is None


@pytest.mark.parametrize(
    "text", ["9" * 100_000, "9^" * 50_000, "1/" * 50_000, r"\frac{" * 20_000, "1e999" * 1000, "²" * 9999]
)
def test_hostile_templates_are_read_in_one_pass(text: str) -> None:
    # Anything worse than linear would take minutes here.
    assert leaked_answer(text, ["1234"]) is None
