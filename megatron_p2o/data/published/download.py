"""The content of a download: its problems, and the number of bad rows by reason."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_p2o.data.published.near_duplicates import words
from megatron_p2o.data.published.source_rows import BadRow, BoxedAnswer, SourceRow, source_rows
from megatron_p2o.data.published.sources import Source

MAX_LISTED_BAD_ROWS = 20


@dataclass(kw_only=True, slots=True)
class Download:
    """The rows of a source. Solutions are never kept: memory holds questions and answers only."""

    rows: list[SourceRow | None] = field(default_factory=list)
    """Rows in order; None replaces a bad row. Problems below `min_level` are not among them."""
    num_read: int = 0
    num_below_level: int = 0
    num_repeated: int = 0
    """Problems that ask in the same words as an earlier one."""
    num_bad: Counter[str] = field(default_factory=Counter)
    """Number of bad rows, by the rule they break."""
    bad_rows: list[str] = field(default_factory=list)
    """The first of them, with place and finding."""

    @property
    def problems(self) -> list[SourceRow]:
        return [row for row in self.rows if row is not None]

    def record(self, source: Source) -> dict[str, Any]:
        """Return the counts for the manifest."""
        return {
            "read": self.num_read,
            "expected": source.num_rows,
            "below_min_difficulty": self.num_below_level,
            "repeated": self.num_repeated,
            "bad": dict(self.num_bad.most_common()),
            "bad_rows": self.bad_rows,
        }


def read_download(
    files: Sequence[Path],
    source: Source,
    boxed_answer: BoxedAnswer,
    min_level: float | None = None,
    on_row: Callable[[int], None] = lambda num_read: None,
) -> Download:
    """Read a download row by row, calling `on_row` with the number of rows so far. Raises what `source_rows` raises."""
    download = Download()
    seen: set[bytes] = set()
    for row in source_rows(files, source, boxed_answer):
        download.num_read += 1
        on_row(download.num_read)
        if isinstance(row, BadRow):
            download.num_bad[row.rule] += 1
            if len(download.bad_rows) < MAX_LISTED_BAD_ROWS:
                download.bad_rows.append(f"{row.place}: {row.detail}")
            download.rows.append(None)
        elif min_level is not None and float(row.level) < min_level:
            download.num_below_level += 1
        else:
            digest = hashlib.sha256(" ".join(words(row.question)).encode()).digest()
            download.num_repeated += digest in seen
            seen.add(digest)
            download.rows.append(row)
    return download
