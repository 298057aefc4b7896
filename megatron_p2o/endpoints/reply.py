"""Reads the reply of an endpoint: an OpenAI-compatible chat completion."""

from dataclasses import dataclass
from typing import Any, cast

import orjson

from megatron_p2o.terminal import quoted

CUT_REASONS = frozenset({"length", "max_tokens"})
"""Finish reasons of a reply that its limit of tokens ended."""


class EndpointRefused(Exception):
    """The endpoint answered, but with nothing usable; the next request may do better."""

    def __init__(self, reason: str, detail: str = "", *, is_request_refused: bool = False) -> None:
        """`reason` is one of few values, `detail` quotes the reply, `is_request_refused`: the endpoint refused the
        request itself."""
        super().__init__(reason)
        self.detail = detail
        self.is_request_refused = is_request_refused


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """The first choice of a chat completion."""

    text: str
    """What the model says, its lines ended by "\\n" alone; reasoning may precede it between <think> and </think>."""
    has_reasoning: bool
    """Whether reasoning came in a field of its own."""
    is_cut: bool
    is_declined: bool
    """The endpoint itself marks the reply as a refusal."""
    prompt_tokens: int | None = None
    """Tokens of the request, by the endpoint's count; None where it gives none."""
    completion_tokens: int | None = None
    """Tokens of the reply, reasoning included; None as well."""


def read_reply(content: bytes) -> Reply:
    """Return the reply in the body of a chat completion. Raises `EndpointRefused` when it is none."""
    try:
        answer: Any = orjson.loads(content)  # refuses lone surrogates and deep nesting
        choice: Any = answer["choices"][0]
        message: Any = choice["message"]
        text, reason = _text_of(message.get("content")), str(choice.get("finish_reason"))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise EndpointRefused("not a chat completion", quoted(content)) from error
    return Reply(
        text=text,
        has_reasoning=bool(message.get("reasoning_content") or message.get("reasoning")),
        is_cut=reason.lower() in CUT_REASONS,
        is_declined=bool(message.get("refusal")) or reason == "content_filter",
        prompt_tokens=_usage(answer, "prompt_tokens"),
        completion_tokens=_usage(answer, "completion_tokens"),
    )


def _usage(answer: Any, name: str) -> int | None:
    """Return a count of the reply's `usage`; None where it is none."""
    usage = answer.get("usage")
    count = cast(dict[str, Any], usage).get(name) if isinstance(usage, dict) else None
    return count if isinstance(count, int) and not isinstance(count, bool) and count >= 0 else None


def _text_of(content: Any) -> str:
    """Return the text of a message, which may come in parts of several types and with any line ends."""
    if isinstance(content, list):
        content = "".join(str(part["text"]) for part in cast(list[Any], content) if part.get("type") == "text")
    return content.replace("\r\n", "\n").replace("\r", "\n") if isinstance(content, str) else ""
