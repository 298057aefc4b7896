"""Tables of the report, as text: how they look is said in assets/macros.html."""

from collections.abc import Sequence
from dataclasses import dataclass

Cell = str | int


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table whose first column names its rows."""

    caption: str
    """Told to those who cannot see the heading above."""
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
