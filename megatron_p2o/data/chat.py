"""Turns problems and templates into tokens with the model's own chat template, and tokens back into text."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_p2o.config import DataConfig, ModelConfig
from megatron_p2o.interfaces import PromptRenderer, PromptTooLongError
from megatron_p2o.types import PLAIN, Completion, Problem, Prompt, Template, TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MAX_REPORTED_PROBLEMS = 20
"""Too long problems an error lists one by one."""


class ChatRenderer:
    """The chat format of one model. Plain prompts are rendered once and kept."""

    def __init__(self, model: ModelConfig, data: DataConfig) -> None:
        """Load the tokenizer of `model.path`.

        Raises:
            ValueError: there is no tokenizer with a chat template, or `data.question_format` cannot be filled in.
        """
        self.tokenizer = _load_tokenizer(model.path)
        self.eos_token_ids = _eos_token_ids(self.tokenizer, Path(model.path))
        """Tokens that end a turn, ascending: the tokenizer's and those of generation_config.json."""
        self._enable_thinking = model.enable_thinking
        self._max_prompt_tokens = data.max_prompt_tokens
        self._question_format = data.question_format
        self._plain_ids: dict[str, TokenIds] = {}
        try:
            self.user_message("", PLAIN)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"data.question_format={data.question_format!r} must hold {{question}} and no other field "
                f"({error!r}): double literal braces"
            ) from error

    def user_message(self, question: str, template: Template) -> str:
        """Return T(x, z): the template, a blank line, the formatted question (arXiv:2603.21877)."""
        content = self._question_format.format(question=question)
        instruction = template.text.strip()
        return f"{instruction}\n\n{content}" if instruction else content

    def render(self, problem: Problem, template: Template) -> Prompt:
        """Return the prompt the engine samples from beside the bare one the gradient is taken on.

        Raises:
            PromptTooLongError: the prompt exceeds `data.max_prompt_tokens`.
        """
        plain_ids = self._plain_ids.get(problem.question)
        if plain_ids is None:
            plain_ids = self._encode(problem, PLAIN)
            self._plain_ids[problem.question] = plain_ids
        is_plain = not template.text.strip()
        sampling_ids = plain_ids if is_plain else self._encode(problem, template)
        return Prompt(problem=problem, template=template, sampling_ids=sampling_ids, training_ids=plain_ids)

    def decode(self, completion: Completion) -> str:
        """Return the response text without special tokens."""
        text = self.tokenizer.decode(
            completion.token_ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str), "one sequence decodes to one text"
        return text

    def _encode(self, problem: Problem, template: Template) -> TokenIds:
        token_ids = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": self.user_message(problem.question, template)}],
            add_generation_prompt=True,
            enable_thinking=self._enable_thinking,
            tokenize=True,
            return_dict=False,
        )
        if len(token_ids) > self._max_prompt_tokens:
            asked = "plainly" if template.id == PLAIN.id else f"through template {template.id}"
            raise PromptTooLongError(
                f"problem {problem.id} asked {asked} takes {len(token_ids)} tokens, more than data.max_prompt_tokens="
                f"{self._max_prompt_tokens}: raise it, or leave the problem or the template out"
            )
        array = np.asarray(token_ids, dtype=np.int32)
        array.setflags(write=False)
        return array


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


def _load_tokenizer(path: str) -> "PreTrainedTokenizerBase":
    # Imported here: transformers takes seconds to import, and batches or tests without a model do not need it.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"model.path={path} holds no tokenizer ({error}): give a Hugging Face directory") from error
    if not tokenizer.chat_template:
        raise ValueError(f"model.path={path} has a tokenizer without a chat template: use an instruction-tuned model")
    return tokenizer


def _eos_token_ids(tokenizer: "PreTrainedTokenizerBase", path: Path) -> tuple[int, ...]:
    found: set[int] = set()
    if isinstance(tokenizer.eos_token_id, int):
        found.add(tokenizer.eos_token_id)
    generation_file = path / "generation_config.json"
    if generation_file.is_file():
        named = json.loads(generation_file.read_text()).get("eos_token_id")
        found |= set(named) if isinstance(named, list) else {named} if isinstance(named, int) else set()
    if not found:
        raise ValueError(f"model.path={path} names no end-of-sequence token: set eos_token in its tokenizer")
    return tuple(sorted(found))
