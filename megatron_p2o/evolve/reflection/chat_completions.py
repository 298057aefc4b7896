"""Reflection by a language model behind an OpenAI-compatible endpoint: a hosted one, or the initial policy's server.

The `openai` client retries, waits as long as the endpoint asks, and finds proxies. Added here: limits on the size of a
reply and on its time while it comes in, and what each failure means for the round.
"""

import asyncio
import ipaddress
import zlib
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx
from openai import APIConnectionError, APIStatusError, APITimeoutError, AsyncOpenAI, DefaultAsyncHttpxClient, omit

from megatron_p2o.config.tree import ReflectionConfig
from megatron_p2o.evolve.reflection.endpoint import endpoint_of
from megatron_p2o.evolve.reflection.reflection import (
    ReflectionRefused,
    ReflectionRequest,
    ReflectionUnavailable,
    quoted,
    reflection_prompt,
)
from megatron_p2o.evolve.reflection.reply import Reply, read_reply, template_of
from megatron_p2o.seeds import seed_of

PERMANENT_STATUSES = frozenset({401, 402, 403, 404, 405})
"""Wrong key, no money, no permission, wrong address: the next request would fare no better. Redirects are the same."""

TRANSIENT_STATUSES = frozenset({408, 409, 429})
"""Of those below 500; from there on all are. The client has tried them again."""

MAX_REFUSED_REQUESTS = 5
"""In a row before evolution pauses: an endpoint that refuses a field of the request refuses it in all."""

MAX_USELESS_REPLIES = 20
"""In a row before evolution pauses: a model that fails three times out of four gives so many once in 300 rows."""

MAX_REPLY_BYTES = 8 << 20
"""Of a reply, unpacked: a hundred times what `evolution.reflection.max_tokens` and long reasoning take."""

LONGEST_WAIT_S = 60.0
"""The client waits so long between two tries at most."""


SLACK_S = 1.0
"""Beyond `evolution.reflection.timeout_s`: httpx, whose limits are on single steps, first says which one was slow."""


class ReplyUnreadable(Exception):
    """A reply is larger than allowed, or packed in a way nobody asked for."""


class ChatCompletions:
    """A `Reflector` that posts to `<base_url>/chat/completions`."""

    def __init__(
        self,
        config: ReflectionConfig,
        api_key: str | None,
        seed: int,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        """`extra_body` goes into every request, beneath `config.extra_body`.

        Raises `ValueError` when the endpoint is not named, or the key or a proxy of the environment cannot be used.
        """
        base_url, model = endpoint_of(config)
        self._config = config
        self._url = base_url.rstrip("/") + "/chat/completions"
        self._model = model
        self._api_key = _checked_key(api_key, config.api_key_env)
        self._seed = seed
        self._extra_body = {**(extra_body or {}), **config.extra_body}
        self._client = AsyncOpenAI(
            base_url=base_url,
            api_key=self._api_key,
            timeout=config.timeout_s,
            max_retries=config.max_retries,
            default_headers={"Accept-Encoding": "identity"},
            http_client=_http_client(config.timeout_s, config.backend == "openai" and not is_loopback(base_url)),
        )
        # The endpoint need not be OpenAI's: what the environment says of an account there is none of its business.
        self._client.organization = self._client.project = None
        self._num_refused = self._num_useless = 0
        """In a row."""

    async def propose(self, request: ReflectionRequest) -> str:
        """Raises `ReflectionUnavailable` for what the next request would meet as well, or after too many bad ones."""
        try:
            reply = await self._reply_to(reflection_prompt(request), request.proposal)
            self._num_refused = 0
            template = template_of(reply, request.parent_text)
        except ReflectionRefused as refused:
            self._num_useless += 1
            if self._num_refused >= MAX_REFUSED_REQUESTS or self._num_useless >= MAX_USELESS_REPLIES:
                detail = f": {refused.detail}" if refused.detail else ""
                raise ReflectionUnavailable(
                    f"{self._url}: the last {self._num_useless} requests gave no template, the last one: "
                    f"{refused}{detail}"
                ) from refused
            raise
        self._num_useless = 0
        return template

    async def probe(self) -> None:
        """Ask for one word, as for a template. Raises `ReflectionUnavailable` or `ReflectionRefused`."""
        await self._reply_to("Reply with the word ready.", 0)

    async def close(self) -> None:
        await self._client.close()

    async def _reply_to(self, prompt: str, proposal: int) -> Reply:
        body = await self._complete(prompt, proposal)
        try:
            return read_reply(body)
        except ReflectionRefused as refused:
            raise ReflectionRefused(str(refused), self._quotable(body)) from refused

    async def _complete(self, prompt: str, proposal: int) -> bytes:
        """Return the body of a reply. Raises `ReflectionUnavailable` or `ReflectionRefused`."""
        num_tries = self._config.max_retries + 1
        try:
            async with asyncio.timeout(num_tries * (self._config.timeout_s + LONGEST_WAIT_S)):
                return await self._post(prompt, proposal)
        except APIStatusError as error:
            raise self._failure(error.response) from error
        except APITimeoutError as error:
            is_reached = not isinstance(error.__cause__, httpx.ConnectTimeout)
            what = "answer" if is_reached else "connection"
            detail = f"no {what} within evolution.reflection.timeout_s={self._config.timeout_s:g}"
            raise ReflectionUnavailable(f"{self._url}: {detail} ({num_tries} tries)", is_passing=is_reached) from error
        except APIConnectionError as error:
            detail = f"{type(error.__cause__).__name__}: {error.__cause__}"
            raise ReflectionUnavailable(f"{self._url}: {self._quotable(detail)} ({num_tries} tries)") from error
        except TimeoutError as error:
            raise ReflectionRefused("not complete within evolution.reflection.timeout_s") from error
        except ReplyUnreadable as error:
            raise ReflectionRefused("too large or packed", str(error)) from error
        except httpx.HTTPError as error:
            raise ReflectionRefused("broken off", f"{type(error).__name__}: {error}") from error
        except Exception as error:  # whatever the client makes of what an endpoint sends, one reply costs itself
            raise ReflectionRefused(
                f"the client fails with {type(error).__name__}", self._quotable(str(error))
            ) from error

    async def _post(self, prompt: str, proposal: int) -> bytes:
        config = self._config
        async with self._client.chat.completions.with_streaming_response.create(
            model=self._model,
            # Half of a surrogate pair, which a file of problems may hold, cannot be sent.
            messages=[{"role": "user", "content": prompt.encode(errors="replace").decode()}],
            temperature=omit if config.temperature is None else config.temperature,
            max_tokens=omit if config.max_tokens is None else config.max_tokens,
            # A deterministic engine answers every request without a seed from one and the same.
            seed=seed_of(self._seed, "reflection", proposal) if config.backend == "self" else omit,
            extra_body=self._extra_body,
        ) as response:
            return await response.read()

    def _failure(self, response: httpx.Response) -> Exception:
        status = response.status_code
        detail = f"status {status}: {self._quotable(response.content)}"
        if status >= 500 or status in TRANSIENT_STATUSES:
            tries = f" ({self._config.max_retries + 1} tries)"
            return ReflectionUnavailable(f"{self._url}: {detail}{tries}", is_passing=True)
        if status < 400 or status in PERMANENT_STATUSES:
            return ReflectionUnavailable(f"{self._url}: {detail}{self._key_hint(status)}")
        self._num_refused += 1
        return ReflectionRefused(f"the endpoint refuses with status {status}", detail)

    def _key_hint(self, status: int) -> str:
        if status not in (401, 403):
            return ""
        state = "" if self._api_key else ", which is not set"
        return f"; check ${self._config.api_key_env}{state}"

    def _quotable(self, content: bytes | str) -> str:
        """Return the beginning of a message of others without the key, which some endpoints echo."""
        text = content if isinstance(content, str) else content.decode(errors="replace")
        return quoted(text.replace(self._api_key, "***") if self._api_key else text)


def _checked_key(api_key: str | None, variable: str) -> str:
    """Return the key as a header can carry it, "" without one. Raises `ValueError`, which does not tell the key."""
    key = (api_key or "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"${variable} must hold a key of printable ASCII characters")
    return key


def is_loopback(url: str) -> bool:
    """Return whether `url` is of this machine, to which no proxy leads."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _http_client(timeout_s: float, trust_env: bool) -> httpx.AsyncClient:
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
