"""Servers that answer every /generate of SGLang 0.5.21 at once, with the same completion: engines without a model.

    python tools/fake_engines.py NUM_ENGINES NUM_TOKENS

Prints the URLs as one line of JSON and serves until its standard input is closed. They cost a processor far less than
who reads them: requests are not parsed, and the answer is made once.
"""

import asyncio
import json
import sys
from functools import partial
from typing import Any, cast

import numpy as np
import orjson
import uvloop

HOST = "127.0.0.1"
VOCABULARY = 151_936
VERSION = 3


def completion(num_tokens: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the token ids [R] int32 and log-probs [R] float32 that every engine answers with."""
    generator = np.random.default_rng(num_tokens)
    ids = generator.integers(0, VOCABULARY, num_tokens, dtype=np.int32)
    return ids, (-generator.exponential(0.5, num_tokens)).astype(np.float32)


def answer(num_tokens: int) -> bytes:
    """Return the HTTP answer of SGLang 0.5.21 to /generate, with `skip_tokenizer_init` and `return_logprob`."""
    ids, logprobs = (values.tolist() for values in completion(num_tokens))
    meta = {
        "id": "00000000-000000000000",
        "finish_reason": {"type": "length", "length": num_tokens},
        "prompt_tokens": 300,
        "weight_version": str(VERSION),
        "num_retractions": 0,
        "input_token_logprobs": [],
        "output_token_logprobs": [[logprob, token, None] for logprob, token in zip(logprobs, ids, strict=True)],
        "output_token_logprobs_length": num_tokens,
        "reasoning_tokens": 0,
        "completion_tokens": num_tokens,
        "cached_tokens": 0,
        "cached_tokens_details": None,
        "weight_versions": [{"version": str(VERSION), "start": 0, "end": num_tokens}],
        "dp_rank": None,
        "e2e_latency": 1.2345678,
        "response_sent_to_client_ts": 1764374400.123,
    }
    body = orjson.dumps({"output_ids": ids, "meta_info": meta})
    return _response("application/json", body)


def _response(content_type: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Connection(asyncio.Protocol):
    """Answers each request as soon as it is complete."""

    def __init__(self, generated: bytes) -> None:
        self._generated = generated
        self._other = _response("application/json", orjson.dumps({"max_total_num_tokens": 2**30}))
        """The answer to GET /server_info, for whatever else is asked too."""
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            head = self._received[:end].lower()
            _, _, length = head.partition(b"content-length:")
            size = end + 4 + (int(length.split(b"\r\n")[0]) if length else 0)
            if len(self._received) < size:
                return
            is_generation = self._received.startswith(b"POST /generate ")
            self._received = self._received[size:]
            self._transport.write(self._generated if is_generation else self._other)


async def serve(num_engines: int, num_tokens: int) -> None:
    """Listen at one port per engine, and go on until standard input ends."""
    loop = asyncio.get_running_loop()
    make = partial(Connection, answer(num_tokens))
    servers = [await loop.create_server(make, HOST, 0, backlog=1024) for _ in range(num_engines)]
    print(json.dumps([f"http://{HOST}:{server.sockets[0].getsockname()[1]}" for server in servers]), flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    uvloop.run(serve(*map(int, sys.argv[1:])))
