"""Small stand-ins for every interface of `megatron_p2o.interfaces`: what the algorithm is tested against.

They are honest where it matters: the engine samples under `sampling_ids` and serves the weights it was last given, the
policy's log-probs depend on context, response and the number of updates, and all of them write into one journal.
"""

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_p2o.config.tree import (
    Config,
    DataConfig,
    HardConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    ScheduleConfig,
    one_task,
)
from megatron_p2o.files import FileDigest, digest_of
from megatron_p2o.interfaces import NamedWeights, PromptTooLongError, TemplateLibrary
from megatron_p2o.types import (
    CORRECT,
    INCORRECT,
    PLAIN,
    Completion,
    ContextShift,
    FinishReason,
    Grade,
    Logprobs,
    Problem,
    Prompt,
    Rollout,
    RunningRound,
    SamplingParams,
    Template,
    TokenIds,
    TrainSample,
    UpdateReport,
)

END_OF_SEQUENCE = 0
"""Token that ends a fake completion; every other token is the code point of a character."""

CallLog = list[str]
"""Names of the calls in the order they were made: generate, score, release, update, logprobs, reference_logprobs,
weights, refresh, evolve."""


def fake_token_ids(text: str) -> TokenIds:
    """Return one token per character: its code point."""
    return np.array([ord(character) for character in text], dtype=np.int32)


def fake_logprobs(context_ids: TokenIds, response_ids: TokenIds, num_updates: int = 0) -> Logprobs:
    """Return [R] log-probs in [-1.97, -0.05] that depend on context, response and how often the policy moved."""
    positions = np.arange(len(response_ids))
    seed = zlib.crc32(np.ascontiguousarray(context_ids).tobytes())
    mixed = (seed + 31 * positions + 7 * response_ids.astype(np.int64) + 13 * num_updates) % 97
    return (-0.05 - mixed / 50).astype(np.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class FakeRenderer:
    """Implements `PromptRenderer`: characters to tokens, the template and a blank line before the question."""

    max_prompt_tokens: int = 10_000

    def render(self, problem: Problem, template: Template) -> Prompt:
        text = f"{template.text}\n\n{problem.question}" if template.text else problem.question
        if len(text) > self.max_prompt_tokens:
            raise PromptTooLongError(
                f"prompt of problem {problem.id!r} has {len(text)} tokens, more than data.max_prompt_tokens="
                f"{self.max_prompt_tokens}"
            )
        return Prompt(
            problem=problem,
            template=template,
            sampling_ids=fake_token_ids(text),
            training_ids=fake_token_ids(problem.question),
        )

    def decode(self, completion: Completion) -> str:
        return "".join(self.pieces(completion, len(completion.token_ids)))

    def response_ids(self, response: str) -> TokenIds:
        return np.append(fake_token_ids(response), np.int32(END_OF_SEQUENCE))

    def pieces(self, completion: Completion, max_tokens: int) -> list[str]:
        return ["" if token == END_OF_SEQUENCE else chr(token) for token in completion.token_ids[:max_tokens]]


@dataclass(frozen=True, kw_only=True, slots=True)
class FakeReply:
    """What a fake engine samples for one prompt."""

    text: str
    finish_reason: FinishReason = "stop"
    logprobs: Logprobs | None = None
    """[R]; None: `fake_logprobs` under the sampling context and the served weights."""

    @property
    def token_ids(self) -> TokenIds:
        ids = fake_token_ids(self.text)
        return np.append(ids, np.int32(END_OF_SEQUENCE)) if self.finish_reason == "stop" else ids


@dataclass(kw_only=True, slots=True)
class FakeEngines:
    """Implements `RolloutEngines`: replies by a function, and finishes the last prompt first."""

    reply: Callable[[Prompt, int], FakeReply]
    """(prompt, its index in the call) to what is sampled."""
    journal: CallLog = field(default_factory=CallLog)
    version: int = 0
    num_updates: int = 0
    """Number of updates of the served weights."""
    prompts: list[Prompt] = field(default_factory=list[Prompt])
    """All that were sampled, in the order they were asked."""
    samplings: list[SamplingParams] = field(default_factory=list[SamplingParams])
    """One per `generate`."""
    places: list[tuple[int, ...] | None] = field(default_factory=list[tuple[int, ...] | None])
    """One per `generate`."""
    scored: list[tuple[Prompt, ...]] = field(default_factory=list[tuple[Prompt, ...]])
    """The prompts of each `score`."""
    unscorable: frozenset[str] = frozenset()
    """Ids of problems whose log-probs nobody gets."""
    refreshes: list[int] = field(default_factory=list[int])
    """Versions, in order."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, places: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Completion]]:
        self.journal.append("generate")
        self.prompts.extend(prompts)
        self.samplings.append(sampling)
        self.places.append(None if places is None else tuple(places))
        for index in reversed(range(len(prompts))):
            yield index, self._completion(prompts[index], self.reply(prompts[index], index))

    def score(self, prompts: Sequence[Prompt], responses: Sequence[TokenIds]) -> list[Logprobs | None]:
        self.journal.append("score")
        self.scored.append(tuple(prompts))
        return [
            None if prompt.problem.id in self.unscorable else fake_logprobs(prompt.sampling_ids, ids, self.num_updates)
            for prompt, ids in zip(prompts, responses, strict=True)
        ]

    def release_memory(self) -> None:
        self.journal.append("release")

    def refresh(self, weights: NamedWeights, version: int) -> None:
        self.num_updates = int(dict(weights)["num_updates"])
        self.version = version
        self.refreshes.append(version)
        self.journal.append("refresh")

    def _completion(self, prompt: Prompt, reply: FakeReply) -> Completion:
        own = fake_logprobs(prompt.sampling_ids, reply.token_ids, self.num_updates)
        return Completion(
            prompt=prompt,
            token_ids=reply.token_ids,
            logprobs=own if reply.logprobs is None else reply.logprobs,
            finish_reason=reply.finish_reason,
            weight_versions=(self.version,),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateCall:
    """The arguments of one `Policy.update`."""

    samples: tuple[TrainSample, ...]
    old_logprobs: tuple[Logprobs, ...] | None
    num_loss_tokens: int


@dataclass(kw_only=True, slots=True)
class FakePolicy:
    """Implements `Policy`: its one weight is the number of updates that had samples."""

    journal: CallLog = field(default_factory=CallLog)
    num_updates: int = 0
    updates: list[UpdateCall] = field(default_factory=list[UpdateCall])
    asked_logprobs: list[tuple[TrainSample, ...]] = field(default_factory=list[tuple[TrainSample, ...]])
    """The samples of each `logprobs`."""

    def update(
        self, samples: Sequence[TrainSample], old_logprobs: Sequence[Logprobs] | None, num_loss_tokens: int
    ) -> UpdateReport:
        self.journal.append("update")
        old = None if old_logprobs is None else tuple(old_logprobs)
        before = self.num_updates
        self.updates.append(UpdateCall(samples=tuple(samples), old_logprobs=old, num_loss_tokens=num_loss_tokens))
        self.num_updates += 1 if samples else 0
        outcome = "applied" if samples else "empty"
        shifts = {sample.key: fake_shift(sample, before) for sample in samples if sample.is_templated}
        return UpdateReport(loss=0.0, grad_norm=0.0, learning_rate=1.0, outcome=outcome, shifts=shifts)

    def logprobs(self, samples: Sequence[TrainSample]) -> list[Logprobs]:
        self.journal.append("logprobs")
        self.asked_logprobs.append(tuple(samples))
        return [fake_logprobs(sample.context_ids, sample.response_ids, self.num_updates) for sample in samples]

    def reference_logprobs(self, samples: Sequence[TrainSample]) -> list[Logprobs]:
        self.journal.append("reference_logprobs")
        return [fake_logprobs(sample.context_ids, sample.response_ids) for sample in samples]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        yield "num_updates", torch.tensor(self.num_updates)
        self.journal.append("weights")

    def save(self, directory: Path) -> Future[Mapping[str, FileDigest]]:
        path = directory / "policy.json"
        path.write_text(json.dumps(self.num_updates), encoding="utf-8")
        written: Future[Mapping[str, FileDigest]] = Future()
        written.set_result({path.name: digest_of(path)})
        return written

    def load(self, directory: Path) -> None:
        self.num_updates = int(json.loads((directory / "policy.json").read_text(encoding="utf-8")))


def fake_shift(sample: TrainSample, num_updates: int) -> ContextShift:
    """Return the shift of a templated sample under a policy that has moved so often; every token is of the head."""
    shift = sample.sampling_logprobs - fake_logprobs(sample.context_ids, sample.response_ids, num_updates)
    return ContextShift(head_sum=float(shift.sum()), head_tokens=len(shift), rest_sum=0.0, rest_tokens=0)


UNDECIDED = Grade.undecided("made so")


@dataclass(kw_only=True, slots=True)
class FakeGrader:
    """Implements `Grader`: the whole text must equal the answer. The verdict is there at once."""

    undecidable: str = "?"
    """Text that cannot be graded."""
    submitted: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    """(problem id, text), in order."""

    def submit(self, problem: Problem, text: str, finish_reason: FinishReason) -> Future[Grade]:
        self.submitted.append((problem.id, text))
        verdict: Future[Grade] = Future()
        if text == self.undecidable:
            verdict.set_result(UNDECIDED)
        else:
            verdict.set_result(CORRECT if text == problem.answer else INCORRECT)
        return verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class FakeLibrary:
    """Implements `TemplateLibrary` over a mapping."""

    version: int = 0
    assignments: Mapping[str, Sequence[Template]] = field(default_factory=dict[str, Sequence[Template]])
    """Problem id to one template per rollout."""

    @property
    def templates(self) -> Sequence[Template]:
        by_id = {t.id: t for assigned in self.assignments.values() for t in assigned if t.text}
        return [by_id[key] for key in sorted(by_id)]

    def assigned(self, problem: Problem) -> Sequence[Template]:
        return self.assignments.get(problem.id, ())

    def cleared(self) -> "FakeLibrary":
        return FakeLibrary(version=self.version + 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvolveCall:
    """The arguments of one `PromptEvolution.evolve`."""

    hard: tuple[Problem, ...]
    library: TemplateLibrary
    epoch: int


@dataclass(kw_only=True, slots=True)
class FakeEvolution:
    """Implements `PromptEvolution`: gives every hard problem the same templates."""

    templates: Sequence[Template]
    """One per rollout of a group; empty: nothing helped."""
    journal: CallLog = field(default_factory=CallLog)
    calls: list[EvolveCall] = field(default_factory=list[EvolveCall])

    def evolve(self, hard: Sequence[Problem], library: TemplateLibrary, epoch: int) -> TemplateLibrary:
        self.journal.append("evolve")
        self.calls.append(EvolveCall(hard=tuple(hard), library=library, epoch=epoch))
        if not self.templates:
            return library.cleared()
        assignments = {problem.id: tuple(self.templates) for problem in hard}
        return FakeLibrary(version=library.version + 1, assignments=assignments)

    def newest(self, library: TemplateLibrary) -> TemplateLibrary:
        return library

    @property
    def running(self) -> RunningRound | None:
        return None


def fake_problem(number: int, answer: str = "yes") -> Problem:
    """Return a problem whose id, question and prompt are unique for its number."""
    return Problem(id=f"problem-{number:03d}", question=f"question {number}", answer=answer)


def fake_rollout(
    problem: Problem,
    *,
    reward: float,
    template: Template = PLAIN,
    num_tokens: int = 4,
    finish_reason: FinishReason = "stop",
) -> Rollout:
    """Return a graded rollout of `num_tokens` response tokens, with the log-probs of an engine that never moved."""
    prompt = FakeRenderer().render(problem, template)
    token_ids = np.arange(1, num_tokens + 1, dtype=np.int32)
    completion = Completion(
        prompt=prompt,
        token_ids=token_ids,
        logprobs=fake_logprobs(prompt.sampling_ids, token_ids),
        finish_reason=finish_reason,
        weight_versions=(0,),
    )
    grade = Grade.undecided("aborted") if completion.is_aborted else Grade(reward=reward)
    return Rollout(completion=completion, grade=grade)


def fake_config(settings: Mapping[str, Any] | None = None) -> Config:
    """Return the smallest sensible run (groups of 4, steps of 4 problems, 2 updates each), changed by dotted name."""
    config = Config(
        run=RunConfig(name="fake"),
        model=ModelConfig(path="fake-model"),
        data=DataConfig(train=one_task("fake-problems.jsonl")),
        rollout=RolloutConfig(group_size=4, max_new_tokens=8),
        hard=HardConfig(min_problems=1),
        schedule=ScheduleConfig(problems_per_step=4, problems_per_update=2, epochs=2),
    )
    for name, value in (settings or {}).items():
        config = with_setting(config, name.split("."), value)
    return config


def with_setting(section: Any, path: Sequence[str], value: Any) -> Any:
    """Return a section or mapping with the setting below it that `path` names changed."""
    key, is_mapping = path[0], isinstance(section, Mapping)
    inner = (
        value
        if len(path) == 1
        else with_setting(section[key] if is_mapping else getattr(section, key), path[1:], value)
    )
    return {**section, key: inner} if is_mapping else replace(section, **{key: inner})
