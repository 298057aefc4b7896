"""Counts what a run spends: tokens sampled and trained, optimizer steps, seconds of engines and trainer, GPU-hours."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from threading import Lock

from megatron_p2o.metrics.values import Last, MetricValue
from megatron_p2o.records import from_json
from megatron_p2o.types import TrainSample, UpdateReport

PREFIX = "compute/"
"""Begins the metric keys of an account."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeAccount:
    """What a run has spent from its beginning on. The metric `compute/<field>` is cumulative.

    `sampled_*` count tokens that were sampled, prompts left out; the engines read prompts, but hold most of them in
    their prefix cache.
    """

    sampled_training_tokens: int = 0
    """Tokens of training rollouts, with those that no update used."""
    sampled_minibatch_tokens: int = 0
    """Tokens of trials on feedback problems, which compare a new template with its parent."""
    sampled_development_tokens: int = 0
    """Tokens of trials on development problems, which score candidates."""
    sampled_lost_trial_tokens: int = 0
    """Tokens of trials that ended without a verdict, of any kind."""
    sampled_control_tokens: int = 0
    """Tokens of the plain control of rounds (`evolution.plain_control`)."""
    sampled_evaluation_tokens: int = 0
    """Tokens of evaluations during and at the end of the run."""
    reflection_prompt_tokens: int = 0
    """Tokens that reflection read, as its endpoint counts."""
    reflection_completion_tokens: int = 0
    """Tokens that reflection wrote, reasoning included, as its endpoint counts."""
    reflections_without_usage_count: int = 0
    """Replies whose endpoint did not say how many tokens they took: they are in neither number."""
    trained_tokens: int = 0
    """Positions that went through forward and backward pass, prompts included."""
    logprob_tokens: int = 0
    """Positions that went through a forward pass without gradient, for log-probs of policy or initial policy."""
    engine_read_tokens: int = 0
    """Tokens that engines read for log-probs of given responses, prompts included."""
    optimizer_steps_count: int = 0
    """Optimizer steps that moved the weights."""
    engine_s: float = 0.0
    """Seconds in which an engine had requests, summed over engines."""
    trainer_s: float = 0.0
    """Seconds of updates and log-probs, summed over ranks."""
    wall_s: float = 0.0
    """Seconds of the run with its evaluations, without the start of its engines."""
    gpu_h: float = 0.0
    """`wall_s` in hours times the GPUs of the run; 0 on machines without."""

    @property
    def learning_tokens(self) -> int:
        """Sampled tokens that serve learning: what a budget in tokens limits. Measurements (control, evaluations) are
        left out."""
        return (
            self.sampled_training_tokens
            + self.sampled_minibatch_tokens
            + self.sampled_development_tokens
            + self.sampled_lost_trial_tokens
            + self.reflection_completion_tokens
        )

    def plus(self, other: "ComputeAccount") -> "ComputeAccount":
        """Return the sum of both."""
        return ComputeAccount(**{each.name: getattr(self, each.name) + getattr(other, each.name) for each in FIELDS})


FIELDS = fields(ComputeAccount)


def compute_metrics(account: ComputeAccount) -> dict[str, MetricValue]:
    """Return `compute/<field>` for each field, and `compute/learning_tokens`."""
    numbers = {**asdict(account), "learning_tokens": account.learning_tokens}
    return {f"{PREFIX}{name}": Last(number) for name, number in numbers.items()}


def account_in(metrics: Mapping[str, float]) -> ComputeAccount | None:
    """Return the account that a line of metrics holds; None where it holds none."""
    found = {each.name: metrics[PREFIX + each.name] for each in FIELDS if PREFIX + each.name in metrics}
    counts = {name: number if name in TIMES else int(number) for name, number in found.items()}
    return from_json(ComputeAccount, counts) if counts else None


TIMES = ("engine_s", "trainer_s", "wall_s", "gpu_h")
"""Fields that are times, as fractions."""


class ComputeMeter:
    """Counts on the conducting rank what a run spends, rounds of evolution left out, whose journals say it."""

    def __init__(
        self,
        before: ComputeAccount | None = None,
        *,
        engine_s: Callable[[], float] = lambda: 0.0,
        num_ranks: int = 1,
        num_gpus: int = 0,
    ) -> None:
        """Args:
        before: what the checkpoint counts that the run goes on from.
        engine_s: seconds in which engines had requests since they were started, summed over engines.
        """
        self._account = before or ComputeAccount()
        self._engine_s, self._num_ranks, self._num_gpus = engine_s, num_ranks, num_gpus
        self._started = time.monotonic()
        self._is_evaluating = False
        self._lock = Lock()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Count what is sampled inside as an evaluation's."""
        self._is_evaluating = True
        try:
            yield
        finally:
            self._is_evaluating = False

    def count_sampled(self, num_tokens: int) -> None:
        """Count the tokens of a completion of training or of an evaluation."""
        self._add(
            ComputeAccount(sampled_evaluation_tokens=num_tokens)
            if self._is_evaluating
            else ComputeAccount(sampled_training_tokens=num_tokens)
        )

    def count_read(self, num_tokens: int) -> None:
        """Count tokens that engines read for log-probs. From any thread."""
        self._add(ComputeAccount(engine_read_tokens=num_tokens))

    def count_lost_trial(self, num_tokens: int) -> None:
        """Count the tokens of a trial without a verdict. From any thread."""
        self._add(ComputeAccount(sampled_lost_trial_tokens=num_tokens))

    @contextmanager
    def training(self) -> Iterator[None]:
        """Count the time inside as the trainer's."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._add(ComputeAccount(trainer_s=(time.monotonic() - began) * self._num_ranks))

    def count_update(self, samples: Sequence[TrainSample], report: UpdateReport) -> None:
        """Count an optimizer step on `samples`."""
        num_tokens = sum(sample.num_tokens for sample in samples)
        is_applied = int(report.outcome == "applied")
        self._add(ComputeAccount(trained_tokens=num_tokens, optimizer_steps_count=is_applied))

    def count_logprobs(self, samples: Sequence[TrainSample]) -> None:
        """Count log-probs of `samples`."""
        self._add(ComputeAccount(logprob_tokens=sum(sample.num_tokens for sample in samples)))

    def account(self) -> ComputeAccount:
        """Return what has been spent so far."""
        wall_s = time.monotonic() - self._started
        return self._account.plus(
            ComputeAccount(engine_s=self._engine_s(), wall_s=wall_s, gpu_h=wall_s * self._num_gpus / 3600)
        )

    def _add(self, spent: ComputeAccount) -> None:
        with self._lock:
            self._account = self._account.plus(spent)


def since(later: ComputeAccount, earlier: ComputeAccount) -> ComputeAccount:
    """Return what was spent between two accounts of one run."""
    return ComputeAccount(
        **{each.name: max(0, getattr(later, each.name) - getattr(earlier, each.name)) for each in FIELDS}
    )
