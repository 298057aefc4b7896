"""What is a chat completion, and what an endpoint sends instead."""

import pytest

from megatron_p2o.endpoints.reply import EndpointRefused, read_reply
from megatron_p2o.terminal import quoted


@pytest.mark.parametrize(
    "content",
    [
        b"<html>not json</html>",
        b'{"choices": []}',
        b"[1, 2]",
        b'{"choices": [{"message": null}]}',
        b'{"choices": [{"message": {"content": [1]}}]}',
        b'{"choices": [{"message": {"content": "a \\ud800 b"}}]}',
        b"[" * 100_000,
        b'{"choices": [{"message": {"content": ' + b"[" * 50_000 + b"]" * 50_000 + b"}}]}",
        b"\xff\xfe",
        b"",
    ],
)
def test_what_is_no_chat_completion_is_refused_and_quoted(content: bytes) -> None:
    with pytest.raises(EndpointRefused, match="not a chat completion") as refused:
        read_reply(content)
    assert refused.value.detail == quoted(content)
