"""Completions that cannot be trained on: counted by reason, and reported once per step."""

import logging
import threading
from collections import Counter
from collections.abc import Mapping
from typing import Literal

import numpy as np

from megatron_p2o.types import Logprobs

logger = logging.getLogger(__name__)

Reason = Literal["invalid_logprobs", "refused"]
"""`invalid_logprobs`: one of them is null, nan, infinite or above 0. `refused`: the engine did not take the request."""

REMEDIES: Mapping[Reason, str] = {
    "invalid_logprobs": "had log-probs that are none: the weights of that engine are not finite, or its kernels fail "
    "(sglang.attention_backend names others)",
    "refused": "were refused by their engine",
}
"""Reason to what it means and what can be done."""

ROUNDING = 1e-3
"""A log-prob this far above 0, in nats, is 0 rounded."""


def are_logprobs(logprobs: Logprobs) -> bool:
    """Whether all of them can be logarithms of probabilities of sampled tokens."""
    return bool((np.isfinite(logprobs) & (logprobs <= ROUNDING)).all())


class GivenUp:
    """Counts completions given up since the counts were last taken. `note` is called on the broker's loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[Reason] = Counter()
        self._examples: dict[Reason, str] = {}

    def note(self, reason: Reason, example: str) -> None:
        """Count one; `example` says where it happened."""
        with self._lock:
            self._counts[reason] += 1
            self._examples.setdefault(reason, example)

    def take(self) -> dict[str, float]:
        """Return `engine/<reason>_count` for every reason and reset the counts. Warns of each reason in one
        sentence."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
            examples, self._examples = self._examples, {}
        for reason, count in counts.items():
            logger.warning("%d completions %s; the first: %s", count, REMEDIES[reason], examples[reason])
        return {f"engine/{reason}_count": float(counts[reason]) for reason in REMEDIES}
