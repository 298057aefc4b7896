"""Shapes of answers with a structure: lists, intervals, expressions, equations, words, matrices."""

# ruff: noqa: RUF001  # characters that look like others are among the spellings

import random
from collections.abc import Callable

from megatron_p2o.testing.answers.record import Made, distinct, nonzero, signed


def _list(generator: random.Random) -> Made:
    values = distinct(generator, generator.randint(2, 4), generator.choice([20, 60]))
    if generator.random() < 0.3:
        values = generator.sample(range(100, 999), 2)
    gold = ", ".join(map(str, values))
    turned = values[::-1]
    extra = max(values) + generator.randint(1, 9)
    right = [
        ("other order", ", ".join(map(str, turned))),
        ("set", rf"\{{{gold}\}}"),
        ("and", r" \text{ and } ".join(map(str, values))),
        ("or", r"\text{ or }".join(f"x={value}" for value in values)),
        ("roots", ", ".join(f"x_{{{index}}}={value}" for index, value in enumerate(values, 1))),
        ("semicolons", "; ".join(f"x={value}" for value in values)),
        ("quad", r",\quad ".join(f"x={value}" for value in values)),
    ]
    joined = "".join(map(str, map(abs, values)))
    wrong = [
        ("dropped", ", ".join(map(str, values[1:]))),
        ("an extra root", f"{gold}, {extra}"),
        ("element", ", ".join(map(str, [extra, *values[1:]]))),
        ("sign", ", ".join(map(str, [-values[0], *values[1:]])) if -values[0] not in values else str(values[0])),
        ("joined", joined),
        ("last of or", rf"x={extra} \text{{ or }} x={values[-1]}"),
        ("sum", str(sum(values)) if sum(values) not in values else joined),
        ("turned tuple", f"({', '.join(map(str, turned))})"),
        ("several unknowns", ", ".join(f"{name}={value}" for name, value in zip("abcd", turned, strict=False))),
    ]
    return Made(gold, right, wrong)


def _set(generator: random.Random) -> Made:
    values = distinct(generator, generator.randint(2, 4), 15)
    gold = rf"\{{{', '.join(map(str, values))}\}}"
    right = [
        ("other order", rf"\{{{', '.join(map(str, values[::-1]))}\}}"),
        ("no braces", ", ".join(map(str, values[::-1]))),
        ("lbrace", gold.replace(r"\{", r"\lbrace ").replace(r"\}", r" \rbrace")),
        ("element of", rf"x\in {gold}"),
        ("halves", rf"\{{{', '.join(f'{2 * value}/2' for value in values)}\}}"),
    ]
    wrong = [
        ("dropped", rf"\{{{', '.join(map(str, values[1:]))}\}}"),
        ("extra", rf"\{{{', '.join(map(str, [*values, 77]))}\}}"),
        ("element", rf"\{{{', '.join(map(str, [78, *values[1:]]))}\}}"),
        ("tuple", f"({', '.join(map(str, values))})"),
        ("one", str(values[0])),
    ]
    return Made(gold, right, wrong)


def _tuple(generator: random.Random) -> Made:
    values = distinct(generator, generator.randint(2, 3), 30)
    parts = [str(value) for value in values]
    if generator.random() < 0.4:
        parts[-1] = rf"\frac{{{abs(values[-1])}\pi}}{{7}}"
    gold = f"({', '.join(parts)})"
    right = [
        ("tight", f"({','.join(parts)})"),
        ("no brackets", ", ".join(parts)),
        ("point", f"(x,y)={gold}" if len(parts) == 2 else gold),
        ("unknowns", ", ".join(f"{name}={part}" for name, part in zip("xyz", parts, strict=False))),
        ("angle brackets", rf"\langle {', '.join(parts)}\rangle"),
    ]
    turned = parts[1:] + parts[:1]
    wrong = [
        ("order", f"({', '.join(turned)})"),
        ("order of unknowns", ", ".join(f"{name}={part}" for name, part in zip("xyz", turned, strict=False))),
        ("dropped", f"({', '.join(parts[1:])})"),
        ("extra", f"({', '.join([*parts, '5'])})"),
        ("element", f"({', '.join(['77', *parts[1:]])})"),
        ("sign", f"({', '.join([str(-values[0]), *parts[1:]])})"),
        ("set", rf"\{{{', '.join(parts)}\}}"),
        ("square bracket", f"[{', '.join(parts)})"),
    ]
    return Made(gold, right, wrong)


def _interval(generator: random.Random) -> Made:
    low = generator.randint(-20, 10)
    high = low + generator.randint(1, 20)
    strict, loose = "<", r"\le"
    left, right_bracket = generator.choice("(["), generator.choice(")]")
    gold = f"{left}{low},{high}{right_bracket}"
    signs = {"(": strict, "[": loose}[left], {")": strict, "]": loose}[right_bracket]
    mirrored = [{strict: ">", loose: r"\ge"}[sign] for sign in signs]
    other_sign = loose if signs[1] == strict else strict
    other_left = {"(": "[", "[": "("}[left]
    other_right = {")": "]", "]": ")"}[right_bracket]
    right = [
        ("spaced", f"{left} {low} , {high} {right_bracket}"),
        ("element of", rf"x\in {gold}"),
        ("inequality", f"{low}{signs[0]} x{signs[1]} {high}"),
        ("turned inequality", f"{high}{mirrored[1]} x{mirrored[0]} {low}"),
        ("leq", f"{low}{signs[0]} x{signs[1]} {high}".replace(r"\le", r"\leq ")),
    ]
    wrong = [
        ("left bracket", f"{other_left}{low},{high}{right_bracket}"),
        ("right bracket", f"{left}{low},{high}{other_right}"),
        ("end", f"{left}{low},{high + 1}{right_bracket}"),
        ("half", f"x{signs[1]} {high}"),
        ("strictness", f"{low}{signs[0]} x{other_sign} {high}"),
        ("infinite", rf"{left}{low},\infty)"),
        ("union", rf"{gold}\cup[{high + 3},{high + 5}]"),
        ("one end", str(high)),
    ]
    return Made(gold, right, wrong)


def _union(generator: random.Random) -> Made:
    low = generator.randint(-9, 5)
    high = low + generator.randint(1, 9)
    gold = rf"(-\infty,{low})\cup({high},\infty)"
    right = [
        ("other order", rf"({high},\infty)\cup(-\infty,{low})"),
        ("spaced", rf"(-\infty, {low}) \cup ({high}, +\infty)"),
        ("inequalities", rf"x<{low} \text{{ or }} x>{high}"),
        ("element of", rf"x\in {gold}"),
        ("character", f"(-∞,{low})∪({high},∞)"),
    ]
    wrong = [
        ("closed", rf"(-\infty,{low}]\cup({high},\infty)"),
        ("end", rf"(-\infty,{low})\cup({high + 1},\infty)"),
        ("one part", rf"({high},\infty)"),
        ("complement", rf"({low},{high})"),
        ("intersection", rf"(-\infty,{low})\cap({high},\infty)"),
        ("list", rf"(-\infty,{low}),({high},\infty)"),
        ("other inequality", rf"x<{low} \text{{ or }} x\ge {high}"),
    ]
    return Made(gold, right, wrong)


def _polynomial(generator: random.Random) -> Made:
    a, b = distinct(generator, 2, 12)
    x = generator.choice("xntX")
    gold = f"{x}^2{signed(a + b)}{x}{signed(a * b)}"
    right = [
        ("factors", f"({x}{signed(a)})({x}{signed(b)})"),
        ("nested", f"{x}({x}{signed(a + b)}){signed(a * b)}"),
        ("other order", f"{a * b}{signed(a + b)}{x}+{x}^{{2}}"),
        ("function", f"f({x})={gold}" if x != "n" else f"a_n={gold}"),
        ("doubled", rf"\frac{{2{x}^2{signed(2 * (a + b))}{x}{signed(2 * a * b)}}}{{2}}"),
    ]
    other = x.swapcase()
    wrong = [
        ("constant", f"{x}^2{signed(a + b)}{x}{signed(a * b + 1)}"),
        ("coefficient", f"{x}^2{signed(a + b + 1)}{x}{signed(a * b)}"),
        ("exponent", f"{x}^3{signed(a + b)}{x}{signed(a * b)}"),
        ("sign", f"{x}^2{signed(-a - b)}{x}{signed(a * b)}" if a + b else f"-{x}^2{signed(a * b)}"),
        ("case", f"{other}^2{signed(a + b)}{other}{signed(a * b)}" if a + b else f"{other}^2{signed(a * b)}"),
        ("one case", f"{other}^2{signed(a + b)}{x}{signed(a * b)}"),
        ("term dropped", f"{x}^2{signed(a * b)}" if a + b else f"{x}^2"),
        ("equation", f"{gold}=0"),
        ("prime", f"{x}'^2{signed(a + b)}{x}{signed(a * b)}"),
    ]
    return Made(gold, right, wrong)


_FORMULAS = [
    (
        r"\frac{m}{m+M}",
        [r"\frac{1}{1+\frac{M}{m}}", r"\frac{m}{M+m}", "m/(m+M)"],
        [r"\frac{M}{m+M}", r"\frac{m}{2m}", "1"],
    ),
    (r"\frac{r}{R}", ["r/R", r"rR^{-1}"], ["1", r"\frac{R}{r}", r"\frac{r}{r}"]),
    (
        r"\frac{GMm}{r^2}",
        [r"\frac{GmM}{r^{2}}", r"GMm r^{-2}"],
        [r"\frac{GMm}{R^2}", r"\frac{GM^2}{r^2}", r"\frac{gMm}{r^2}"],
    ),
    (r"mc^2(\gamma-1)", [r"(\gamma-1)mc^2", r"\gamma mc^{2}-mc^2"], [r"mc^2(\gamma-2)", "mc^2", r"mc^2(\Gamma-1)"]),
    (r"\pi(R^2-r^2)", [r"\pi R^2-\pi r^2", r"\pi(R-r)(R+r)"], ["0", r"\pi(r^2-R^2)", r"\pi(R^2-R^2)"]),
    (r"\sqrt{2gh}", [r"(2gh)^{1/2}", r"\sqrt{2}\sqrt{gh}"], [r"\sqrt{2gH}", r"\sqrt{2Gh}", r"\sqrt{gh}"]),
    (
        r"\frac{V_0}{R}e^{-t/(RC)}",
        [r"\frac{V_{0}}{R}e^{-\frac{t}{RC}}", r"\frac{V_0 e^{-t/(RC)}}{R}"],
        [r"\frac{V_1}{R}e^{-t/(RC)}", r"\frac{V_0}{R}e^{t/(RC)}", r"\frac{v_0}{R}e^{-t/(RC)}"],
    ),
    (
        r"\sin^2\theta",
        [r"1-\cos^2\theta", r"(\sin\theta)^2", r"\frac{1-\cos 2\theta}{2}"],
        [r"\sin^2\Theta", r"\cos^2\theta", r"\sin\theta^2"],
    ),
    (
        r"\frac{n(n+1)}{2}",
        [r"\frac{n^2+n}{2}", r"\binom{n+1}{2}"],
        [r"\frac{N(N+1)}{2}", r"\frac{n(n-1)}{2}", r"\frac{n(N+1)}{2}"],
    ),
    (r"|x|", [r"\left|x\right|", r"\sqrt{x^2}"], ["x", "-x", "|X|"]),
    (
        r"\ln\frac{a}{b}",
        [r"\ln a-\ln b", r"\ln(a/b)", r"-\ln\frac{b}{a}"],
        [r"\ln\frac{b}{a}", r"\ln\frac{A}{b}", r"\log\frac{a}{b}"],
    ),
    (r"f'(x)", [r"f^{\prime}(x)"], ["f(x)", "f''(x)", "F'(x)"]),
    (r"x_1+x_2", [r"x_{2}+x_{1}"], ["2x", "x_1+x_1", "X_1+x_2"]),
    (r"kT\ln 2", [r"Tk\ln 2"], [r"Kt\ln 2", r"kt\ln 2", "0.69kT"]),
    (r"2^{n+1}-1", [r"2\cdot 2^n-1"], [r"2^{n}-1", r"2^{N+1}-1", r"2^{n+1}"]),
]


def _formula(generator: random.Random) -> Made:
    gold, right, wrong = generator.choice(_FORMULAS)
    factor = generator.randint(2, 9)
    return Made(
        gold,
        [*(("other form", text) for text in right), ("twice over", rf"\frac{{{factor}({gold})}}{{{factor}}}")],
        [*(("other formula", text) for text in wrong), ("factor", f"{factor}({gold})"), ("sign", f"-({gold})")],
    )


def _equation(generator: random.Random) -> Made:
    a, b = generator.randint(2, 9), nonzero(generator, 9)
    gold = f"y={a}x{signed(b)}"
    right = [
        ("other order", f"y={b}+{a}x"),
        ("right side alone", f"{a}x{signed(b)}"),
        ("all on one side", f"y-{a}x{signed(-b)}=0"),
        ("doubled", f"2y={2 * a}x{signed(2 * b)}"),
        ("turned", f"{a}x{signed(b)}=y"),
    ]
    wrong = [
        ("prime", f"y'={a}x{signed(b)}"),
        ("slope", f"y={a + 1}x{signed(b)}"),
        ("intercept", f"y={a}x{signed(b + 1)}"),
        ("sign", f"y=-{a}x{signed(b)}"),
        ("unknown", f"z={a}x{signed(b)}"),
        ("case", f"Y={a}x{signed(b)}"),
        ("inequality", f"y<{a}x{signed(b)}"),
        ("not equal", rf"y\neq {a}x{signed(b)}"),
        ("constant", str(b)),
    ]
    return Made(gold, right, wrong)


def _derivative(generator: random.Random) -> Made:
    a, b = generator.randint(2, 9), generator.randint(1, 9)
    gold = rf"\frac{{dx}}{{dt}}={a}x-{b}"
    right = [("other order", rf"\frac{{dx}}{{dt}}=-{b}+{a}x"), ("zero", rf"\frac{{dx}}{{dt}}-{a}x+{b}=0")]
    wrong = [
        ("sign", rf"\frac{{dx}}{{dt}}={b}-{a}x"),
        ("turned", rf"\frac{{dt}}{{dx}}={a}x-{b}"),
        ("zero", f"0={a}x-{b}"),
        ("factor", rf"5\frac{{dx}}{{dt}}={a}x-{b}"),
        ("second", rf"\frac{{d^2x}}{{dt^2}}={a}x-{b}"),
        ("no derivative", f"x={a}x-{b}"),
    ]
    return Made(gold, right, wrong)


_PHRASES = ["no solution", "infinitely many", "always true", "Friday", "isosceles", "converges", "Evelyn", "yes"]


def _words(generator: random.Random) -> Made:
    phrase = generator.choice(_PHRASES)
    gold = generator.choice([phrase, rf"\text{{{phrase}}}"])
    others = [other for other in _PHRASES if other != phrase]
    right = [("text", rf"\text{{{phrase}}}"), ("bare", phrase), ("capital", rf"\text{{{phrase.capitalize()}}}")]
    right.append(("bold", rf"\textbf{{{phrase}}}"))
    wrong = [("words", rf"\text{{{generator.choice(others)}}}"), ("not", rf"\text{{not {phrase}}}")]
    wrong += [("letter", rf"\text{{{phrase[:-1]}}}"), ("number", "0"), ("both", rf"\text{{{phrase} or not}}")]
    return Made(gold, right, wrong)


def _choice(generator: random.Random) -> Made:
    letter, other = generator.sample("ABCD", 2)
    gold = generator.choice([letter, rf"\text{{{letter}}}", rf"\textbf{{({letter})}}", f"({letter})"])
    right = [
        ("bare", letter),
        ("brackets", f"({letter})"),
        ("text", rf"\text{{({letter})}}"),
        ("bold", rf"\mathbf{{{letter}}}"),
    ]
    wrong = [
        ("other", other),
        ("both", f"{letter}, {other}"),
        ("case", letter.lower()),
        ("or", rf"\text{{{letter} or {other}}}"),
    ]
    return Made(gold, right, [*wrong, ("and", rf"{letter} \text{{ and }} {other}")])


def _matrix(generator: random.Random) -> Made:
    a, b, c, d = distinct(generator, 4, 20)

    def spelled(rows: list[list[int]], kind: str = "pmatrix", gap: str = "") -> str:
        body = rf"{gap}\\{gap}".join(f"{gap}&{gap}".join(map(str, row)) for row in rows)
        return rf"\begin{{{kind}}}{gap}{body}{gap}\end{{{kind}}}"

    rows = [[a, b], [c, d]]
    gold = spelled(rows)
    right = [("square", spelled(rows, "bmatrix")), ("spaced", spelled(rows, gap=" ")), ("name", f"A={gold}")]
    wrong = [
        ("element", spelled([[a, b], [c, d + 1]])),
        ("sign", spelled([[-a, b], [c, d]])),
        ("transposed", spelled([[a, c], [b, d]])),
        ("rows", spelled([[c, d], [a, b]])),
        ("row dropped", spelled([[a, b]])),
        ("list", f"{a},{b},{c},{d}"),
    ]
    return Made(gold, right, wrong)


def _plus_minus(generator: random.Random) -> Made:
    a, b = generator.randint(1, 20), generator.choice([2, 3, 5, 7, 11])
    gold = rf"{a}\pm\sqrt{{{b}}}"
    right = [
        ("list", rf"{a}+\sqrt{{{b}}}, {a}-\sqrt{{{b}}}"),
        ("unknown", rf"x={a}\pm\sqrt{{{b}}}"),
        ("or", rf"x={a}-\sqrt{{{b}}} \text{{ or }} x={a}+\sqrt{{{b}}}"),
        ("character", f"{a} ± √{b}"),
    ]
    wrong = [
        ("plus", rf"{a}+\sqrt{{{b}}}"),
        ("minus", rf"{a}-\sqrt{{{b}}}"),
        ("radicand", rf"{a}\pm\sqrt{{{b + 1}}}"),
        ("first term", rf"{a + 1}\pm\sqrt{{{b}}}"),
        ("twice plus", rf"{a}+\sqrt{{{b}}}, {a}+\sqrt{{{b}}}"),
    ]
    return Made(gold, right, wrong)


def _assignments(generator: random.Random) -> Made:
    first, second = distinct(generator, 2, 30)
    gold = f"x={first}, y={second}"
    right = [
        ("turned", f"y={second}, x={first}"),
        ("point", f"({first},{second})"),
        ("and", rf"x={first} \text{{ and }} y={second}"),
        ("points", f"(x,y)=({first},{second})"),
    ]
    wrong = [
        ("swapped", f"x={second}, y={first}"),
        ("swapped point", f"({second},{first})"),
        ("one", f"y={second}"),
        ("case", f"X={first}, Y={second}"),
        ("value", f"x={first + 1}, y={second}"),
    ]
    return Made(gold, right, wrong)


SHAPES: dict[str, Callable[[random.Random], Made]] = {
    "list": _list,
    "set": _set,
    "tuple": _tuple,
    "interval": _interval,
    "union": _union,
    "polynomial": _polynomial,
    "formula": _formula,
    "equation": _equation,
    "derivative": _derivative,
    "words": _words,
    "choice": _choice,
    "matrix": _matrix,
    "plus minus": _plus_minus,
    "assignments": _assignments,
}
