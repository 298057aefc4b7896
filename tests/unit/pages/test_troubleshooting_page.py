"""docs/troubleshooting.md quotes messages that the program writes."""

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")

HOLE = None
"""In the text of a message: something that is filled in."""

Text = Sequence[str | None]
"""A message, character by character."""

FILLED = re.compile(r"%(?:\(\w+\))?[-+ #0-9.]*[a-zA-Z]|\{[^{}]*\}")
"""What `%` and `format` fill in later."""

MIN_SAID = 0.8
"""Share of a quotation's characters that stand in the code: numbers and names are filled in, words are not."""


def text_of(node: ast.AST) -> list[str | None]:
    """Return the text that an expression makes: strings that follow or are added to one another are one message."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        parts = re.split(f"({FILLED.pattern})", node.value)
        return [each for place, part in enumerate(parts) for each in ([HOLE] if place % 2 else part)]
    if isinstance(node, ast.JoinedStr):
        parts = [list(part.value) if isinstance(part, ast.Constant) else [HOLE] for part in node.values]
        return [each for part in parts for each in part]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [*text_of(node.left), *text_of(node.right)]
    return [HOLE]


def texts(source: str) -> Iterator[list[str | None]]:
    """Yield every text of a module, its docstrings left out."""
    tree = ast.parse(source)
    described = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp) and id(node) not in described:
            text = text_of(node)
            if any(text):
                yield text


def is_said(quotation: str, text: Text) -> bool:
    """Return whether a message can contain the quotation, in which "..." stands for anything."""
    said = dict.fromkeys(range(len(text) + 1), 0)  # places that may come next: characters found on the way
    spoken = [list(part) for part in quotation.split("...")]
    for number, part in enumerate(spoken):
        if number > 0 and said:
            said = {
                place: max(said[each] for each in said if each <= place) for place in range(min(said), len(text) + 1)
            }
        for character in part:
            said = _after(character, said, text)
    return bool(said) and max(said.values()) >= MIN_SAID * sum(len(part) for part in spoken)


def _after(character: str, said: dict[int, int], text: Text) -> dict[int, int]:
    """Return the places after one more character of the quotation, which a hole takes or the text says."""
    found: dict[int, int] = {}
    for start, count in said.items():
        place = start
        while place < len(text) and text[place] is HOLE:
            found[place] = max(found.get(place, 0), count)
            place += 1
        if place < len(text) and text[place] == character:
            found[place + 1] = max(found.get(place + 1, 0), count + 1)
    return found


def quotations(page: str) -> list[str]:
    """Return what the first column of the page's tables quotes: words in a row, no settings or commands."""
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| ")]
    quoted = [first or second for cell in cells for first, second in re.findall(r'"([^"]+)"|`([^`]+)`', cell)]
    return [each for each in quoted if " " in each and not re.match(r"p2o |[\w.]+: \S+$", each)]


MESSAGES = [
    text
    for path in sorted((ROOT / "megatron_p2o").rglob("*.py"))
    for text in texts(path.read_text(encoding="utf-8"))
    if len(text) > 12
]


def test_a_message_is_found_across_lines_and_placeholders() -> None:
    source = (
        '"""a waits for b in this docstring."""\n'
        'raise ValueError(f"no gradient of the last {N} steps " "was " f"finite: {hint}" + " try again")\n'
        'logger.warning("engine %d was given up on after %.1f s", 1, 2)\n'
    )
    found = list(texts(source))

    def says(quotation: str) -> bool:
        return any(is_said(quotation, text) for text in found)

    assert says("no gradient of the last 3 steps was finite") and says("no gradient ... try again")
    assert says("engine 1 was given up on after 2.0 s") and says("... was given up on after ...")
    assert not says("no gradient of the last 3 steps is finite") and not says("finite: or something else entirely")
    assert not says("try again ... no gradient") and not says("a waits for b in this docstring")


def test_the_page_quotes_messages() -> None:
    assert len(quotations(PAGE)) >= 10
    assert quotations('| S |\n|-|\n| "a ..." (`b.c: d`) | "c d" |\n| `e f` or `g` |\n') == ["a ...", "e f"]


@pytest.mark.parametrize("quotation", quotations(PAGE))
def test_the_program_writes_what_the_page_quotes(quotation: str) -> None:
    (longest,) = sorted(re.findall(r"\w+", quotation), key=len)[-1:]
    assert any(is_said(quotation, text) for text in MESSAGES if longest in "".join(each or " " for each in text)), (
        f"no message of megatron_p2o reads {quotation!r}"
    )
