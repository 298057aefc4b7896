"""Reads and checks the model's tokenizer, and finds the tokens that end a response."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_p2o.files import read_json_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "What is 6 x 7?"
"""A text that every tokenizer of a language model takes."""

PROBE_ANSWER = "It is 42."


ERRORS_OF_EXPRESSIONS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What a chat template, which is a program, may raise besides jinja's own errors."""


class ChatTemplateError(ValueError):
    """The model's chat template fails on a conversation."""


def load_tokenizer(path: str) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of the model directory `path`.

    Raises:
        ValueError: there is none, it knows no words, or it has no chat template.
    """
    # Imported here: transformers takes seconds to import, and batches or tests without a model do not need it.
    from huggingface_hub.errors import StrictDataclassError  # of a config.json whose values cannot be
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError, StrictDataclassError) as error:
        raise ValueError(f"model.path={path} holds no tokenizer ({error}): give a Hugging Face directory") from error
    # transformers makes an empty tokenizer, without a word, for a model type it knows and finds no files of.
    if not tokenizer.encode(PROBE, add_special_tokens=False):
        raise ValueError(
            f"model.path={path} holds no tokenizer that knows a word: {PROBE!r} gives no token. Copy tokenizer.json "
            "and tokenizer_config.json of the model there"
        )
    if not tokenizer.chat_template:
        raise ValueError(f"model.path={path} has a tokenizer without a chat template: use an instruction-tuned model")
    return tokenizer


def chat_text(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Mapping[str, str]], path: str | Path, **options: Any
) -> str:
    """Return the text that the chat template renders for a conversation.

    Args:
        path: the model directory that the template comes from; errors name it.
        options: see `apply_chat_template`.

    Raises:
        ChatTemplateError: the template fails on it.
    """
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False, **options)
    except (TemplateError, *ERRORS_OF_EXPRESSIONS) as error:
        raise ChatTemplateError(
            f"model.path={path} has a chat template that fails on a user's message ({error}): correct it, or use an "
            "instruction-tuned model"
        ) from error
    assert isinstance(text, str), "one conversation is one text"
    return text


def end_of_response_ids(tokenizer: "PreTrainedTokenizerBase", path: Path) -> tuple[int, ...]:
    """Return every token that ends a response, ascending: the one answer for engines, training and evaluation.

    They are the end-of-sequence tokens of generation_config.json, config.json and the tokenizer, and the special token
    by which the chat template ends an assistant's turn. A model that was tuned from a base often keeps the base's
    token in some of these places, and ends its turns by another.

    Raises:
        ValueError: there is none.
    """
    found = {
        token for name in ("generation_config.json", "config.json") for token in _named_ids(path / name, "eos_token_id")
    }
    if isinstance(tokenizer.eos_token_id, int):
        found.add(tokenizer.eos_token_id)
    found.update(_end_of_turn(tokenizer, path))
    if not found:
        raise ValueError(f"model.path={path} names no end-of-sequence token: set eos_token in its tokenizer")
    return tuple(sorted(found))


def end_of_turn_id(tokenizer: "PreTrainedTokenizerBase", path: Path) -> int:
    """Return the token that ends a response which was not sampled: the chat template's, else the tokenizer's own.

    Raises as `end_of_response_ids`.
    """
    for token in (*_end_of_turn(tokenizer, path), tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return end_of_response_ids(tokenizer, path)[0]


def _named_ids(path: Path, field: str) -> Sequence[int]:
    """Return the ids a JSON file names under `field`: one, several or none."""
    if not path.is_file():
        return ()
    named = read_json_object(path).get(field)
    ids: list[Any] = named if isinstance(named, list) else [] if named is None else [named]
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
        raise ValueError(f"{path}: {field} is {named!r:.80}, must be the id of a token or a list of such")
    return ids


def _end_of_turn(tokenizer: "PreTrainedTokenizerBase", path: Path) -> Sequence[int]:
    """Return the special token that follows an assistant's message in the chat template; empty where none does."""
    chat = [{"role": "user", "content": PROBE}, {"role": "assistant", "content": PROBE_ANSWER}]
    try:
        text = chat_text(tokenizer, chat, path)
    except ChatTemplateError:
        return ()  # a template of single questions: how it ends a turn is not known
    _, found, rest = text.rpartition(PROBE_ANSWER)
    following = tokenizer.encode(rest, add_special_tokens=False) if found else []
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [token for token in following if token in special][:1]
