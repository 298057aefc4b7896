"""The published data sets a run is prepared from: names, fields and repositories.

No text of theirs is part of this project: the files are read from a local download.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A published data set. Of several field names the first that a row has is used."""

    name: str
    num_rows: int | None
    """Number of rows as published; None if revisions differ. A different number is reported, not refused."""
    question_fields: tuple[str, ...]
    answer_fields: tuple[str, ...]
    solution_fields: tuple[str, ...] = ()
    """Whose last boxed answer serves rows that have no answer field."""
    level_fields: tuple[str, ...] = ()
    has_numeric_level: bool = False
    """Whether problems are chosen by level, so that a row without one is bad."""
    subject_fields: tuple[str, ...] = ()
    hub_repository: str | None = None
    hub_files: str = ""
    """Pattern of the files that hold the rows."""
    takes_first_answer: bool = False
    """Whether the first of several answers counts, as in the Qwen2.5-Math suite; otherwise such a row is bad."""

    @property
    def fields(self) -> tuple[str, ...]:
        """Every field that is read."""
        answers = (*self.answer_fields, *self.solution_fields)
        return (*self.question_fields, *answers, *self.level_fields, *self.subject_fields)


DEEPSCALER = Source(
    name="deepscaler",
    num_rows=40_315,
    question_fields=("problem",),
    answer_fields=("answer",),
    hub_repository="agentica-org/DeepScaleR-Preview-Dataset",
    hub_files="deepscaler.json",
)

DEEPMATH = Source(
    name="deepmath",
    num_rows=None,
    question_fields=("question",),
    answer_fields=("final_answer",),
    level_fields=("difficulty",),
    has_numeric_level=True,
    subject_fields=("topic",),
    hub_repository="zwhe99/DeepMath-103K",
    hub_files="data/train-*.parquet",
)

_QUESTION = ("problem", "question", "Problem", "Question")
_ANSWER = ("answer", "Answer")
_SOLUTION = ("solution", "Solution")


def any_source(name: str) -> Source:
    """Return a source for the user's own evaluation set, with the fields of all published ones."""
    return Source(
        name=name,
        num_rows=None,
        question_fields=_QUESTION,
        answer_fields=(*_ANSWER, "final_answer"),
        solution_fields=_SOLUTION,
        level_fields=("level", "difficulty"),
        subject_fields=("subject", "type", "topic", "subfield"),
    )


def _competition(name: str, num_rows: int) -> Source:
    return Source(
        name=name,
        num_rows=num_rows,
        question_fields=_QUESTION,
        answer_fields=_ANSWER,
        solution_fields=_SOLUTION,
    )


EVALUATION_SETS: Mapping[str, Source] = {
    source.name: source
    for source in (
        _competition("aime24", num_rows=30),
        _competition("aime25", num_rows=30),
        _competition("amc23", num_rows=40),
        Source(
            name="math500",
            num_rows=500,
            question_fields=_QUESTION,
            answer_fields=_ANSWER,
            solution_fields=_SOLUTION,
            level_fields=("level",),
            subject_fields=("subject", "type"),
        ),
        Source(
            name="minerva",
            num_rows=272,
            question_fields=_QUESTION,
            answer_fields=_ANSWER,
            solution_fields=_SOLUTION,
            subject_fields=("type",),
        ),
        Source(
            name="olympiadbench",
            num_rows=675,
            question_fields=_QUESTION,
            answer_fields=("final_answer", "answer"),
            subject_fields=("subfield",),
            takes_first_answer=True,
        ),
    )
}
"""The six sets of the paper's evaluation, by name."""
