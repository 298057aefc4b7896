"""A few problems with the answers they got plainly and through a template, picked by the hard-sample ledger."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_p2o.evolve.reflection.reflection import shorten
from megatron_p2o.metrics.jsonl import JsonObject
from megatron_p2o.report.runs import Run
from megatron_p2o.rl.hard_samples import HardSampleLedger, LedgerEntry

NUM_EXAMPLES = 4
"""Problems shown per run."""

MAX_SHOWN_CHARACTERS = 2200
"""Characters shown of a response: its beginning, and its end, where the boxed answer stands."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownResponse:
    """One response."""

    label: str
    """When and how it was asked."""
    text: str
    is_correct: bool
    num_tokens: int
    template: str
    """Text of the template; "" asked plainly."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownProblem:
    """A problem and up to three responses to it, oldest first."""

    problem_id: str
    level: str
    question: str
    gold: str
    is_internalised: bool
    answers: Sequence[ShownResponse]


def find_examples(run: Run, limit: int = NUM_EXAMPLES) -> list[ShownProblem]:
    """Return problems that templates helped, internalised ones first; for a run without templates, any of its problems.

    Problems whose steps were not written out are passed over.
    """
    internalised = HardSampleLedger(run.ledger).internalised()
    helped = [entry.problem_id for entry in run.ledger if entry.templated_solved]
    candidates = list(dict.fromkeys([*spread(internalised, limit), *spread(helped, limit), *internalised, *helped]))
    if not candidates:
        candidates = spread([entry.problem_id for entry in run.ledger], limit)
    examples: list[ShownProblem] = []
    for problem_id in candidates[: 4 * limit]:
        example = _example(problem_id, run, problem_id in internalised)
        if example is not None:
            examples.append(example)
        if len(examples) == limit:
            break
    return examples


def spread(items: Sequence[str], limit: int) -> list[str]:
    """Return up to `limit` distinct items, evenly spaced over the distinct ones."""
    distinct = list(dict.fromkeys(items))
    stride = max(1, len(distinct) // limit)
    return distinct[::stride][:limit]


def _example(problem_id: str, run: Run, is_internalised: bool) -> ShownProblem | None:
    history = [entry for entry in run.ledger if entry.problem_id == problem_id]
    helped = next((entry for entry in history if entry.templated_solved), None)
    wanted: list[tuple[str, LedgerEntry, bool, bool]] = []
    if helped is None:
        wanted += [("asked plainly", entry, False, entry.plain_solved > 0) for entry in history[:1]]
    else:
        failed = next((e for e in history if e.plain_tries > e.plain_solved and e.step <= helped.step), None)
        wanted += [("asked plainly", failed, False, False)] if failed else []
        wanted.append(("through the template", helped, True, True))
        later = next((e for e in reversed(history) if e.plain_solved and e.step > helped.step), None)
        wanted += [("later, asked plainly", later, False, True)] if later else []
    found = [
        (label, entry, line)
        for label, entry, is_templated, is_correct in wanted
        if (line := _first(run.rollouts_of(entry.step, problem_id), is_templated, is_correct)) is not None
    ]
    if not found:
        return None
    any_line = found[0][2]
    return ShownProblem(
        problem_id=problem_id,
        level=str(any_line.get("level", "")),
        question=str(any_line.get("question", "")),
        gold=str(any_line.get("answer", "")),
        is_internalised=is_internalised,
        answers=[_answer(f"Step {entry.step}, {_asked(line) or label}", line) for label, entry, line in found],
    )


def _asked(line: JsonObject) -> str:
    """Return what stands for "through the template" where a teacher has written the response; "" elsewhere."""
    return "written by the teacher" if line.get("is_demonstration") else ""


def _first(rollouts: Sequence[JsonObject], is_templated: bool, is_correct: bool) -> JsonObject | None:
    """Return the first decided rollout that was asked and solved so."""
    return next(
        (
            line
            for line in rollouts
            if line.get("is_templated") == is_templated
            and line.get("reward") is not None
            and line.get("is_solved") == is_correct
        ),
        None,
    )


def _answer(label: str, line: JsonObject) -> ShownResponse:
    return ShownResponse(
        label=label,
        text=shorten(str(line.get("response", "")), MAX_SHOWN_CHARACTERS),
        is_correct=bool(line.get("is_solved")),
        num_tokens=int(line.get("num_response_tokens", 0)),
        template=str(line.get("template", "")),
    )
