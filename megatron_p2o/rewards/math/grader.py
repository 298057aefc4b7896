"""Grades responses to mathematical problems: the last boxed answer, compared by text, by number, or by algebra."""

import logging
import re
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock

from megatron_p2o.config.tree import GradingConfig
from megatron_p2o.rewards.extract import last_boxed
from megatron_p2o.rewards.math.exact import ExactJudge, quick_verdict
from megatron_p2o.rewards.math.match import verdict
from megatron_p2o.rewards.math.reading.latex import is_refused, is_too_long
from megatron_p2o.rewards.math.reading.spelling import normal_form
from megatron_p2o.rewards.workers.grading_workers import GradingWorkers, num_workers_here, worker_limits
from megatron_p2o.types import CORRECT, INCORRECT, FinishReason, Grade, Problem

logger = logging.getLogger(__name__)
_PERCENT = r"(?:per ?cent(?:age)?\b|\\?%)"
_ASKS_PERCENT = re.compile(
    r"\b(?:what|how many|which|find|determine|calculate|compute|give|express)\s+(?:(?:is|are|was)\s+)?"
    rf"(?:(?:the|a)\s+)?(?:[a-z]+\s+)?{_PERCENT}|\bpercentage of\b|\b(?:as an?|in)\s+(?:[a-z]+\s+)?{_PERCENT}",
    re.IGNORECASE,
)
"""A question for a percentage; not one that gives some: sold at 30% off."""

KNOWN = ("x+1", "1+x")
"""Gold and answer that every worker in order calls equal."""

MAX_ASKED_CHARACTERS = 80
"""Longest expression that is looked for in a question."""

_LAYOUT = re.compile(r"[\s$]|\\[,;:!() ]|\\(?:left|right|displaystyle)(?![A-Za-z])")
_ASKS = r"(?i:find|compute|evaluate|determine|calculate|whatis|valueof)(?:(?:the)?(?:valueof|sum|product|quantity))*"


class MathGrader:
    """The `Grader` for answers in LaTeX. What needs algebra goes to worker processes, started when first needed."""

    def __init__(self, config: GradingConfig) -> None:
        self._workers = GradingWorkers(None, worker_limits(config), num_workers_here(config), algebra_request(*KNOWN))
        self._counts: Counter[str] = Counter()
        self._logged_faults: set[str] = set()
        self._lock = Lock()

    @property
    def counts(self) -> Mapping[str, int]:
        """Answers so far: no_answer (no box), quick (decided here), failed (a fault of the grader met here), and the
        outcomes of `GradingWorkers.counts`."""
        with self._lock:
            return {**self._counts, **self._workers.counts}

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers alive."""
        return self._workers.worker_pids

    def submit(self, problem: Problem, text: str, finish_reason: FinishReason = "stop") -> Future[Grade]:
        """Grade the last boxed answer of `text` against `problem.answer`.

        A question for a percentage may be answered by `20` and by `20\\%`. Undecided when two workers were lost over
        it, one used up its processor time, or the grader itself failed on it, which is logged once for each kind of
        fault.
        The future raises `GraderFailed` when no worker works any more.

        Raises:
            RuntimeError: the grader is closed and the answer needs a worker.
        """
        try:
            answer = last_boxed(text)
            if answer is None:
                return self._decided(INCORRECT, "no_answer")
            local = local_verdict(problem, answer)
        except Exception as error:  # a fault of the grader must not end the rollouts beside this one
            self._log_once(type(error).__name__, problem.id, repr(error))
            return self._decided(Grade.undecided(f"the grader failed: {type(error).__name__}"), "failed")
        if isinstance(local, bool):
            return self._decided(CORRECT if local else INCORRECT, "quick")
        return self._workers.submit(algebra_request(local.gold, local.answer))

    def check(self) -> None:
        """Start a worker and have it grade a known answer. Raises `GraderFailed` when nothing could be graded."""
        self._workers.check()

    def close(self) -> None:
        """Kill the workers. Unanswered requests are undecided."""
        self._workers.close()

    def _log_once(self, kind: str, problem_id: str, fault: str) -> None:
        with self._lock:
            is_known = kind in self._logged_faults
            self._logged_faults.add(kind)
        if not is_known:
            logger.exception("the grader failed on an answer to problem %s, now ungraded: %s", problem_id, fault)

    def _decided(self, grade: Grade, count: str) -> Future[Grade]:
        with self._lock:
            self._counts[count] += 1
        future: Future[Grade] = Future()
        future.set_result(grade)
        return future


def algebra_request(gold: str, answer: str) -> dict[str, object]:
    """Return the request to `workers.algebra` that compares two answers in normal form."""
    return {"gold": gold, "answers": [answer]}


@dataclass(frozen=True, slots=True)
class OpenComparison:
    """What only algebra decides, in normal form."""

    gold: str
    answer: str


def local_verdict(problem: Problem, answer: str) -> bool | OpenComparison:
    """Return the verdict on a boxed answer, or what is left to algebra. Takes little time for any input."""
    if problem.answer is None:
        raise ValueError("the problem has no gold answer, which grading.function=math compares with")
    if is_too_long(problem.answer, answer):
        return False
    gold, answer = _normal_gold(problem.answer), normal_form(answer)
    is_equal = _verdict(gold, answer)
    if is_equal is False and answer.endswith(r"\%") and "%" not in gold and _ASKS_PERCENT.search(problem.question):
        answer = answer.removesuffix(r"\%")
        is_equal = _verdict(gold, answer)
    asked, _, value = answer.partition("=")
    if is_equal is False and is_asked(asked, problem.question):
        answer = value
        is_equal = _verdict(gold, answer)
    return OpenComparison(gold, answer) if is_equal is None else is_equal


def is_asked(expression: str, question: str) -> bool:
    """Return whether a question asks for an expression by its letters: `Find $m+n$.`, so that `m+n=18` gives 18."""
    if len(expression) > MAX_ASKED_CHARACTERS or not re.search("[A-Za-z]", expression):
        return False
    wanted = re.escape(_LAYOUT.sub("", expression))
    return re.search(rf"{_ASKS}{wanted}(?![\w^_+*/=(\\-])", _LAYOUT.sub("", question)) is not None


def _verdict(gold: str, answer: str) -> bool | None:
    is_equal = quick_verdict(gold, answer)
    if is_equal is None and is_refused(gold, answer):
        return False
    return verdict(gold, answer, ExactJudge()) if is_equal is None else is_equal


@lru_cache(maxsize=65536)
def _normal_gold(answer: str) -> str:
    return normal_form(answer)
