"""Gives two answers one notation for vectors: columns, tuples, and sums of unit vectors."""

from dataclasses import replace

from megatron_p2o.rewards.math.reading.answer import Answer, Items, Quantity
from megatron_p2o.rewards.math.reading.tree import Node

_AXES = tuple(Node("symbol", name=rf"\hat{{{axis}}}") for axis in "ijk")


def in_one_notation(gold: Answer, answer: Answer) -> tuple[Answer, Answer]:
    """Return both answers, written alike if one is a tuple and the other a column or a sum of unit vectors."""
    if isinstance(gold, Items) and isinstance(answer, Items):
        if {gold.kind, answer.kind} == {"matrix", "()"}:
            return _column_as_tuple(gold), _column_as_tuple(answer)
    elif isinstance(gold, Items) and isinstance(answer, Quantity) and _has_axes(answer):
        return _as_sum(gold), answer
    elif isinstance(answer, Items) and isinstance(gold, Quantity) and _has_axes(gold):
        return gold, _as_sum(answer)
    return gold, answer


def _column_as_tuple(items: Items) -> Items:
    rows = [row for row in items.parts if isinstance(row, Items)]
    if items.kind != "matrix" or not all(len(row.parts) == 1 for row in rows):
        return items
    return replace(items, kind="()", parts=tuple(row.parts[0] for row in rows))


def _has_axes(quantity: Quantity) -> bool:
    return any(part in _AXES for part in quantity.expression.walk())


def _as_sum(items: Items) -> Answer:
    parts = [part.expression for part in items.parts if isinstance(part, Quantity)]
    if items.kind != "()" or len(parts) != len(items.parts) or len(parts) not in (2, 3):
        return items
    terms = tuple(Node("product", pair) for pair in zip(parts, _AXES, strict=False))
    return Quantity(Node("sum", terms), text=" ".join(part.text for part in items.parts if isinstance(part, Quantity)))
