"""HTML that is escaped unless it was built here: a report shows text that a language model wrote."""

import html
import json
from collections.abc import Iterable
from typing import Any

VOID_ELEMENTS = {"meta", "br", "path", "line"}
"""Elements written without an end tag or, inside SVG, closed at once."""


class Html(str):
    """Markup that is safe to insert as it is. Only this module makes it."""

    __slots__ = ()


Child = str | int | Html | None
"""Anything but `Html` is text and gets escaped; None is left out."""


def element(tag: str, *children: Child | Iterable[Child], **attributes: str | float | bool | None) -> Html:
    """Return an element with its children.

    Attribute names lose a trailing underscore and turn inner ones into dashes (`class_`, `aria_label`); True writes
    the bare name, None and False leave it out.
    """
    opening = f"<{tag}{_attributes(attributes)}"
    if tag in VOID_ELEMENTS:
        return Html(opening + "/>")
    return Html(f"{opening}>{join(*children)}</{tag}>")


def join(*children: Child | Iterable[Child]) -> Html:
    """Return the children one after the other."""
    return Html("".join(_flat(children)))


def raw_text(tag: str, text: str) -> Html:
    """Return a style or script element; `text` is our own file, never anything read from a run.

    Raises:
        ValueError: the text would end the element early.
    """
    if f"</{tag}" in text.lower():
        raise ValueError(f"a {tag} element must not contain </{tag}")
    return Html(f"<{tag}>{text}</{tag}>")


def json_script(value: Any) -> Html:
    """Return `value` as an inert JSON block: a less-than sign is written as an escape, so that nothing can end it."""
    return Html(
        f'<script type="application/json">{json.dumps(value, allow_nan=False).replace("<", chr(92) + "u003c")}</script>'
    )


def table(header: Iterable[Child], rows: Iterable[Iterable[Child]], caption: str) -> Html:
    """Return a table that scrolls sideways by itself where it is too wide."""
    head = element("tr", [element("th", cell, scope="col") for cell in header])
    body = [_row(list(row)) for row in rows]
    content = element(
        "table", element("caption", caption, class_="visually-hidden"), element("thead", head), element("tbody", body)
    )
    return element("div", content, class_="table", tabindex=0, role="region", aria_label=caption)


def _row(cells: list[Child]) -> Html:
    return element("tr", element("th", cells[0], scope="row"), [element("td", cell) for cell in cells[1:]])


def _flat(children: Iterable[Child | Iterable[Child]]) -> Iterable[str]:
    for child in children:
        if child is None:
            continue
        if isinstance(child, Html):
            yield child
        elif isinstance(child, (str, int)):
            yield html.escape(str(child))
        else:
            yield from _flat(child)


def _attributes(attributes: dict[str, str | float | bool | None]) -> str:
    written: list[str] = []
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        spelled = name.removesuffix("_").replace("_", "-")
        written.append(f" {spelled}" if value is True else f' {spelled}="{html.escape(str(value), quote=True)}"')
    return "".join(written)
