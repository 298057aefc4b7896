"""An HTTP client for endpoints that are not to be trusted: every reply is bounded in size and in time."""

import asyncio
import ipaddress
import zlib
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import httpx
from openai import DefaultAsyncHttpxClient

MAX_REPLY_BYTES = 8 << 20
"""Largest reply after decompression: a hundred times what a long answer with its reasoning takes."""

SLACK_S = 1.0
"""Beyond a try's time limit: httpx, whose limits are on single steps, first says which one was slow."""


class ReplyUnreadable(Exception):
    """A reply is larger than allowed, or has an unexpected compression."""


def is_loopback_url(url: str) -> bool:
    """Return whether `url` is of this machine, to which no proxy leads."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def http_client(timeout_s: float, trust_env: bool) -> httpx.AsyncClient:
    """Return a client that bounds replies and follows no redirect, which would carry problems and answers elsewhere.

    Raises `ValueError` for a proxy of the environment that cannot be used.
    """
    try:
        return BoundedClient(timeout_s, trust_env)
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        raise ValueError(f"a proxy that the environment names cannot be used: {error}") from error


class BoundedClient(DefaultAsyncHttpxClient):
    """Gives every try `timeout_s` in all, and counts the body of its reply while it is read."""

    def __init__(self, timeout_s: float, trust_env: bool) -> None:
        super().__init__(trust_env=trust_env, follow_redirects=False)
        self._limit_s = timeout_s + SLACK_S

    async def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        deadline = asyncio.get_running_loop().time() + self._limit_s
        try:
            async with asyncio.timeout_at(deadline):
                response = await super().send(request, **options)
        except TimeoutError as error:
            raise httpx.ReadTimeout("the head of the reply is not complete", request=request) from error
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.encoding = "utf-8"  # not what the endpoint names: Python has codecs that unpack, or refuse every text
        packing = response.headers.pop("Content-Encoding", "identity").lower()
        # Of an error the status counts, and what has come of its text.
        response.stream = BoundedStream(response.stream, packing, deadline, may_be_cut=not response.is_success)
        return response


class BoundedStream(httpx.AsyncByteStream):
    """Yields the body of a reply, unpacked, and raises `ReplyUnreadable` beyond `MAX_REPLY_BYTES`.

    At `deadline`, of the clock of the event loop, it ends where it `may_be_cut`, and raises `TimeoutError` elsewhere.
    """

    def __init__(self, stream: httpx.AsyncByteStream, encoding: str, deadline: float, *, may_be_cut: bool) -> None:
        self._stream = stream
        self._encoding = encoding
        self._deadline = deadline
        self._may_be_cut = may_be_cut

    async def __aiter__(self) -> AsyncIterator[bytes]:
        is_packed = self._encoding != "identity"
        if is_packed and self._encoding not in ("gzip", "deflate"):
            raise ReplyUnreadable(f"packed with {self._encoding}, though asked for as it is")
        unpack = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # reads the headers of gzip and of deflate
        num_bytes = 0
        async for received in self._in_time():
            chunk = _unpacked(unpack, received, MAX_REPLY_BYTES + 1 - num_bytes) if is_packed else received
            num_bytes += len(chunk)
            if num_bytes > MAX_REPLY_BYTES:
                raise ReplyUnreadable(f"more than {MAX_REPLY_BYTES} bytes")
            yield chunk

    async def _in_time(self) -> AsyncIterator[bytes]:
        chunks = aiter(self._stream)
        while True:
            try:
                async with asyncio.timeout_at(self._deadline):
                    chunk = await anext(chunks)
            except StopAsyncIteration:
                return
            except TimeoutError:
                if self._may_be_cut:
                    return
                raise
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


def _unpacked(unpack: Any, packed: bytes, max_bytes: int) -> bytes:
    try:
        return unpack.decompress(packed, max_bytes)
    except zlib.error as error:
        raise ReplyUnreadable(f"damaged while packed: {error}") from error
