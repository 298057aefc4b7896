"""Writes answers with one spelling: characters, fonts, spaces, brackets, thousands."""

# ruff: noqa: RUF001  # characters that look like others are the subject

import re

from megatron_p2o.rewards.math.reading.latex import closing_brace

_GREEK_LETTERS = "αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩ"
_GREEK_NAMES = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi psi "
    "omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega"
)
_CHARACTERS = {
    **{letter: rf"\{name} " for letter, name in zip(_GREEK_LETTERS, _GREEK_NAMES.split(), strict=True)},
    **{
        "µ": r"\mu ",
        "\u2212": "-",
        "\u2013": "-",
        "×": r"\times ",
        "·": r"\cdot ",
        "⋅": r"\cdot ",
        "÷": r"\div ",
        "°": r"\degree ",
    },
    **{"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∞": r"\infty ", "±": r"\pm ", "∓": r"\mp "},
    **{"Ω": r"\Omega ", "⁄": "/", "…": r"\ldots "},
    **{"∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "√": r"\sqrt "},
    **{"½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}"},
    **{"⅕": r"\frac{1}{5}", "⅙": r"\frac{1}{6}", "⅛": r"\frac{1}{8}", "⅜": r"\frac{3}{8}", "⅝": r"\frac{5}{8}"},
    **{"⅖": r"\frac{2}{5}", "⅗": r"\frac{3}{5}", "⅘": r"\frac{4}{5}", "⅚": r"\frac{5}{6}", "⅞": r"\frac{7}{8}"},
    **{"′": "'", "″": "''", "’": "'", "，": ",", "∨": r"\lor ", "∧": r"\land ", "→": r"\to ", "∂": r"\partial "},
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", ""),
    **{"\u00a0": " ", "\u2009": " ", "\u202f": " "},
}
_TRANSLATION = str.maketrans(_CHARACTERS)

_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")
_RAISED_DIGITS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_LOWERED_DIGITS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_UNBRACED_ROOT = re.compile(r"√\s*(\d+(?:\.\d+)?)")

_FUNCTIONS = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log lg exp gcd lcm max min det lim sqrt"
_END = r"(?![A-Za-z])"
_TEXT_FONTS = "text|textbf|textit|textrm|textnormal|textsf|texttt|textup|mbox|hbox|emph|mathrm|operatorname\\*?|rm"
_MATH_FONTS = "mathbf|boldsymbol|bm|mathit|mathsf|mathtt|mathnormal|pmb"
_FONT = re.compile(rf"\\(?P<name>{_TEXT_FONTS}|{_MATH_FONTS})\s*\{{")
_ONLY_TEXT = re.compile(r"[A-Za-z\s.,;:'!?&/()°%$~-]*")

LIST_SEPARATOR = "\x01"
"""Stands between parts of a list where that is certain: `81, 256`."""

AND, OR = "\x02", "\x03"
"""Stand for the words, between parts of a list or conditions."""

_UNITS = re.compile(r"\s*[A-Za-z]+(?:\^-?\d)?(?:[\s/]+[A-Za-z]+(?:\^-?\d)?)+\s*|\s*[A-Za-z]{2,}\^-?\d\s*")
"""Several units with their exponents in \\mathrm."""

_QUANTITIES_IN_WORDS = re.compile(r"\s*(?:\d[\d.,]*(?: [A-Za-z/]+)+\s*)+")
_PERCENT = "(?:percent(?:age)?|per cent|pct)"
_GROUP = r"(?<![\d.,])([1-9]\d{0,2}(?:SEPARATOR\d{3})+)(?!\d)(?!SEPARATOR\d)"
_CERTAIN_GROUPS = [
    (re.compile(_GROUP.replace("SEPARATOR", re.escape(separator))), separator) for separator in ("{,}", r"\,")
]
_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<=\d)(?:\\[,;: ]|~|\s|\\text\{ \})+(?:\\text\{)?([kM]?)\}?\\Omega\s*$", r"\\text{\1ohm}"),
        (r",\\!\s*", "{,}"),
        (r"\\!", ""),
        (r"\\[()\[\]]|(?<!\\)\$", " "),
        (rf"\\(?:left|right)\s*\.|\\(?:display|text|script)style{_END}", ""),
        (rf"\\(?:left|right|middle|[bB]igg?[lrm]?|limits|nolimits){_END}", ""),
        (rf"\\(?:lbrace){_END}", r"\\{"),
        (rf"\\(?:rbrace){_END}", r"\\}"),
        (rf"\\(?:langle|lparen){_END}", "("),
        (rf"\\(?:rangle|rparen){_END}", ")"),
        (rf"\\(?:[lr]?vert|mid){_END}", "|"),
        (rf"\\[lr]?Vert{_END}|(?<!\|)\|\|(?=[^|]*\|\|$)|(?<=[^|])\|\|$", r"\\|"),
        (rf"\\(?:text)?color\{{(?!white)[a-z]+\}}|\\(?:bf|it|bfseries|[lL]arge|LARGE|[hH]uge){_END}", ""),
        (rf"\s*\\checkmark{_END}\s*$|^\*\*(?=.*\*\*$)|(?<=\w)\*\*$", ""),
        (r"(?<=\d)(?:\^?\{?\\text\{(?:st|nd|rd|th)\}\}?|\^\{(?:st|nd|rd|th)\}|(?:st|nd|rd|th))$", ""),
        (rf"\\[dtc]frac{_END}", r"\\frac"),
        (r"\*\*(-?\w+)", r"^{\1}"),
        (r"\*\*(?=[({])", "^"),
        (r"(?<=\d) x (?=10\^)", r"\\times "),
        (rf"^\\(?:therefore|Rightarrow|implies){_END}|\\(?:small|footnotesize|mathsf|ensuremath|unboldmath){_END}", ""),
        (r"^\s*\\underline\{([^{}]*)\}\s*$|^\s*[\"`*]([^\"`*]*)[\"`*]\s*$", r"\1\2"),
        (r"\\text\{\s*\\?\$\s*\}|\{\\\$\}|^USD ?(?=\d)", r"\\$"),
        (r"(?<=\d)¢", r"\\text{ cents}"),
        (rf"\\(?:dots|cdots|dotsc){_END}", r"\\ldots "),
        (rf"\\([RZNQC]){_END}", r"\\mathbb{\1}"),
        (r"\\mathcal\{O\}", "O"),
        (
            rf"\s*\(?\s*\\(?:p?mod|bmod){_END}\s*(?:\{{(\w+)\}}|(\w+))\s*\)?|"
            r"(?:\\?\s)*\(\s*(?:\\text\{\s*)?mod(?:ulo)?\s*\}?\s*(\d+)\s*\)",
            r"\\pmod{\1\2\3}",
        ),
        (r"\\text\{\s*([A-Za-z]+),? and\s*\}(?=\d)", r"\\text{\1}"),
        (rf"\{{([^{{}}]*)\\over{_END}([^{{}}]*)\}}", r"\\frac{\1}{\2}"),
        (rf"\^\s*(?:\{{\s*\\circ\s*\}}|\\circ{_END})|\^\s*\\degree{_END}", r"\\degree "),
        (rf"\^\s*(?:\{{\s*\\prime\s*\}}|\\prime{_END})", "'"),
        (rf"\\text\{{\s*{_PERCENT}\s*\}}|(?<=[\d}}]) ?{_PERCENT}{_END}|(?<!\\)%", r"\\%"),
        (r"\\text\{[\s,]*and[\s,]*\}|(?<=[^A-Za-z\s]) *\band\b *", AND),
        (r"\\text\{[\s,]*or[\s,]*\}|(?<=[^A-Za-z\s]) *\bor\b *", OR),
        (r"(?<![\d.,])(\d{1,3}),\s+(?=\d{3}(?!\d))", "\\1\x01"),
        (r"\bd([a-z])/d([a-z])\b", r"\\frac{d\1}{d\2}"),
        (r"\\[,;:> ]|~|\\(?:thinspace|enspace|hspace\{[^{}]*\}|hfill)(?![A-Za-z])", " "),
        (rf"\\not\s*\\in{_END}", r"\\notin "),
        (rf"\\neq{_END}|!=|\\not\s*=", r"\\ne "),
        (rf"\\leq(?:slant)?{_END}|<=", r"\\le "),
        (rf"\\geq(?:slant)?{_END}|>=", r"\\ge "),
        (rf"\\colon{_END}", ":"),
        (rf"\\lt{_END}", "<"),
        (rf"\\gt{_END}", ">"),
        (r"(?<![\d.,/])(\d+) (\d+)/(\d+)(?![\d/])", r"\1\\frac{\2}{\3}"),
        (rf"\\varnothing{_END}|\\\{{\s*\\\}}", r"\\emptyset "),
        (r"(?<=[\d}]) *\\mu *\\text\{([A-Za-z]+)\}", r"\\text{u\1}"),
        (r"\{\}", ""),
        (rf"\^\s*(?:\{{\s*\\(?:top|intercal)\s*\}}|\\(?:top|intercal){_END})", "^T"),
        (rf"\\wedge{_END}", r"\\land "),
        (rf"\\vee{_END}", r"\\lor "),
        (r"\s+", " "),
        (r"(?<=[^\w]) | (?=[^\w])", ""),
        (r"[,\x01]*([\x01-\x03])[,\x01-\x03]*", r"\1"),
    )
)
"""Spellings that do not change an answer; `;` separates the parts of a list for certain.

A space stays between two word characters: `12 45` is not `1245`."""

_AXIS = rf"(?:\\([ij])math{_END}|([ijk])(?![A-Za-z]))"
_BOLD = r"\\(?:mathbf|boldsymbol|bm)\s*"
_UNIT_VECTOR = re.compile(
    rf"\\(?:wide)?hat\s*\{{\s*{_BOLD}\{{\s*{_AXIS}\s*\}}\s*\}}|"
    rf"(?:\\(?:(?:wide)?hat|vec)\s*|{_BOLD})(?:\{{\s*{_AXIS}\s*\}}|(?<!\w){_AXIS})"
)
"""A unit vector along an axis; alone, `\\mathbf{i}` may be anything."""

_ROW_END = re.compile(r"\\\\\s*\[[\d.]+ ?[a-z]{2}\]")
_NUMBER_WORDS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_BASE_IN_WORDS = re.compile(rf"(?<=\d)_\{{?(?:\\text\{{)?({'|'.join(_NUMBER_WORDS)})\}}*$")
_DOUBLED = re.compile(
    r"\\\\(?=(?:left|right|[dt]?frac|sqrt|pi|le|ge|leq|geq|text|in|cup|infty|cdot|times)(?![A-Za-z]))"
)
"""A backslash that was escaped once too often; other double backslashes end a line."""

_SYSTEM = re.compile(r"\\begin\{(cases|aligned)\}([^&]*)\\end\{\1\}")
"""Equations below one another."""

_PLAIN_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")
"""Most answers: in normal form already."""

_CONNECTIVES = ((re.compile(rf"\\land{_END}"), AND), (re.compile(rf"\\lor{_END}"), OR))
"""Signs between conditions or numbers; between letters they are an operation: p and q, dx wedge dy."""

_CONDITION = re.compile(rf"[=<>]|\\(?:ne|[lg]eq?|in){_END}")
_QUAD = re.compile(rf"\\q?quad{_END}")
_EQUALS = re.compile(r"(?<![<>!:])=")


def normal_form(text: str) -> str:
    """Return an answer with one spelling of characters, fonts, spaces, fractions and brackets, without a full stop.

    Fonts that say nothing are gone; words stay in \\text. Thousands are joined where the spelling leaves no doubt;
    what `1,234` means is left open.
    """
    if _PLAIN_NUMBER.fullmatch(text):
        return text
    if not text.isascii():
        text = _ascii(text)
    if "\\" in text or "$" in text:
        text = _without_fonts(_with_unit_vectors(_ROW_END.sub(r"\\\\", text)))
        text = _BASE_IN_WORDS.sub(lambda found: f"_{2 + _NUMBER_WORDS.index(found[1])}", text)
        separator = LIST_SEPARATOR if len(_EQUALS.findall(text)) > 1 else " "
        text = _QUAD.sub(separator, text)
        text = _SYSTEM.sub(lambda found: found[2].replace(r"\\", LIST_SEPARATOR), text)
        if r"\begin" in text:
            # A double backslash ends a row of a matrix: its second half does not belong to what follows.
            return _bare(r"\\".join(_rewritten(row) for row in text.split(r"\\")))
        text = _DOUBLED.sub(r"\\", text).replace(r"\\", separator)
    return _bare(_rewritten(text))


def _bare(text: str) -> str:
    """Return `text` without a full stop and without braces around all of it."""
    text = text.strip().removesuffix(".").strip()
    while text.startswith("{") and closing_brace(text, 1) == len(text) - 1:
        text = text[1:-1].strip()
    return text


def _with_unit_vectors(text: str) -> str:
    """Return `text` with one spelling of the vectors i, j, k where at least two of them stand."""
    if len({_axis(found) for found in _UNIT_VECTOR.finditer(text)}) < 2:
        return text
    return _UNIT_VECTOR.sub(lambda found: rf"\hat{{{_axis(found)}}}", text)


def _axis(found: re.Match[str]) -> str:
    return next(letter for letter in found.groups() if letter)


def _ascii(text: str) -> str:
    text = _RAISED.sub(lambda found: f"^{{{found.group().translate(_RAISED_DIGITS)}}}", text)
    text = _LOWERED.sub(lambda found: f"_{{{found.group().translate(_LOWERED_DIGITS)}}}", text)
    return _UNBRACED_ROOT.sub(r"\\sqrt{\1}", text).translate(_TRANSLATION)


def _rewritten(text: str) -> str:
    for pattern, separator in _CERTAIN_GROUPS:
        text = pattern.sub(lambda found, separator=separator: found[1].replace(separator, ""), text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    if _CONDITION.search(text) or not re.search(r"(?<![\\A-Za-z])[A-Za-z]", text):
        for pattern, replacement in _CONNECTIVES:
            text = pattern.sub(replacement, text)
    for pattern, separator in _CERTAIN_GROUPS[:1]:
        text = pattern.sub(lambda found, separator=separator: found[1].replace(separator, ""), text)
    return re.sub(r"(?<=\d)\{,\}(?=\d)", ".", text).replace("{,}", ",").strip(" ;\x01\x02\x03")


def _without_fonts(text: str) -> str:
    r"""Return `text` with words in \text, functions as commands, and everything else out of its font."""
    parts: list[str] = []
    start = 0
    while found := _FONT.search(text, start):
        end = closing_brace(text, found.end())
        if end is None:
            break
        content = text[found.end() : end]
        parts += text[start : found.start()], _out_of_font(found["name"], content)
        start = end + 1
    return "".join([*parts, text[start:]])


def _out_of_font(font: str, content: str) -> str:
    name = content.strip()
    if name in _FUNCTIONS.split() and not font.startswith("text"):
        return rf"\{name} "
    if name in ("i", "e") and not font.startswith("text"):
        return f" {name}"
    is_text = re.fullmatch(_TEXT_FONTS, font) and _ONLY_TEXT.fullmatch(content)
    if is_text and re.search("[A-Za-z]", content):
        return rf"\text{{{' '.join(content.replace('~', ' ').split())}}}"
    if re.fullmatch(_TEXT_FONTS, font) and _QUANTITIES_IN_WORDS.fullmatch(content):
        return re.sub("[A-Za-z][A-Za-z /]*", lambda found: rf"\text{{{found.group().strip()}}}", content.strip())
    unit = re.sub(r"\^\{?(-?\d)\}?", r"^\1", re.sub(r"\\[,;: ]|~|\\cdot", " ", content))
    if font == "mathrm" and _UNITS.fullmatch(unit):
        return rf"\text{{{' '.join(unit.split())}}}"
    return "{" + _without_fonts(content) + "}" if len(name) > 1 else f" {name}"
