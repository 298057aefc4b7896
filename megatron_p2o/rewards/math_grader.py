"""Grades responses to mathematical problems: the last boxed answer, compared by text, by number, or by algebra."""

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future
from functools import lru_cache
from threading import Lock

from megatron_p2o.config import GradingConfig
from megatron_p2o.rewards.extract import last_boxed
from megatron_p2o.rewards.latex import normal_form
from megatron_p2o.rewards.pool import WorkerPool
from megatron_p2o.rewards.quick_match import quick_verdict, sides_to_check
from megatron_p2o.rewards.refusals import is_refused, is_too_long
from megatron_p2o.rewards.units import units_agree, without_unit
from megatron_p2o.types import Grade, Problem


class MathGrader:
    """The `Grader` for answers in LaTeX. What needs algebra goes to worker processes, started when first needed."""

    def __init__(self, config: GradingConfig) -> None:
        self._pool = WorkerPool(config.num_workers, config.deadline_s, config.memory_limit_mib)
        self._counts: Counter[str] = Counter()
        self._lock = Lock()

    @property
    def counts(self) -> Mapping[str, int]:
        """Answers so far: no_answer (no box), quick (decided here), and the outcomes of `WorkerPool.counts`."""
        with self._lock:
            return {**self._counts, **self._pool.counts}

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers alive."""
        return self._pool.worker_pids

    def submit(self, problem: Problem, text: str) -> Future[Grade]:
        """Grade the last boxed answer of `text` against `problem.answer`.

        "error" when two workers were lost over it, or one used up its processor time. The future raises `GraderFailed`
        when no worker works any more.

        Raises:
            RuntimeError: the grader is closed and the answer needs a worker.
        """
        answer = last_boxed(text)
        if answer is None:
            return self._decided("incorrect", "no_answer")
        undecided = undecided_sides(problem.answer, answer)
        if isinstance(undecided, bool):
            return self._decided("correct" if undecided else "incorrect", "quick")
        return self._pool.submit(without_unit(_normal_gold(problem.answer)), undecided)

    def check(self) -> None:
        """Start a worker and have it grade a known answer. Raises `GraderFailed` when nothing could be graded."""
        self._pool.check()

    def close(self) -> None:
        """Kill the workers; what they have not answered is graded "error"."""
        self._pool.close()

    def _decided(self, grade: Grade, count: str) -> Future[Grade]:
        with self._lock:
            self._counts[count] += 1
        future: Future[Grade] = Future()
        future.set_result(grade)
        return future


def undecided_sides(gold: str, answer: str) -> bool | tuple[str, ...]:
    """Return the verdict when no algebra is needed, else the parts of the answer that must equal the gold one."""
    if is_too_long(gold, answer):
        return False
    gold, answer = _normal_gold(gold), normal_form(answer)
    if gold == answer:
        return True
    undecided: list[str] = []
    for side in sides_to_check(gold, answer):
        if not units_agree(gold, side):
            return False
        bare_gold, bare_side = without_unit(gold), without_unit(side)
        verdict = quick_verdict(bare_gold, bare_side)
        if verdict is False or (verdict is None and is_refused(bare_gold, bare_side)):
            return False
        if verdict is None:
            undecided.append(bare_side)
    return tuple(undecided) or True


@lru_cache(maxsize=65536)
def _normal_gold(answer: str) -> str:
    return normal_form(answer)
