"""Reads what SGLang answers to /generate: JSON with a triple per token, made into arrays.

Only the fields that are used are read, into structs that Python's garbage collector does not visit: a plain reader
makes a list per token, and the collections that those set off take longer than the reading.
"""

from dataclasses import dataclass

import msgspec
import numpy as np

from megatron_p2o.types import FinishReason, Logprobs, TokenIds


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
