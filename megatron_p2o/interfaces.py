"""What the algorithm needs from outside; `policy`, `rollout`, `rewards`, `evolve` and `testing.fakes` provide it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from megatron_p2o.files import FileDigest
from megatron_p2o.types import (
    Completion,
    FinishReason,
    Grade,
    Logprobs,
    Problem,
    Prompt,
    RunningRound,
    SamplingParams,
    Template,
    TokenIds,
    TrainSample,
    UpdateReport,
)

if TYPE_CHECKING:  # a report and `p2o view` need no torch, which takes seconds to import
    from torch import Tensor

NamedWeights = Iterable[tuple[str, "Tensor"]]
"""(Hugging Face parameter name, full tensor): the only form in which weights cross from policy to engine."""


class PolicyDiverged(ArithmeticError):
    """Weights of the policy are NaN or infinite: it can be neither served nor saved."""


class Policy(Protocol):
    """The model being trained. Called on rank 0; the implementation moves the other ranks."""

    def update(
        self, samples: Sequence[TrainSample], old_logprobs: Sequence[Logprobs] | None, num_loss_tokens: int
    ) -> UpdateReport:
        """Take one optimizer step.

        Args:
            samples: the rollouts that carry gradient; may be empty (then nothing moves and the step counts).
            old_logprobs: [R] each, under `context_ids`, before the first update of this rollout batch; None when this
                is that first update, so that its own forward pass provides them.
            num_loss_tokens: response tokens of the whole mini-batch including the dropped rollouts: what
                `objective.normalization: token_mean` divides by.
        """
        ...

    def logprobs(self, samples: Sequence[TrainSample]) -> list[Logprobs]:
        """Return log pi(response | context_ids) at the sampling temperature, [R] each, without gradient."""
        ...

    def reference_logprobs(self, samples: Sequence[TrainSample]) -> list[Logprobs]:
        """Return the same of the initial policy. Only where `objective.kl_coefficient` is above 0."""
        ...

    def weights(self) -> Iterator[tuple[str, "Tensor"]]:
        """Yield the current weights under Hugging Face names. Must be consumed to the end.

        Raises `PolicyDiverged`, when called, unless all are finite.
        """
        ...

    def save(self, directory: Path) -> Future[Mapping[str, FileDigest]]:
        """Start writing the current weights and optimizer state into `directory`. Later updates do not affect them.

        The future returns the digest of every file by name once all are written, or raises the reason why they are not.
        One save at a time: the next one waits. Raises `PolicyDiverged` unless all weights are finite.
        """
        ...

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote."""
        ...


class RolloutEngines(Protocol):
    """The serving copies of the policy. One copy is an engine."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, places: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (index into `prompts`, completion) as completions finish, each index once.

        `sampling.seed` is that of the whole call: each prompt gets its own from it, its problem and its place among
        that problem's prompts, so that neither order nor company changes what a prompt is answered with. `places`
        names these, for a call that samples only some of a problem's prompts; None counts them in the call.
        """
        ...

    def score(self, prompts: Sequence[Prompt], responses: Sequence[TokenIds]) -> list[Logprobs | None]:
        """Return log pi(response | prompt.sampling_ids) of each pair at temperature 1, [R].

        None where no engine gave it: a request that was refused, or took too long.
        """
        ...

    def release_memory(self) -> None:
        """Lend the engines' memory to the trainer until the next `refresh`, if they share it. Nothing is sampled
        meanwhile. Running requests are kept and start again after the refresh.
        """
        ...

    def refresh(self, weights: NamedWeights, version: int) -> None:
        """Load `weights` into every engine, verify, and only then serve under `version`."""
        ...


class Grader(Protocol):
    """Decides how well a completion answers its problem."""

    def submit(self, problem: Problem, text: str, finish_reason: FinishReason) -> Future[Grade]:
        """Grade the response `text` to a problem; what cannot be decided is undecided, with the reason.

        The future raises when the grader cannot grade anything any more: no answer of the run would be decided.
        """
        ...


class TemplateLibrary(Protocol):
    """Which templates a problem is asked with: an immutable, versioned outcome of prompt evolution."""

    @property
    def version(self) -> int: ...

    @property
    def templates(self) -> Sequence[Template]:
        """The published templates; empty before the first successful round."""
        ...

    def assigned(self, problem: Problem) -> Sequence[Template]:
        """Return one template per rollout for a problem with evolved templates, else an empty sequence."""
        ...

    def cleared(self) -> "TemplateLibrary":
        """Return the next version with no templates: every problem is asked plainly."""
        ...


class PromptTooLongError(ValueError):
    """A prompt exceeds `data.max_prompt_tokens`; prompts are never truncated."""


class PromptRenderer(Protocol):
    """Turns problems and templates into tokens, and tokens back into text."""

    def render(self, problem: Problem, template: Template) -> Prompt:
        """Return the prompt. Raise `PromptTooLongError` when it exceeds `data.max_prompt_tokens`."""
        ...

    def decode(self, completion: Completion) -> str:
        """Return the response text without special tokens."""
        ...

    def response_ids(self, response: str) -> TokenIds:
        """Return the tokens of a response that was not sampled, with the end-of-sequence token, [R]."""
        ...

    def pieces(self, completion: Completion, max_tokens: int) -> list[str]:
        """Return the text of each of the first `max_tokens` tokens; joined they begin the text of `decode`.

        "" for a special token, and for one that is only part of a character. Empty if the tokenizer cannot tell.
        """
        ...


class RoundInterrupted(Exception):
    """The run is to stop: the round goes on from its journal when the run is resumed."""


class PromptEvolution(Protocol):
    """A round of prompt evolution after each epoch. Never raises for lost evolution."""

    def evolve(self, hard: Sequence[Problem], library: TemplateLibrary, epoch: int) -> TemplateLibrary:
        """Return the library to go on with; a cleared one when nothing helped, `library` while the round still runs.

        Raises `RoundInterrupted` when the run is to stop and this call would have to wait.
        """
        ...

    def newest(self, library: TemplateLibrary) -> TemplateLibrary:
        """Return the library of a round that has ended beside training, else `library`. Never waits."""
        ...

    @property
    def running(self) -> RunningRound | None:
        """The round that runs beside training; a resumed run begins it again."""
        ...
