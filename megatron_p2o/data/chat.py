"""Turns problems and templates into tokens with the model's own chat template, and tokens back into text."""

import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np
from tokenizers.decoders import DecodeStream

from megatron_p2o.config.tree import Config, DataConfig, ModelConfig
from megatron_p2o.data.markup import Frame, MarkupEncoder, control_tokens
from megatron_p2o.data.tokenizer import chat_text, end_of_response_ids, end_of_turn_id, load_tokenizer
from megatron_p2o.files import read_json_object
from megatron_p2o.interfaces import PromptRenderer, PromptTooLongError
from megatron_p2o.types import PLAIN, Completion, Problem, Prompt, Template, TokenIds

START_OF_THINKING, END_OF_THINKING = "<think>", "</think>"

logger = logging.getLogger(__name__)

MAX_REPORTED_PROBLEMS = 20
"""Too long problems an error lists one by one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptLimit:
    """How many tokens a prompt may have, and what decides it."""

    num_tokens: int
    source: str
    remedy: str


def prompt_limit(config: Config) -> PromptLimit:
    """Return how long a prompt may be: `data.max_prompt_tokens`, or what the model's context leaves beside a response.

    Raises:
        ValueError: it leaves nothing.
    """
    own = _own_limit(config.data)
    length = context_length(config)
    if length is None:
        return own
    max_new_tokens = config.rollout.max_new_tokens
    left = length - max_new_tokens
    if left < 1:
        raise ValueError(
            f"rollout.max_new_tokens={max_new_tokens} leaves no room for a prompt in the {length} positions of "
            f"model.path={config.model.path}: lower it"
        )
    if left >= own.num_tokens:
        return own
    return PromptLimit(
        num_tokens=left,
        source=f"the {left} that rollout.max_new_tokens={max_new_tokens} leaves of the model's {length} positions",
        remedy="lower rollout.max_new_tokens",
    )


def context_length(config: Config) -> int | None:
    """Return how many tokens an engine takes for a prompt and its response; None where the model does not say."""
    for name in ("context_length", "context-length"):
        if isinstance(config.sglang.get(name), int):
            return config.sglang[name]
    path = Path(config.model.path) / "config.json"
    named = read_json_object(path).get("max_position_embeddings") if path.is_file() else None
    return named if isinstance(named, int) else None


def chat_renderer(config: Config) -> "ChatRenderer":
    """Return the renderer of a run's prompts.

    Raises:
        ValueError: see `ChatRenderer` and `prompt_limit`.
    """
    return ChatRenderer(config.model, config.data, prompt_limit(config))


class ChatRenderer:
    """The chat format of one model. Plain prompts are rendered once and kept."""

    def __init__(self, model: ModelConfig, data: DataConfig, limit: PromptLimit | None = None) -> None:
        """Load the tokenizer of `model.path`.

        Args:
            limit: longest prompt; None: `data.max_prompt_tokens`.

        Raises:
            ValueError: there is no tokenizer with a chat template, the template fails or does not ask the question,
                or `data.question_format` cannot be filled in.
        """
        self.tokenizer = load_tokenizer(model.path)
        self.eos_token_ids = end_of_response_ids(self.tokenizer, Path(model.path))
        """See `end_of_response_ids`."""
        self._end_of_turn_id = end_of_turn_id(self.tokenizer, Path(model.path))
        self.control_tokens = tuple(control_tokens(self.tokenizer))
        """The texts of the control tokens; see `MarkupEncoder`."""
        self.limit = limit or _own_limit(data)
        self._model = model
        self._date = _date_of(model)
        self._formats = question_formats(data)
        self._plain_ids: dict[tuple[str, str, str], TokenIds] = {}
        self._encoders: dict[str, MarkupEncoder] = {}
        """By the system message that prompts begin with."""
        plain = self._frame("")
        self._encoders[""] = MarkupEncoder(self.tokenizer, plain)
        after_thinking = plain.after.rpartition(END_OF_THINKING)[2]
        self._opened = START_OF_THINKING if START_OF_THINKING in after_thinking else ""
        """The thinking that a prompt opens and its response goes on with."""

    def user_message(self, problem: Problem, template: Template) -> str:
        """Return T(x, z): the template, a blank line, the formatted question (arXiv:2603.21877)."""
        content = self._formats[problem.task].format(question=problem.question)
        instruction = template.text.strip()
        return f"{instruction}\n\n{content}" if instruction else content

    def render(self, problem: Problem, template: Template) -> Prompt:
        """Return the prompt the engine samples from beside the bare one the gradient is taken on.

        Raises:
            PromptTooLongError: the prompt exceeds `limit`.
        """
        key = (problem.task, problem.system_prompt, problem.question)
        plain_ids = self._plain_ids.get(key)
        if plain_ids is None:
            plain_ids = self._encode(problem, PLAIN)
            self._plain_ids[key] = plain_ids
        is_plain = not template.text.strip()
        sampling_ids = plain_ids if is_plain else self._encode(problem, template)
        return Prompt(problem=problem, template=template, sampling_ids=sampling_ids, training_ids=plain_ids)

    def decode(self, completion: Completion) -> str:
        """Return the response text without special tokens, behind the `<think>` that the prompt ended in, if it did."""
        text = self.tokenizer.decode(
            completion.token_ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str), "one sequence decodes to one text"
        return self._opened + text

    def response_ids(self, response: str) -> TokenIds:
        """See `PromptRenderer.response_ids`. Leaves out the `<think>` that the prompt ends in, and what follows an
        end-of-sequence token in the text."""
        text = response.removeprefix(self._opened) if self._opened else response
        token_ids = np.asarray(self.tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)
        ends = np.flatnonzero(np.isin(token_ids, self.eos_token_ids))
        if ends.size:
            return token_ids[: ends[0] + 1]
        return np.append(token_ids, np.int32(self._end_of_turn_id))

    def pieces(self, completion: Completion, max_tokens: int) -> list[str]:
        """See `PromptRenderer.pieces`; what the prompt opened is part of the first piece."""
        stream, backend = DecodeStream(skip_special_tokens=True), self.tokenizer.backend_tokenizer
        found = [stream.step(backend, token) or "" for token in completion.token_ids[:max_tokens].tolist()]
        found[:1] = [self._opened + text for text in found[:1]]
        return found if self.decode(completion).startswith("".join(found)) else []

    def _encode(self, problem: Problem, template: Template) -> TokenIds:
        content, system = self.user_message(problem, template), problem.system_prompt
        token_ids = self._encoder_under(system).encode(self._chat(content, system), content)
        if len(token_ids) > self.limit.num_tokens:
            asked = "plainly" if template.id == PLAIN.id else f"through template {template.id}"
            raise PromptTooLongError(
                f"problem {problem.id} asked {asked} takes {len(token_ids)} tokens, more than {self.limit.source}: "
                f"{self.limit.remedy}, or leave the problem or the template out"
            )
        array = np.asarray(token_ids, dtype=np.int32)
        array.setflags(write=False)
        return array

    def _encoder_under(self, system: str) -> MarkupEncoder:
        """Return the encoder of prompts that begin with a system message.

        Raises:
            ValueError: it holds control tokens, which it would bring into every prompt, or the chat template leaves it
                out.
        """
        if system not in self._encoders:
            markup = next((token for token in self.control_tokens if token in system), None)
            if markup is not None:
                raise ValueError(f"the system message {system!r:.80} holds the control token {markup}: take it out")
            self._encoders[system] = MarkupEncoder(self.tokenizer, self._frame(system))
        return self._encoders[system]

    def _chat(self, content: str, system: str) -> str:
        """Return the chat template's text for one user's message. The template gets the run's date instead of
        today's."""
        before = [{"role": "system", "content": system}] if system else []
        return chat_text(
            self.tokenizer,
            [*before, {"role": "user", "content": content}],
            self._model.path,
            add_generation_prompt=True,
            enable_thinking=self._model.enable_thinking,
            strftime_now=self._date.strftime,
        )

    def _frame(self, system: str) -> Frame:
        mark = f"question{secrets.token_hex(16)}"
        parts = self._chat(mark, system).split(mark)
        if len(parts) != 2:
            raise ValueError(
                f"model.path={self._model.path} has a chat template that writes a user's message {len(parts) - 1} "
                "times: it must do so once"
            )
        if system.strip() not in "".join(parts):
            raise ValueError(
                f"model.path={self._model.path} has a chat template that leaves out the system message "
                f"{system!r:.80}: write it into data.question_format, and leave data.system_prompt empty"
            )
        return Frame(before=parts[0], after=parts[1])


def question_formats(data: DataConfig) -> dict[str, str]:
    """Return how the questions of each task are asked, by its name, and under "" those of no task.

    Raises:
        ValueError: one cannot be filled in.
    """
    formats = {"": data.question_format, **{name: data.of_task(name).question_format for name in data.train}}
    for name, form in formats.items():
        try:
            form.format(question="")
        except (KeyError, IndexError, ValueError) as error:
            setting = f"data.train.{name}.question_format" if name and data.train[name].question_format else ""
            raise ValueError(
                f"{setting or 'data.question_format'}={form!r} must hold {{question}} and no other field "
                f"({error!r}): double literal braces"
            ) from error
    return formats


def _date_of(model: ModelConfig) -> date:
    if model.template_date is None:
        return date.today()
    try:
        return date.fromisoformat(model.template_date)
    except ValueError as error:
        raise ValueError(f'model.template_date={model.template_date} must be a date such as "2026-01-31"') from error


def _own_limit(data: DataConfig) -> PromptLimit:
    source = f"data.max_prompt_tokens={data.max_prompt_tokens}"
    return PromptLimit(num_tokens=data.max_prompt_tokens, source=source, remedy="raise it")


def fitting_problems(problems: Sequence[Problem], renderer: PromptRenderer, skip_bad_rows: bool) -> list[Problem]:
    """Return the problems whose plain prompt is short enough; also warms the renderer's store of plain prompts.

    With `skip_bad_rows` those that are too long are counted in a warning instead of an error.

    Raises:
        ValueError: some are too long and `skip_bad_rows` is False, or all are.
    """
    fitting: list[Problem] = []
    too_long: list[str] = []
    for problem in problems:
        try:
            renderer.render(problem, PLAIN)
        except PromptTooLongError as error:
            too_long.append(str(error))
        else:
            fitting.append(problem)
    if too_long:
        shown = too_long[:MAX_REPORTED_PROBLEMS]
        if len(too_long) > len(shown):
            shown.append(f"... and {len(too_long) - len(shown)} more")
        if not skip_bad_rows or not fitting:
            raise ValueError("\n".join(shown))
        logger.warning(
            "%d problems are too long and left out, %d stay\n%s", len(too_long), len(fitting), "\n".join(shown)
        )
    return fitting


def with_fitting_demonstrations(
    problems: Sequence[Problem], renderer: PromptRenderer, max_tokens: int
) -> Sequence[Problem]:
    """Return the problems without those of their demonstrations that have more than `max_tokens` tokens
    (`rollout.max_new_tokens`), which are counted in a warning.

    Raises:
        ValueError: all have more.
    """

    def fits(response: str) -> bool:
        # Tokens take a byte at least. To make tokens of all responses may take minutes.
        return len(response.encode()) < max_tokens // 2 or len(renderer.response_ids(response)) <= max_tokens

    fitting = [
        replace(problem, demonstrations=tuple(filter(fits, problem.demonstrations)))
        if problem.demonstrations
        else problem
        for problem in problems
    ]
    num_all, num_left = (sum(len(problem.demonstrations) for problem in each) for each in (problems, fitting))
    if num_left == num_all:
        return fitting
    limit = f"rollout.max_new_tokens={max_tokens}"
    if num_left == 0:
        raise ValueError(f"all {num_all} demonstrations are longer than {limit} tokens: raise it")
    logger.warning("%d of %d demonstrations are longer than %s tokens and left out", num_all - num_left, num_all, limit)
    return fitting
