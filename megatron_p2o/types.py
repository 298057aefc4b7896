"""The values that flow through one P2O step, in order of appearance.

    Problem -> Prompt -> Completion -> Rollout -> Group -> TrainSample -> PackedBatch

All are frozen: a stage returns new values and never edits the ones it was given. This file is also the
glossary: the words defined here are used for the same idea everywhere. The examples follow one problem from record to
record; a test runs them in order. CONTRIBUTING lists the words that other modules define.

Dimension letters: P problems, G rollouts per group, L tokens of one sample, R tokens of one response,
T packed tokens, V vocabulary (Vp: this rank's share), D hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # processes that only pass text around (evolution) then start in a tenth of the time
    from torch import Tensor

TokenIds = NDArray[np.int32]
"""Token ids, int32: Python integers would cost nine times the memory on the conducting rank."""

Logprobs = NDArray[np.float32]
"""Natural-log probabilities of sampled tokens at the sampling temperature, float32."""

FinishReason = Literal["stop", "length", "abort"]
"""Why the engine stopped: end-of-sequence token, `max_new_tokens`, or given up on (engine lost, time limit)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One verifiable problem.

    >>> problem = Problem(id="sum-1", question="2+3?", answer="5", source="toy", level="easy")
    """

    id: str
    """Stable over epochs and runs; keys the ledger and the template assignment."""
    question: str
    answer: str | None
    """Gold answer; for `math` as it would stand inside `\\boxed{}`. None: there is none."""
    source: str = ""
    """Data set or generator family it came from."""
    level: str = ""
    """Difficulty label of the source, used only to report rewards by level."""
    hints: tuple[str, ...] = ()
    """What its row tells of the way to the answer, from the weakest to the strongest (`data.hints_field`)."""
    demonstrations: tuple[str, ...] = ()
    """Responses of a teacher that its row brings (`data.demonstrations_field`)."""
    task: str = ""
    """Name of its task under `data.train`; "" where it is of none."""
    system_prompt: str = ""
    """System message it is asked under; "" for none."""
    columns: Mapping[str, Any] = field(default_factory=dict[str, Any], repr=False, hash=False)
    """All columns of its row by name, as JSON types: what a reward function may need beside the gold answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """An instruction put in front of a question while sampling. Id 0 is always the empty template.

    >>> template = Template(id=1, text="Add.", parent=None, score=0.75, weight_version=4)
    """

    id: int
    text: str
    """"" asks the problem plainly."""
    parent: int | None
    """Template it was reflected from; None for a seed."""
    lineage_problem_ids: frozenset[str] = frozenset()
    """Problems whose feedback (and gold answer) this template or an ancestor has seen: never paired with them."""
    score: float = 0.0
    """Mean reward on the development problems it was tried on, in [0, 1]."""
    weight_version: int = 0
    """Policy version the score was measured on."""
    task: str = ""
    """Task whose problems it was evolved on and is put in front of; "" in a run with a single one."""
    reliance: float | None = None
    """Mean log pi(y|x) - log pi(y|x,z) per token, in nats, of solutions y through it: 0 where the plain policy writes
    them as well, negative where they lean on it. None: not measured (`assignment.weight: score`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Demonstration(Template):
    """A teacher's response to one problem. It stands where a template stands, and nothing is sampled.

    >>> shown = Demonstration(id=1, text="a teacher's response", parent=None, response="2+3=5")
    """

    response: str


PLAIN = Template(id=0, text="", parent=None)
"""The empty template: the problem is asked plainly."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunningRound:
    """A round of prompt evolution that has begun and published nothing yet.

    >>> RunningRound(epoch=0, problem_ids=("sum-1", "sum-2")).problem_ids[0] == problem.id
    True
    """

    epoch: int
    """Epoch after which the round started."""
    problem_ids: tuple[str, ...]
    """The hard problems it works on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A problem as one rollout asks it: sampled with the template, trained without it.

    >>> plain_ids = np.array([50, 43, 51, 63], np.int32)  # "2+3?", one token a character
    >>> ids = np.array([65, 100, 100, 46, *plain_ids], np.int32)  # with "Add." in front
    >>> prompt = Prompt(problem=problem, template=template, sampling_ids=ids, training_ids=plain_ids)
    >>> prompt.is_templated
    True
    """

    problem: Problem
    template: Template
    sampling_ids: TokenIds
    """[P] what the engine conditions on: x with z."""
    training_ids: TokenIds
    """[P] what the gradient conditions on: bare x (context distillation). Equal to `sampling_ids` for PLAIN."""

    @property
    def is_templated(self) -> bool:
        return self.template.text != ""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to sample a completion.

    >>> SamplingParams(temperature=0.6, max_new_tokens=4096, top_p=0.95).seed is None
    True
    """

    temperature: float
    """0 is greedy."""
    max_new_tokens: int
    top_p: float = 1.0
    seed: int | None = None
    """In [0, 2**63). Honoured under `rollout.deterministic`; None: the engine's own random state."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What an engine sampled for a prompt.

    >>> completion = Completion(
    ...     prompt=prompt,
    ...     token_ids=np.array([53, 2], np.int32),  # "5" and the end of the sequence
    ...     logprobs=np.array([-0.7, -0.1], np.float32),
    ...     finish_reason="stop",
    ...     weight_versions=(4,),
    ... )
    >>> completion.is_aborted
    False
    """

    prompt: Prompt
    token_ids: TokenIds
    """[R] including the end-of-sequence token when `finish_reason` is "stop"."""
    logprobs: Logprobs
    """[R] the engine's log-probs under `prompt.sampling_ids`, at the sampling temperature."""
    finish_reason: FinishReason
    weight_versions: tuple[int, ...]
    """Policy versions the tokens were sampled from, oldest first; one entry unless an update fell in the middle. Empty
    for a demonstration."""

    @property
    def is_aborted(self) -> bool:
        """Whether the engine gave up before the response ended: what there is of it says nothing about the policy."""
        return self.finish_reason == "abort"


ROUNDING = 1e-9
"""Relative error of a reward that is a sum of parts, with room to spare."""


@dataclass(frozen=True, slots=True)
class Grade:
    """Verdict on one completion.

    >>> Grade(reward=0.5, feedback="one of two tests passes").is_decided
    True
    >>> Grade.undecided("the grader was lost").is_decided
    False
    """

    reward: float | None
    """In [0, 1]; 0 or 1 for tasks that know only right and wrong. None: undecided, there is no verdict (the engine gave
    up, the grader failed or was lost). An undecided answer is no failure."""
    reason: str = ""
    """Why it is undecided, or why it has this reward; for people."""
    feedback: str = ""
    """Text about the answer for reflection."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for a reward that is NaN or outside [0, 1]."""
        if self.reward is not None and not 0 <= self.reward <= 1:
            raise ValueError(f"reward {self.reward} is not in [0, 1]: scale it, or return None for no verdict")

    @classmethod
    def undecided(cls, reason: str) -> "Grade":
        return cls(reward=None, reason=reason)

    @property
    def is_decided(self) -> bool:
        return self.reward is not None

    def reaches(self, solved_at: float) -> bool:
        """Whether there is a verdict and its reward is at least `solved_at`, but for rounding: 0.1 + 0.7 is less than
        0.8 in floating point."""
        return self.reward is not None and self.reward >= solved_at * (1 - ROUNDING)


CORRECT = Grade(reward=1.0)
INCORRECT = Grade(reward=0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Teaching:
    """What a template says of a response that was sampled without it (`objective.context: distill`).

    >>> Teaching(template=template, gains=np.array([0.5, 0.0], np.float32)).is_known
    True
    """

    template: Template
    gains: Logprobs | None
    """[R] log pi(y | x, z) - log pi(y | x), see `rl.teachers.teaching`. None: no engine gave it, and the rollout is not
    trained on."""

    @property
    def is_known(self) -> bool:
        return self.gains is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """A graded completion.

    >>> right = Rollout(completion=completion, grade=CORRECT)
    >>> right.reward
    1.0
    """

    completion: Completion
    grade: Grade
    solved_at: float = 1.0
    """Reward from which it counts as solved (`hard.solved_at`)."""
    teaching: Teaching | None = None
    """What its template says of it, where it was sampled plainly to learn from that; None: nothing was asked."""

    @property
    def can_be_trained_on(self) -> bool:
        """Whether it has a verdict, a response and, if a template was to teach it, what that says."""
        is_taught = self.teaching is None or self.teaching.is_known
        return self.is_decided and is_taught and len(self.completion.token_ids) > 0

    @property
    def is_decided(self) -> bool:
        """Whether there is a verdict. A rollout without one is no failure: it has no credit, shapes no baseline and is
        left out of every rate."""
        return self.grade.is_decided and not self.completion.is_aborted

    @property
    def reward(self) -> float:
        """In [0, 1]. Must not be asked of an undecided rollout."""
        assert self.grade.reward is not None, "an undecided rollout has no reward"
        return self.grade.reward

    @property
    def is_solved(self) -> bool:
        """Whether it has a verdict and its reward reaches `solved_at`."""
        return self.is_decided and self.grade.reaches(self.solved_at)


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """All rollouts of one problem in one step; advantages are relative to the group.

    >>> wrong = Rollout(completion=completion, grade=INCORRECT)
    >>> group = Group(problem=problem, rollouts=(right, wrong), advantages=(0.5, -0.5))  # reward less the mean
    """

    problem: Problem
    rollouts: tuple[Rollout, ...]
    """[G]"""
    advantages: tuple[float, ...]
    """[G] same order."""


RolloutKey = tuple[str, int]
"""Names a rollout of a step: the id of its problem, and its place in the group."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSample:
    """One sequence to take the gradient on.

    >>> sample = TrainSample(
    ...     context_ids=prompt.training_ids,  # asked with the template, trained without
    ...     response_ids=completion.token_ids,
    ...     advantage=group.advantages[0],
    ...     sampling_logprobs=completion.logprobs,
    ...     is_templated=True,
    ... )
    >>> sample.num_tokens  # 4 + 2 - 1
    5
    """

    context_ids: TokenIds
    """[P] the bare prompt, unless `objective.context` is "sampling"."""
    response_ids: TokenIds
    """[R], R >= 1"""
    advantage: float
    sampling_logprobs: Logprobs
    """[R] log-probs of the response under the prompt it was sampled with: the c side of the context ratio."""
    is_templated: bool
    """Whether the sampling prompt differs from `context_ids`: only then the context ratio can differ from 1."""
    key: RolloutKey = ("", 0)
    """The rollout it was made from."""
    advantage_offsets: Logprobs | None = None
    """[R] added to the advantage, token by token; None: 0 each."""
    engine_logprobs: Logprobs | None = None
    """[R] what the engine said, where `sampling_logprobs` are the trainer's own (`logprobs.recompute`)."""
    loss_weights: Logprobs | None = None
    """[R] factors on the tokens' losses; None: 1 each."""
    reference_logprobs: Logprobs | None = None
    """[R] log-probs of the initial policy under `context_ids`, where the objective has a KL term in the loss."""

    @property
    def num_tokens(self) -> int:
        """Positions this sample takes in a pack: every token but the last predicts its successor."""
        return len(self.context_ids) + len(self.response_ids) - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatch:
    """Samples laid end to end without padding. Position t predicts `target_ids_T[t]`, its successor in the sample.

    >>> from megatron_p2o.rl.packing import pack
    >>> batch = pack([sample], old_logprobs=None)
    >>> batch.token_ids_T.tolist(), batch.target_ids_T.tolist()
    ([50, 43, 51, 63, 53], [43, 51, 63, 53, 2])
    >>> batch.loss_mask_T.tolist()
    [False, False, False, True, True]
    """

    token_ids_T: "Tensor"
    """int64"""
    target_ids_T: "Tensor"
    """int64"""
    cu_seqlens: "Tensor"
    """[num_samples + 1] int32, first 0, last T."""
    loss_mask_T: "Tensor"
    """bool: the target is a response token. The denominator counts these."""
    loss_weights_T: "Tensor"
    """float32 factor on the token's loss; 0 drops a token without changing the denominator."""
    advantages_T: "Tensor"
    """float32, the advantage of each response token, its offset included; 0 elsewhere."""
    sampling_logprobs_T: "Tensor"
    """float32, 0 outside `loss_mask_T`."""
    is_templated_T: "Tensor"
    """bool"""
    old_logprobs_T: "Tensor | None"
    """float32 log-probs under the same context before the first update; None says that this forward pass is it."""
    sample_index_T: "Tensor"
    """int64 index of the sample (in the list that was packed) each position belongs to."""
    response_index_T: "Tensor"
    """int64 place of the target in its response, 0 the first; below 0 in the prompt."""
    engine_logprobs_T: "Tensor | None"
    """float32 where `sampling_logprobs_T` are the trainer's own, else None."""
    reference_logprobs_T: "Tensor | None" = None
    """float32 log-probs of the initial policy, where the samples have them."""


Number = TypeVar("Number", float, "Tensor")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenStats(Generic[Number]):
    """Sums over the tokens of an update, and maxima (`..._max`). They add up over micro-batches and ranks; means are
    taken at the end. Float64 scalars while a pass computes them, numbers in a report.

    `mismatch_*` compare the log-probs of engine and trainer under one prompt.

    >>> tokens = replace(no_tokens(), loss_tokens=2.0, carrying_tokens=2.0, live_tokens=2.0, entropy_sum=1.8)
    >>> tokens.entropy_sum / tokens.live_tokens  # mean entropy of a token, nats
    0.9
    """

    loss_tokens: Number
    """Response tokens."""
    carrying_tokens: Number
    """Response tokens with a weight, and with an advantage or an entropy or KL term."""
    live_tokens: Number
    """The part of `carrying_tokens` that went through the LM head."""
    kept_tokens: Number
    """The part of `carrying_tokens` that keeps a weight after the context ratio."""
    templated_tokens: Number
    """The part of `carrying_tokens` in templated rollouts."""
    templated_kept_tokens: Number
    """The part of `kept_tokens` in templated rollouts."""
    templated_advantage_sum: Number
    """|advantage| times weight before the context ratio, over `templated_tokens`."""
    dropped_advantage_sum: Number
    """What the context ratio takes from it: all where a weight becomes 0, nothing where it does not fall."""
    templated_gain_sum: Number
    """Advantage times weight times the shift of the log-prob by the template (`rl.context_shift`), nats, over those of
    `templated_tokens` where advantage and shift are positive: what the template brings to successes."""
    dropped_gain_sum: Number
    """What the context ratio takes from it."""
    clipped_tokens: Number
    """The part of `kept_tokens` whose gradient the clip took away."""
    ratio_sum: Number
    """Policy ratios of `live_tokens`."""
    entropy_sum: Number
    """Entropies of `live_tokens`, nats."""
    mismatch_tokens: Number
    """Tokens compared: those of plain rollouts with an advantage; under `logprobs.recompute` all with one."""
    mismatch_abs_sum: Number
    """Absolute differences of the log-probs, nats."""
    mismatch_abs_max: Number
    """The largest of them."""
    mismatch_ratio_sum: Number
    """Probability ratios r = trainer / engine."""
    mismatch_kl_sum: Number
    """r - 1 - log r, which estimates KL(engine || trainer) in nats: unbiased, since the engine sampled the tokens, and
    never negative (John Schulman's k3, http://joschu.net/blog/kl-approx.html)."""
    reference_tokens: Number
    """Tokens compared with the initial policy: those with a KL term, in the loss or in the reward."""
    reference_kl_sum: Number
    """The same estimate of KL(policy || initial policy), nats, whatever `objective.kl_estimator` is."""
    weighted_tokens: Number
    """Tokens with an advantage and a truncated importance weight (`logprobs.importance_cap`)."""
    capped_tokens: Number
    """The part of `weighted_tokens` whose weight was truncated."""


def no_tokens() -> TokenStats[float]:
    """Return the numbers of an update that saw no token: 0 each."""
    return TokenStats(**{field.name: 0.0 for field in fields(TokenStats)})


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenShifts:
    """The shift of each of the first N tokens of a response, and what the context ratio left of it.

    >>> dropped = TokenShifts(shifts=np.array([4.7]), kept=np.array([0.0]))  # 110 times as likely under the template
    """

    shifts: Logprobs
    """[N] log pi(y | x, z) - log pi(y | x), nats; nan where it was not measured."""
    kept: Logprobs
    """[N] share of the token's weight that the context ratio leaves it, from 0 to 1; above 1 where it is increased."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextShift:
    """How much more likely a rollout's response is under its template: sums over tokens of
    log pi(y | x, z) - log pi(y | x), nats. See `rl.context_shift`.

    >>> shift = ContextShift(head_sum=3.0, head_tokens=2, rest_sum=0.0, rest_tokens=1)
    >>> shift.per_token
    1.0
    """

    head_sum: float
    """Shift of the first tokens of the response."""
    head_tokens: int
    rest_sum: float
    rest_tokens: int
    tokens: TokenShifts | None = field(default=None, compare=False)
    """The first tokens one by one, `rl.context_shift.MAX_TOKENS` at most; None where they were not kept."""

    @property
    def per_token(self) -> float:
        return (self.head_sum + self.rest_sum) / (self.head_tokens + self.rest_tokens)


UpdateOutcome = Literal["applied", "empty", "non_finite"]
"""What became of an optimizer step: the weights moved; no sample carried a gradient; the gradient was not finite. In
the last two cases the weights stand still and the learning-rate schedule advances."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateReport:
    """What one optimizer step did, over the whole batch and all ranks.

    >>> report = UpdateReport(loss=-0.5, grad_norm=0.3, learning_rate=1e-6, outcome="applied", tokens=tokens)
    >>> report.tokens.loss_tokens
    2.0
    """

    loss: float
    grad_norm: float
    learning_rate: float
    outcome: UpdateOutcome
    tokens: TokenStats[float] = field(default_factory=no_tokens)
    shifts: Mapping[RolloutKey, ContextShift] = field(default_factory=dict[RolloutKey, ContextShift])
    """Shifts of the templated rollouts that were trained on without their template."""
    flops_per_rank: float = 0.0
    """Matrix-product operations of forward and backward pass on the samples, recomputation left out, over the ranks."""
