"""Reads what SGLang answers: its statuses, and the JSON of /generate, with a triple per token, as arrays.

Only the fields that are used are read, into structs that Python's garbage collector does not visit: a plain reader
makes a list per token, and the collections that those set off take longer than the reading.
"""

from dataclasses import dataclass

import msgspec
import numpy as np

from megatron_p2o.types import FinishReason, Logprobs, TokenIds

GONE = 502
"""Status with which a relay or a node's daemon says that the engine behind it is gone; SGLang has no use for it."""

NOT_THE_REQUEST = (401, 403, 404, 405)
"""4xx statuses that mean a wrong server or a wrong key rather than a bad request."""


class EngineUnreachable(RuntimeError):
    """The connection was refused, reset or cut: the server is gone."""


class EngineRefused(RuntimeError):
    """The server answered with an error: the request is at fault, or the server's state is."""


class RequestRefused(EngineRefused):
    """The request is at fault: another one may be served."""


class AnswerUnreadable(ValueError):
    """It is not what SGLang answers to /generate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """What a server sampled."""

    token_ids: TokenIds
    """[R]"""
    logprobs: Logprobs
    """[R] at the sampling temperature; of the unscaled distribution for greedy sampling. Not renormalised for top_p."""
    finish_reason: FinishReason
    weight_versions: tuple[int, ...]
    """Oldest first."""


class _Token(msgspec.Struct, array_like=True, gc=False):
    """SGLang's triple, whose third part is the token's text where it has a tokenizer."""

    logprob: float | None
    """None, which is how JSON writes nan, is nan; the first token of a prompt has none either."""
    id: int


class _Span(msgspec.Struct, gc=False):
    version: str


class _Reason(msgspec.Struct, gc=False):
    type: FinishReason


class _Meta(msgspec.Struct):
    finish_reason: _Reason
    weight_version: str
    weight_versions: list[_Span] | None = None
    """Those of the tokens, oldest first."""
    output_token_logprobs: list[_Token] | None = None
    input_token_logprobs: list[_Token] | None = None


class _Answer(msgspec.Struct):
    meta_info: _Meta


_decoder = msgspec.json.Decoder(_Answer)


def check_status(url: str, status: int, answer: bytes) -> None:
    """Raise what an answer's status says.

    Raises:
        EngineUnreachable, EngineRefused, RequestRefused
    """
    if status == 200:
        return
    words = answer.decode(errors="replace")
    if status == GONE:
        raise EngineUnreachable(f"{url}: {words}")
    is_at_fault = 400 <= status < 500 and status not in NOT_THE_REQUEST
    raise (RequestRefused if is_at_fault else EngineRefused)(f"{url}: {status} {words[:500]}")


def read_answer(answer: bytes, num_scored: int) -> Generation:
    """Return a completion, or the log-probs of the prompt's last `num_scored` tokens if that is not 0.

    Raises:
        AnswerUnreadable
    """
    return parse_scores(answer, num_scored) if num_scored else parse_generation(answer)


def parse_generation(answer: bytes) -> Generation:
    """Return the sampled tokens of an answer.

    Raises:
        AnswerUnreadable
    """
    meta = _read(answer)
    return _generation(meta, meta.output_token_logprobs or [])


def parse_scores(answer: bytes, num_scored: int) -> Generation:
    """Return the prompt's last `num_scored` tokens of an answer; without log-probs of them all, it is an "abort".

    Raises:
        AnswerUnreadable
    """
    meta = _read(answer)
    tokens = (meta.input_token_logprobs or [])[-num_scored:]
    if meta.finish_reason.type == "abort" or len(tokens) < num_scored:
        meta.finish_reason.type = "abort"
        tokens = []
    return _generation(meta, tokens)


def _read(answer: bytes) -> _Meta:
    try:
        return _decoder.decode(answer).meta_info
    except msgspec.DecodeError as error:
        raise AnswerUnreadable(f"not an answer of SGLang 0.5.21: {error}") from error


def _generation(meta: _Meta, tokens: list[_Token]) -> Generation:
    spans = meta.weight_versions or [_Span(version=meta.weight_version)]
    return Generation(
        token_ids=np.array([token.id for token in tokens], dtype=np.int32),
        logprobs=np.array([token.logprob for token in tokens], dtype=np.float32),
        finish_reason=meta.finish_reason.type,
        weight_versions=tuple(dict.fromkeys(int(span.version) for span in spans)),
    )
