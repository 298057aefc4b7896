"""Tables of the report, as text. assets/macros.html defines how they look."""

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
