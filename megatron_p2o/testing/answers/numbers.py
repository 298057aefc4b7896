"""Shapes of answers that are one number: how each is spelled, and what it is not."""

# ruff: noqa: RUF001  # characters that look like others are among the spellings

import random
from collections.abc import Callable
from fractions import Fraction

from megatron_p2o.testing.answers.record import Made, Spelled, nonzero, signed


def _value_changes(text: str, generator: random.Random) -> list[Spelled]:
    """Return what words or signs beside a number make of it."""
    words = generator.choice(["million", "thousand", "and a half", "squared", "or more", "dozen", "hundredths"])
    return [
        (f"text: {words}", rf"{text}\text{{ {words}}}"),
        ("imaginary", rf"{text}\mathrm{{i}}"),
        ("a letter", f"{text}k"),
        ("plus minus", rf"\pm {text.removeprefix('-')}"),
        ("percent", rf"{text}\%"),
        ("prime", f"{text}'"),
    ]


def _integer(generator: random.Random) -> Made:
    value = generator.choice([nonzero(generator, 99), nonzero(generator, 999_999), generator.randint(2, 12)])
    text = str(value)
    digits = str(abs(value))
    place = generator.randrange(len(digits))
    other = digits[:place] + str((int(digits[place]) % 9) + 1) + digits[place + 1 :]
    sign = "-" if value < 0 else ""
    right = [
        ("decimal", f"{value}.0"),
        ("unknown", f"x={value}"),
        ("about", rf"\approx {value}"),
        ("things", rf"{value}\text{{ apples}}"),
        ("unit", rf"{value}\text{{ cm}}"),
        ("fraction", rf"\frac{{{3 * value}}}{{3}}"),
        ("sum", f"{value + 7}-7"),
        ("chain", rf"x=\frac{{{2 * value}}}{{2}}={value}"),
    ]
    if abs(value) > 999:
        right += [("commas", f"{value:,}"), ("braced commas", f"{value:,}".replace(",", "{,}"))]
        right += [
            ("thin spaces", f"{value:,}".replace(",", r"\,")),
            ("tight commas", f"{value:,}".replace(",", r",\!")),
        ]
    wrong = [
        ("digit", sign + other if other != digits else f"{value}1"),
        ("sign", str(-value)),
        ("one more", str(value + 1)),
        ("a digit more", f"{value}{generator.randint(0, 9)}"),
        ("base", rf"{value}_{{{generator.choice([11, 12, 16])}}}"),
        ("power of ten", rf"{value}\times 10^{{2}}"),
        ("exponent", f"{value}e1"),
        ("false chain", f"x={value + 1}={value}"),
        *_value_changes(text, generator),
    ]
    return Made(text, right, wrong)


def _decimal(generator: random.Random) -> Made:
    places = generator.randint(1, 4)
    whole = generator.choice([generator.randint(0, 99), generator.randint(1000, 99_999)])
    last = generator.randint(1, 9)
    scaled = whole * 10**places + generator.randrange(10 ** (places - 1)) * 10 + last
    fraction = Fraction(scaled, 10**places)
    text = f"{whole}.{scaled - whole * 10**places:0{places}d}"
    right = [
        ("trailing zero", f"{text}0"),
        ("fraction", rf"\frac{{{fraction.numerator}}}{{{fraction.denominator}}}"),
        ("scientific", rf"{scaled}\times 10^{{-{places}}}"),
        ("e-notation", f"{scaled}e-{places}"),
        ("money", rf"\${text}"),
        ("about", rf"x\approx {text}"),
    ]
    if whole > 999:
        right.append(("commas", f"{whole:,}.{text.partition('.')[2]}"))
        right.append(("tight commas", rf"\${whole:,}".replace(",", r",\!") + "." + text.partition(".")[2]))
    if whole == 0:
        right.append(("no leading zero", text[1:]))
    wrong = [
        ("last digit", f"{text[:-1]}{last % 9 + 1}" if last < 9 else f"{text[:-1]}8"),
        ("sign", f"-{text}"),
        (
            "point moved",
            str(fraction * 10).partition("/")[0] if (fraction * 10).denominator == 1 else f"{whole}{text[-1]}",
        ),
        ("rounded", str(whole)),
        *_value_changes(text, generator),
    ]
    return Made(text, right, wrong)


_SINGLE = {Fraction(1, 2): "½", Fraction(1, 4): "¼", Fraction(3, 4): "¾", Fraction(2, 3): "⅔", Fraction(1, 3): "⅓"}


def _fraction(generator: random.Random) -> Made:
    value = Fraction(nonzero(generator, 60), generator.randint(2, 40))
    if value.denominator == 1:
        value += Fraction(1, 2)
    top, bottom = value.numerator, value.denominator
    sign, size = ("-" if top < 0 else ""), abs(top)
    gold = rf"{sign}\frac{{{size}}}{{{bottom}}}"
    right = [
        ("slash", f"{top}/{bottom}"),
        ("expanded", rf"\frac{{{top * 6}}}{{{bottom * 6}}}"),
        ("sign inside", rf"\frac{{{top}}}{{{bottom}}}"),
        ("unknown", rf"P={gold}"),
        ("decimal", f"{float(value):.12f}"),
        ("decimal chain", rf"{gold}\approx {float(value):.4f}"),
        ("spaced", rf"{sign}\frac {{{size}}} {{{bottom}}}"),
    ]
    if size < 10 and bottom < 10:
        right.append(("no braces", rf"{sign}\frac{size}{bottom}"))
    if abs(value) in _SINGLE:
        right.append(("one character", sign + _SINGLE[abs(value)]))
    if size > bottom:
        right.append(("mixed", rf"{sign}{size // bottom}\frac{{{size % bottom}}}{{{bottom}}}"))
    wrong = [
        ("upside down", f"{sign}{bottom}/{size}" if size != bottom else "7"),
        ("sign", rf"{'' if sign else '-'}\frac{{{size}}}{{{bottom}}}"),
        ("numerator", rf"\frac{{{top + 1}}}{{{bottom}}}"),
        ("denominator", rf"\frac{{{top}}}{{{bottom + 1}}}"),
        ("two digits", f"{float(value) + 0.017:.2f}"),
        ("numerator alone", str(top)),
        *_value_changes(gold, generator),
    ]
    return Made(gold, right, wrong)


def _radical(generator: random.Random) -> Made:
    factor, radicand = generator.randint(1, 9), generator.choice([2, 3, 5, 6, 7, 10, 11, 13, 17])
    lead = "" if factor == 1 else str(factor)
    gold = rf"{lead}\sqrt{{{radicand}}}"
    value = factor * radicand**0.5
    right = [
        ("inside", rf"\sqrt{{{factor * factor * radicand}}}"),
        ("character", f"{lead}√{radicand}"),
        ("power", rf"{factor}\cdot {radicand}^{{1/2}}"),
        ("rationalised", rf"\frac{{{factor * radicand}}}{{\sqrt{{{radicand}}}}}"),
        ("decimal", f"{value:.10f}"),
        ("decimal after it", rf"{gold}\approx {value:.2f}"),
        ("unit", rf"{gold}\text{{ cm}}"),
    ]
    wrong = [
        ("radicand", rf"{lead}\sqrt{{{radicand + 1}}}"),
        ("factor", rf"{factor + 1}\sqrt{{{radicand}}}"),
        ("sign", rf"-{gold}"),
        ("index", rf"{lead}\sqrt[3]{{{radicand}}}"),
        ("root dropped", str(factor * radicand)),
        ("coarse decimal", f"{value + 0.002:.3f}"),
        ("other decimal after it", rf"\sqrt{{{radicand + 4}}}\approx {value:.2f}"),
        ("both signs", rf"\pm {gold}"),
        ("million", rf"{gold}\text{{ million}}"),
    ]
    return Made(gold, right, wrong)


def _pi_multiple(generator: random.Random) -> Made:
    top, bottom = generator.randint(1, 30), generator.choice([2, 3, 4, 5, 7])
    value = Fraction(top, bottom)
    gold = rf"\frac{{{top}\pi}}{{{bottom}}}"
    right = [
        ("behind", rf"\frac{{{top}}}{{{bottom}}}\pi"),
        ("slash", rf"{top}\pi/{bottom}"),
        ("character", f"{top}π/{bottom}"),
        ("expanded", rf"\frac{{{2 * top}\pi}}{{{2 * bottom}}}"),
        ("unknown", rf"\theta = {gold}"),
        ("unit", rf"{gold}\text{{ cm}}^3"),
        ("product", rf"\pi\cdot\frac{{{top}}}{{{bottom}}}"),
    ]
    wrong = [
        ("no pi", rf"\frac{{{top}}}{{{bottom}}}"),
        ("numerator", rf"\frac{{{top + 1}\pi}}{{{bottom}}}"),
        ("denominator", rf"\frac{{{top}\pi}}{{{bottom + 1}}}"),
        ("square", rf"\frac{{{top}\pi^2}}{{{bottom}}}"),
        ("capital", rf"\frac{{{top}\Pi}}{{{bottom}}}"),
        ("degrees", rf"{180 * value.numerator // value.denominator}"),
        ("sign", rf"-{gold}"),
        ("coarse decimal", f"{float(value) * 3.14:.2f}"),
    ]
    return Made(gold, right, wrong)


def _scientific(generator: random.Random) -> Made:
    mantissa = generator.choice([str(generator.randint(1, 9)), f"{generator.randint(1, 9)}.{generator.randint(1, 9)}"])
    power = generator.choice([-1, 1]) * generator.randint(3, 37)
    plain = f"{mantissa}e{power}"
    latex = rf"{mantissa}\times 10^{{{power}}}"
    gold = generator.choice([plain, latex])
    tenfold = str(Fraction(mantissa) * 10)
    right = [
        ("e-notation", plain),
        ("capital E", plain.replace("e", "E")),
        ("times", latex),
        ("cdot", latex.replace(r"\times", r"\cdot")),
        ("character", latex.replace(r"\times", "×")),
        ("shifted", rf"{tenfold}\times 10^{{{power - 1}}}"),
        ("unit", rf"{latex}\text{{ m/s}}"),
    ]
    if 3 < power < 15:
        right.append(("all digits", str(Fraction(mantissa) * 10**power)))
    wrong = [
        ("exponent", rf"{mantissa}\times 10^{{{power + 1}}}"),
        ("exponent sign", rf"{mantissa}\times 10^{{{-power}}}"),
        ("mantissa", rf"{tenfold}\times 10^{{{power}}}"),
        ("sign", f"-{latex}"),
        ("product with e", f"{Fraction(mantissa) * abs(power)}e" if Fraction(mantissa).denominator == 1 else "24e"),
        ("mantissa alone", mantissa),
        ("zero", "0"),
    ]
    return Made(gold, right, wrong)


def _complex(generator: random.Random) -> Made:
    a, b = nonzero(generator, 20), nonzero(generator, 20)
    if abs(b) == 1:
        b *= 2
    gold = f"{a}{signed(b)}i"
    right = [
        ("roman", rf"{a}{signed(b)}\mathrm{{i}}"),
        ("other order", f"{b}i{signed(a)}"),
        ("factored", f"i({b}{signed(-a)}i)"),
        ("unknown", f"z={gold}"),
    ]
    wrong = [
        ("conjugate", f"{a}{signed(-b)}i"),
        ("no i", str(a + b)),
        ("real part", str(a)),
        ("other letter", f"{a}{signed(b)}j"),
        ("square", f"{a}{signed(b)}i^2"),
        ("capital", f"{a}{signed(b)}I"),
    ]
    return Made(gold, right, wrong)


def _base(generator: random.Random) -> Made:
    base = generator.randint(3, 9)
    digits = str(generator.randint(1, base - 1)) + "".join(str(generator.randrange(base)) for _ in range(2))
    gold = f"{digits}_{base}"
    value = int(digits, base)
    right = [("braced", f"{digits}_{{{base}}}"), ("brackets", f"({digits})_{base}")]
    wrong = [
        ("no base", digits),
        ("other base", f"{digits}_{{{base + 1}}}"),
        ("in base ten", str(value)),
        ("digit", f"{digits[:-1]}{(int(digits[-1]) + 1) % base}_{{{base}}}"),
        ("sign", f"-{digits}_{{{base}}}"),
    ]
    return Made(gold, right, wrong)


def _ratio(generator: random.Random) -> Made:
    a, b = generator.sample(range(2, 30), 2)
    right = [("spaced", f"{a} : {b}"), ("colon", rf"{a}\colon {b}")]
    wrong = [
        ("turned", f"{b}:{a}"),
        ("value", f"{a + 1}:{b}"),
        ("first", str(a)),
        ("list", f"{a},{b}"),
        ("three", f"{a}:{b}:{b}"),
    ]
    return Made(f"{a}:{b}", right, wrong)


def _logarithm(generator: random.Random) -> Made:
    base, argument = generator.choice([2, 3, 5, 7]), generator.choice([6, 10, 11, 13, 17])
    gold = rf"\log_{{{base}}}{argument}" if base != argument else rf"\log_{{{base}}}12"
    argument = argument if base != argument else 12
    right = [
        ("quotient", rf"\frac{{\ln {argument}}}{{\ln {base}}}"),
        ("brackets", rf"\log_{base}({argument})"),
        ("common", rf"\frac{{\log {argument}}}{{\log {base}}}"),
    ]
    wrong = [
        ("no base", rf"\log {argument}"),
        ("turned", rf"\frac{{\ln {base}}}{{\ln {argument}}}"),
        ("argument", rf"\log_{{{base}}}{argument + 1}"),
        ("base", rf"\log_{{{base + 1}}}{argument}"),
    ]
    return Made(gold, right, wrong)


SHAPES: dict[str, Callable[[random.Random], Made]] = {
    "integer": _integer,
    "decimal": _decimal,
    "fraction": _fraction,
    "radical": _radical,
    "multiple of pi": _pi_multiple,
    "scientific": _scientific,
    "complex": _complex,
    "base": _base,
    "ratio": _ratio,
    "logarithm": _logarithm,
}
