"""What is read of SGLang's answers; the arrays are those of a plain reader, bit for bit."""

import json
from typing import Any

import numpy as np
import pytest

from megatron_p2o.rollout.servers.answers import AnswerUnreadable, parse_generation, parse_scores


def answer(tokens: list[list[Any]] | None, reason: str = "stop", **meta: Any) -> bytes:
    """Return an answer in SGLang's words, with fields that nobody reads."""
    known = {"id": "a", "finish_reason": {"type": reason, "matched": 9}, "weight_version": "4", "e2e_latency": 1.5}
    return json.dumps({"output_ids": [9], "meta_info": {**known, "output_token_logprobs": tokens, **meta}}).encode()


def scored(tokens: list[list[Any]], reason: str = "length") -> bytes:
    return answer([], reason, input_token_logprobs=tokens)


def test_arrays_are_those_of_a_plain_reader_bit_for_bit() -> None:
    generator = np.random.default_rng(0)
    ids, logprobs = generator.integers(0, 1 << 31, 5000), -np.exp(generator.normal(0, 20, 5000)).astype(np.float32)
    body = answer([[float(logprob), int(token), None] for logprob, token in zip(logprobs, ids, strict=True)])
    triples = json.loads(body)["meta_info"]["output_token_logprobs"]
    generation = parse_generation(body)
    assert (generation.token_ids.dtype, generation.logprobs.dtype) == (np.int32, np.float32)
    np.testing.assert_array_equal(generation.token_ids, [token for _, token, _ in triples])
    plain = np.array([logprob for logprob, _, _ in triples], np.float32)
    np.testing.assert_array_equal(generation.logprobs.view(np.int32), plain.view(np.int32))
    np.testing.assert_array_equal(generation.logprobs, logprobs)
    assert generation.token_ids.flags.writeable and generation.logprobs.flags.writeable


def test_a_log_prob_that_json_cannot_say_is_nan() -> None:
    generation = parse_generation(answer([[-0.25, 9, None], [None, 4, "text"]]))
    assert generation.token_ids.tolist() == [9, 4]
    np.testing.assert_array_equal(generation.logprobs, np.array([-0.25, np.nan], np.float32))


@pytest.mark.parametrize("reason", ["stop", "length", "abort"])
def test_reason_and_versions_are_those_of_the_answer(reason: str) -> None:
    spans = [{"version": version, "start": 0, "end": 1} for version in ("3", "3", "5")]
    generation = parse_generation(answer([], reason, weight_versions=spans))
    assert (generation.finish_reason, generation.weight_versions) == (reason, (3, 5))
    assert parse_generation(answer(None)).weight_versions == (4,) and parse_generation(answer(None)).token_ids.size == 0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b'{"meta_info": {}}',
        answer([[-0.5, "9", None]]),
        answer([[-0.5]]),
        answer([], "cancelled"),
        answer([[-0.5, 9, None]])[:-9],
    ],
)
def test_what_is_no_answer_is_an_error(body: bytes) -> None:
    with pytest.raises(AnswerUnreadable, match="not an answer of SGLang"):
        parse_generation(body)


def test_log_probs_of_given_tokens_are_those_after_the_first_which_has_none() -> None:
    generation = parse_scores(scored([[None, 5, None], [-0.5, 6, None], [-1.5, 7, None]]), 2)
    assert generation.logprobs.tolist() == [-0.5, -1.5] and generation.logprobs.dtype == np.float32
    assert generation.token_ids.tolist() == [6, 7]
    assert (generation.finish_reason, generation.weight_versions) == ("length", (4,))


@pytest.mark.parametrize(
    "body",
    [
        scored([[None, 5, None], [-0.5, 6, None], [-1.5, 7, None]], reason="abort"),
        scored([[-1.5, 7, None]]),
        scored([]),
    ],
    ids=["aborted", "too few", "none"],
)
def test_without_all_log_probs_the_request_counts_as_given_up(body: bytes) -> None:
    generation = parse_scores(body, 2)
    assert (generation.finish_reason, len(generation.token_ids), len(generation.logprobs)) == ("abort", 0, 0)
