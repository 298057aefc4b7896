"""The grader of reward functions that settings name: they run in worker processes."""

import logging
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future
from threading import Lock
from typing import Any

from megatron_p2o.config.tree import GradingConfig
from megatron_p2o.records import to_json
from megatron_p2o.rewards.functions import RewardSpec
from megatron_p2o.rewards.workers.grading_workers import GradingWorkers, num_workers_here, worker_limits
from megatron_p2o.rewards.workers.loop import KNOWN
from megatron_p2o.types import FinishReason, Grade, Problem

logger = logging.getLogger(__name__)

MAX_LOGGED_KINDS = 20
"""Kinds of exceptions that are logged with their traceback."""


class FunctionGrader:
    """The `Grader` for `grading.function` and `grading.functions`. Workers are started when first needed."""

    def __init__(self, config: GradingConfig) -> None:
        self._faults = FaultLog()
        limits = worker_limits(config, stall_timeout_s=config.timeout_s)
        self._workers = GradingWorkers(
            specs_of(config), limits, num_workers_here(config), {KNOWN: True}, raised=self._faults.note
        )

    @property
    def counts(self) -> Mapping[str, int]:
        """See `GradingWorkers.counts`."""
        return self._workers.counts

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers alive."""
        return self._workers.worker_pids

    def submit(self, problem: Problem, text: str, finish_reason: FinishReason) -> Future[Grade]:
        """Grade a response. Undecided, with the reason, where a function raises, takes too much or returns no reward.

        The future raises `GraderFailed` when no worker works any more, `FunctionRefused` when a function cannot be
        used.

        Raises:
            RuntimeError: the grader is closed.
        """
        return self._workers.submit({"problem": to_json(problem), "response": text, "finish_reason": finish_reason})

    def check(self) -> None:
        """Have a worker load the functions. Raises `FunctionRefused`, a `ValueError`, which names what is wrong."""
        self._workers.check()

    def close(self) -> None:
        """Kill the workers; what they have not answered is undecided. Says how often functions raised what."""
        self._workers.close()
        self._faults.close()


class FaultLog:
    """Logs the first exception of each kind with its traceback, and counts them. For any thread."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = Lock()

    def note(self, request: Mapping[str, Any], reply: Mapping[str, Any]) -> None:
        """Count what a reward function raised: a reply of `workers.loop`."""
        with self._lock:
            self._counts[reply["kind"]] += 1
            is_logged = self._counts[reply["kind"]] == 1 and len(self._counts) <= MAX_LOGGED_KINDS
        if is_logged:
            logger.error(
                "the reward function raised on an answer to problem %s, now undecided; further ones of this kind are "
                "counted\n%s",
                *(request["problem"]["id"], reply["traceback"]),
            )

    def close(self) -> None:
        """Log how many there were of each kind that came more than once."""
        with self._lock:
            many = [f"{count} times {kind}" for kind, count in self._counts.most_common(MAX_LOGGED_KINDS) if count > 1]
        if many:
            logger.error("the reward function raised %s", ", ".join(many))


def specs_of(config: GradingConfig) -> list[RewardSpec]:
    """Return the reward functions that settings name."""
    if not config.functions:
        return [RewardSpec(function=config.function, arguments=config.arguments)]
    return [
        RewardSpec(function=name, weight=each.weight, arguments=each.arguments)
        for name, each in config.functions.items()
    ]
