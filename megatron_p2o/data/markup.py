"""Keeps a user's text from becoming chat markup: whatever it holds, it tokenises to ordinary tokens."""

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """What the chat template writes around a user's text."""

    before: str
    after: str

    def inside(self, text: str) -> str | None:
        """Return what stands in the frame, None when `text` is not framed by it."""
        is_framed = text.startswith(self.before) and text.endswith(self.after)
        is_framed = is_framed and len(text) >= len(self.before) + len(self.after)
        return text[len(self.before) : len(text) - len(self.after)] if is_framed else None


class MarkupEncoder:
    """Turns a framed user's text into tokens; control tokens come from the frame alone.

    Control tokens are the tokenizer's special tokens and whatever else it keeps apart from its vocabulary and the chat
    template writes (`</think>`). A text without them gets exactly the tokens the tokenizer gives it.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", frame: Frame) -> None:
        self._tokenizer, self._frame = tokenizer, frame
        self._control = control_tokens(tokenizer)
        self._ids = frozenset(self._control.values())
        pattern = any_of(self._control)
        self._expected = [self._control[name] for text in (frame.before, frame.after) for name in pattern.findall(text)]
        """The control tokens of every prompt, in order."""
        self._disguised: _DisguisedTokenizer | None = None
        """Made when a text with markup comes: that of a large vocabulary takes seconds."""

    def encode(self, text: str, content: str) -> list[int]:
        """Return the tokens of a prompt.

        Args:
            text: the chat template's rendering of `content`.
            content: what the user says.

        Raises:
            ValueError: `content` holds markup and the tokenizer has no form that takes it for text.
        """
        token_ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        inside = self._frame.inside(text)
        is_kept = inside in (content, content.strip())
        if is_kept and self._is_harmless(token_ids):
            return token_ids
        if self._disguised is None:
            self._disguised = _DisguisedTokenizer(self._tokenizer, self._control)
        token_ids = self._disguised.encode(self._frame, inside if is_kept and inside is not None else content.strip())
        if not self._is_harmless(token_ids):
            raise ValueError(f"chat markup in {content!r:.200} cannot be taken for text by this model's tokenizer")
        return token_ids

    def _is_harmless(self, token_ids: Sequence[int]) -> bool:
        return [token for token in token_ids if token in self._ids] == self._expected


def control_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """Return the ids of all control tokens by their text. The unknown token counts as text."""
    template = str(tokenizer.get_chat_template())
    return {
        token.content: number
        for number, token in tokenizer.added_tokens_decoder.items()
        if number != tokenizer.unk_token_id
        and (token.special or (token.content in template and not _is_text(token.content)))
    }


def any_of(names: Sequence[str] | dict[str, int]) -> re.Pattern[str]:
    """Return a pattern that finds any of `names`, the longest where one begins another."""
    by_length = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, by_length)) or r"(?!)")


def _is_text(content: str) -> bool:
    """Whether an added token is a piece of vocabulary: a run of blanks, or a word."""
    return not content.strip() or content.strip().isalnum()


class _DisguisedTokenizer:
    """The tokenizer with secret names for its control tokens, so that the usual names in a text are text."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", control: dict[str, int]) -> None:
        from tokenizers import Tokenizer

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ValueError(
                "a problem or template holds chat markup, and the model's tokenizer is none of the `tokenizers` "
                "library: convert it to tokenizer.json, or leave the markup out"
            )
        secret = secrets.token_hex(16)
        self._names = {name: f"{secret}.{index}." for index, name in enumerate(control)}
        self._pattern = any_of(control)
        settings = json.loads(backend.to_str())
        added = {token["content"]: token["id"] for token in settings["added_tokens"]}
        self._tokenizer = _renamed(settings, self._names)
        # Loading numbers the added tokens anew.
        self._ids = {self._tokenizer.token_to_id(self._names.get(name, name)): number for name, number in added.items()}

    def encode(self, frame: Frame, user_text: str) -> list[int]:
        text = self._disguised(frame.before) + user_text + self._disguised(frame.after)
        token_ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [self._ids.get(token, token) for token in token_ids]

    def _disguised(self, text: str) -> str:
        return self._pattern.sub(lambda found: self._names[found[0]], text)


def _renamed(settings: dict[str, Any], names: dict[str, str]) -> "Tokenizer":
    """Return the tokenizer that `settings` (tokenizer.json) describe with some tokens under other names."""
    from tokenizers import Tokenizer

    for token in settings["added_tokens"]:
        if token["content"] in names:
            token |= {"content": names[token["content"]], "normalized": False, "single_word": False}
    model = settings["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): number for piece, number in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    settings |= {"truncation": None, "padding": None, "post_processor": None}
    return Tokenizer.from_str(json.dumps(settings))
