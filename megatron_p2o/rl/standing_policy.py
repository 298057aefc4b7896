"""The policy between two updates: what is known of it is not computed again."""

from collections.abc import Sequence

from megatron_p2o.interfaces import Policy
from megatron_p2o.types import Logprobs, TokenIds, TrainSample


class StandingPolicy:
    """The log-probs of a policy that does not move while this is in use. Each row is computed once."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._rows: dict[tuple[int, int], tuple[TokenIds, TokenIds, Logprobs]] = {}
        """By the identity of context and response, which are kept so that no other array takes it."""

    def logprobs(self, samples: Sequence[TrainSample]) -> list[Logprobs]:
        """Return as `Policy.logprobs`: what is not known yet in one pass, without any where all is."""
        missing = [sample for sample in samples if _key_of(sample) not in self._rows]
        if missing or not samples:
            for sample, row in zip(missing, self._policy.logprobs(missing), strict=True):
                self._rows[_key_of(sample)] = (sample.context_ids, sample.response_ids, row)
        return [self._rows[_key_of(sample)][2] for sample in samples]

    def reference_logprobs(self, samples: Sequence[TrainSample]) -> list[Logprobs]:
        """Return as `Policy.reference_logprobs`."""
        return self._policy.reference_logprobs(samples)


def _key_of(sample: TrainSample) -> tuple[int, int]:
    return id(sample.context_ids), id(sample.response_ids)
