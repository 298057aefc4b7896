"""Verdicts on numbers, and on the words and units beside them."""

import pytest

from megatron_p2o.testing.answers.graded import accepts

RIGHT_NUMBERS = [
    ("0.5", "x=.5"),
    ("7e37", r"7 \times 10^{37}"),
    ("8.7e8", "870000000"),
    ("1.6e-19", r"1.6\times10^{-19}"),
    ("1.77e-6", "0.00000177"),
    ("2000", "2e3"),
    ("0.5", "5e-1"),
    ("7e37", "7e+37"),
    ("7e37", "7E37"),
    ("7e37", "7*10^{37}"),
    ("1234", r"1\ 234"),
    ("1234", "1~234"),
    ("16386.20", "16386.2"),
    ("3+4i", "4i+3"),
    ("2.5", "2 1/2"),
    ("e^2", "e^{2}"),
    ("-7", "\u22127"),
    ("4!", "24"),
    ("100", "10^2"),
    ("1000", "10^3"),
    ("2^{10}", "1024"),
    ("2^{2024}", "4^{1012}"),
    ("1/e", "e^{-1}"),
    ("3x^2", "3 x^{2}"),
    ("5.0", "5"),
]

RIGHT_WORDS_AND_UNITS = [
    ("16386.20", r"\$16,\!386.20"),
    ("5000000", r"5\text{ million}"),
    ("125", r"125\textnormal{ miles}"),
    ("125", r"125\textbf{ miles}"),
    ("3e8", r"3 \times 10^8 \text{ m/s}"),
    ("7e37", r"7.0 \times 10^{37}\ \text{kg}"),
    ("7e37", r"7\times 10^{37}\,\mathrm{kg\,m^2}"),
    ("1.6e-19", r"1.6 \times 10^{-19} \mathrm{~C}"),
    (r"\$18.90", "18.90"),
    ("18.90", r"\$18.90"),
    ("5", r"5\text{ miles per hour}"),
    (r"5\text{ m/s}", r"5\ \mathrm{m\,s^{-1}}"),
    (r"5\text{ m/s}", r"5\,\mathrm{m}/\mathrm{s}"),
    (r"5\text{ m/s}", r"5\frac{\text{m}}{\text{s}}"),
    ("5", "5 apples"),
    ("5000000", "5 million"),
    ("3", "3 hours"),
    ("5", r"\text{5 apples}"),
    ("5", r"5^{\circ}"),
    (r"30^\circ", r"30\text{ degrees}"),
    (r"\frac12", r"50\%"),
    (r"\text{Yes}", "yes"),
    ("B", r"\text{(B)}"),
    ("C", r"\textbf{(C)}"),
    (r"\frac{\pi}{6}", r"\frac{\pi}{6}\text{ radians}"),
    (r"6\text{ p.m.}", r"6 \text{ PM}"),
    (r"6\text{ p.m.}", "6 PM"),
    ("5", r"5\text{ cm}"),
    ("12", r"12\text{ ways}"),
    (r"\$12,\!345", "12345"),
    (r"\frac{\sqrt{3}}{2}", r"\sin 60^\circ"),
    ("17", r"\textbf{17}"),
    ("17", r"17\text{.}"),
    ("8", r"8 \text{ units}^2"),
    ("8", r"8\text{ square units}"),
    ("8", r"8\,\text{cm}^2"),
    ("even", r"\text{even}"),
]

RIGHT_LABELS = [("②④", "②④"), ("②④", r"\text{②④}"), ("①③", "③①"), ("①", "(①)"), ("Ⓐ", "Ⓐ"), ("⒊", "⒊")]
"""Numerals and letters in circles name statements."""

WRONG_NUMBERS = [
    ("5", "x=.5"),
    ("3", r"3.\overline{3}"),
    ("3e8", "24e"),
    ("-56", "-56_{7}"),
    ("3e6", "3000001"),
    ("3e8", r"3\times 10^{9}"),
    ("2e3", "6e"),
    ("7e37", "259e"),
    ("3", "3?"),
    ("3", "3!"),
    ("3", "3^2"),
    ("3", "3_5"),
    ("3", "-3"),
    ("3", "+-3"),
    ("3", "3i"),
    ("3", "3j"),
    ("3", "3e"),
    ("3", "3E"),
    ("3", "3k"),
    ("3", "33"),
    ("3", "3 4"),
    ("3", r"3 \mid 4"),
    ("3", "3/1000"),
    ("3", "3.0000001"),
    ("3", "2.9999999999"),
    ("3", "3+10^{-9}"),
    ("x_1", "x_2"),
    ("x_1", "x"),
    ("x^*", "x"),
    ("1:2", "2:1"),
    ("3:30", "3.30"),
    ("12", "1 2"),
    ("3+4i", "3-4i"),
    ("3+4i", "7"),
    ("3+4i", "5"),
    ("i", "1"),
    ("i", "-i"),
    ("120_8", "80"),
    ("2^{100}", "2^{100}+1"),
    ("50", "0.5"),
    ("0.5", "50"),
    ("E", "e"),
    ("E", "2.718281828"),
    ("-101_2", "-101"),
]

CHANGING_WORDS = (
    "quarters sixteenths twelfths twentieths elevenths millionths billionths lakhs crores factorials scores grosses "
    "myriads sines opposites logs fifteens zillions"
)

WRONG_COUNTS = [("5", rf"5\text{{ {word}}}") for word in CHANGING_WORDS.split()]

WRONG_WORDS_AND_UNITS = [
    (r"47\%", r"47^\circ"),
    (r"47\%", r"47\text{ cm}"),
    ("7", r"3+4\mathrm{i}"),
    ("5", r"5\text{ million}"),
    ("5", r"5\text{ squared}"),
    (r"5\text{ mL}", r"5\text{ L}"),
    (r"5\text{ MeV}", r"5\text{ eV}"),
    (r"5\text{ cm}^2", r"5\text{ cm}^3"),
    (r"5\text{ a.m.}", r"5\text{ p.m.}"),
    (r"3\text{ AM}", r"3\text{ PM}"),
    ("4", r"4\text{ is not the answer}"),
    ("3", r"x=2 \text{ oder } x=3"),
    ("3", r"\text{not } 3"),
    ("3", r"\text{at least }3"),
    ("3", r"\text{more than }3"),
    ("3", r"3\text{ mod }5"),
    ("3", r"3\text{i}"),
    ("3", r"3\text{ thousand}"),
    ("3", "3 thousand"),
    ("3", r"3\text{ hundred}"),
    ("3", r"3\text{ pairs}"),
    ("3", r"3\text{ tenths}"),
    ("3", r"3 \text{ times}"),
    ("3", r"3\text{ fewer apples}"),
    ("3", r"3\text{ divided by }2"),
    ("3", r"3\%"),
    ("3", r"3\text{ squared}"),
    ("3", r"3\text{ cubed}"),
    ("3", r"\text{three squared}"),
    ("3", r"3 \text{ plus } 1"),
    ("3", r"\text{Team A: }2, \text{Team B: }3"),
    (r"5\text{ m/s}", r"5\text{ m}"),
    (r"5\text{ m/s}", r"5\text{ m/s}^2"),
    (r"5\text{ km}", r"5\text{ m}"),
    (r"5\text{ kg}", r"5\text{ kg m}"),
    (r"5\text{ N}", r"5\text{ n}"),
    (r"5\text{ mW}", r"5\text{ MW}"),
    (r"5\mu\text{m}", r"5\text{ m}"),
    (r"5^\circ\text{C}", r"5^\circ\text{F}"),
    (r"5^\circ C", r"5^\circ F"),
    (r"5\text{ cents}", r"\$5"),
    (r"\$5", "€5"),
    (r"6\text{ p.m.}", "6"),
    (r"6\text{ p.m.}", r"6\text{ a.m.}"),
    ("6 PM", "6 AM"),
    (r"3\text{ north}", r"3\text{ south}"),
    (r"3\text{ feet}", r"3\text{ inches}"),
    (r"5\text{ apples}", r"5\text{ oranges}"),
    (r"5\text{ million}", "5"),
    (r"5\text{ million}", r"5\text{ billion}"),
    (r"30^\circ", r"30\text{ radians}"),
    ("A", r"\text{not A}"),
    (r"\text{H}_2\text{O}", r"\text{H}_2\text{S}"),
    ("0.1%", r"10\%"),
    (r"0.56 = 56\%", r"0.56 = 65\%"),
]

WRONG_LABELS = [
    *[("3", label) for label in ("③", "⑶", "⒊", "❸", "፫", "x=③", "1.③", "12:③", r"\frac{③}{1}", "③/1", "x_③")],
    *[("②④", other) for other in ("①③", "②", "24", "②④⑤", "②+④", "④②x")],
    ("(1,2)", "(①,2)"),
    ("①②③", "①②④"),
    ("A", "Ⓐ"),
]


@pytest.mark.parametrize(("gold", "answer"), [*RIGHT_NUMBERS, *RIGHT_WORDS_AND_UNITS, *RIGHT_LABELS])
def test_right_answer_is_accepted_however_it_is_spelled(gold: str, answer: str) -> None:
    assert accepts(gold, answer) is True


@pytest.mark.parametrize(
    ("gold", "answer"), [*WRONG_NUMBERS, *WRONG_WORDS_AND_UNITS, *WRONG_LABELS, *WRONG_COUNTS, ("5", r"5\text{K}")]
)
def test_answer_that_says_something_else_is_refused(gold: str, answer: str) -> None:
    assert accepts(gold, answer) is False


@pytest.mark.parametrize("question", ["What percent of them are red?", "Find the percentage.", "How many % is it?"])
def test_question_for_a_percentage_may_be_answered_with_the_sign(question: str) -> None:
    assert accepts("20", r"20\%", question) is True
    assert accepts("20", r"20\text{ percent}", question) is True
    assert accepts("0.2", r"20\%", question) is True
    assert accepts("20", "0.2", question) is False
    assert accepts("20", r"0.2\%", question) is False
    assert accepts("20", r"20\%") is False


@pytest.mark.parametrize(
    ("question", "gold"),
    [
        ("Sold at 30% off; how many?", "20"),
        ("What is 30 percent of 50?", "15"),
        ("A 20% solution is mixed. How many liters?", "9"),
    ],
)
def test_percentage_in_a_question_does_not_ask_for_one(question: str, gold: str) -> None:
    assert accepts(gold, rf"{gold}\%", question) is False
