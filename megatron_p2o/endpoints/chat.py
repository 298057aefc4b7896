"""Chat completions of an OpenAI-compatible endpoint, with what each failure means for later requests.

The `openai` client retries, waits as long as the endpoint asks, and finds proxies. Added here: limits on the size of a
reply and on its time while it comes in.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from openai import APIConnectionError, APIStatusError, APITimeoutError, AsyncOpenAI, omit

from megatron_p2o.endpoints.bounded_client import ReplyUnreadable, http_client, is_loopback_url
from megatron_p2o.endpoints.reply import EndpointRefused
from megatron_p2o.terminal import quoted

PERMANENT_STATUSES = frozenset({401, 402, 403, 404, 405})
"""Wrong key, no money, no permission, wrong address: the next request would fare no better. Redirects are the same."""

TRANSIENT_STATUSES = frozenset({408, 409, 429})
"""Transient statuses below 500; all from 500 on are transient. The client has already retried them."""

LONGEST_PAUSE_S = 60.0
"""The client waits so long between two tries at most."""


class EndpointUnavailable(Exception):
    """The endpoint serves no request now."""

    def __init__(self, reason: str, *, is_passing: bool = False) -> None:
        """`is_passing`: busy or slow, so that a later request may fare better."""
        super().__init__(reason)
        self.is_passing = is_passing


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """Where an endpoint is, and how long its replies are waited for."""

    base_url: str
    """Address, such as https://host/v1."""
    model: str
    timeout_s: float
    """Time limit of one try."""
    max_retries: int
    api_key_env: str
    """Environment variable that holds its key, for messages."""
    settings: str
    """Dotted name of the settings that say so, for messages."""
    may_use_proxy: bool = True
    """Whether a proxy that the environment names is used; never for an address of this machine."""


class ChatEndpoint:
    """Posts to `<base_url>/chat/completions`."""

    def __init__(self, endpoint: Endpoint, api_key: str | None) -> None:
        """Raises `ValueError` when the key or a proxy of the environment cannot be used."""
        self._endpoint = endpoint
        self.url = endpoint.base_url.rstrip("/") + "/chat/completions"
        self._api_key = checked_key(api_key, endpoint.api_key_env)
        self._client = AsyncOpenAI(
            base_url=endpoint.base_url,
            api_key=self._api_key,
            timeout=endpoint.timeout_s,
            max_retries=endpoint.max_retries,
            default_headers={"Accept-Encoding": "identity"},
            http_client=http_client(
                endpoint.timeout_s, endpoint.may_use_proxy and not is_loopback_url(endpoint.base_url)
            ),
        )
        # The endpoint need not be OpenAI's: what the environment says of an account there is none of its business.
        self._client.organization = self._client.project = None

    async def complete(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        temperature: float | None = None,
        max_tokens: int | None = None,
        seed: int | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> bytes:
        """Return the body of a reply. None leaves a field out of the request.

        Raises `EndpointUnavailable` or `EndpointRefused`.
        """
        num_tries = self._endpoint.max_retries + 1
        fields: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
        given = {name: omit if value is None else value for name, value in fields.items()}
        try:
            async with asyncio.timeout(num_tries * (self._endpoint.timeout_s + LONGEST_PAUSE_S)):
                return await self._post(messages, given, extra_body or {})
        except Exception as error:  # whatever the client makes of what an endpoint sends, one reply costs itself
            raise self._meaning(error, num_tries) from error

    async def close(self) -> None:
        """Give connections back."""
        await self._client.close()

    def quotable(self, content: bytes | str) -> str:
        """Return the beginning of a message of others without the key, which some endpoints echo."""
        return quoted(self.without_key(content if isinstance(content, str) else content.decode(errors="replace")))

    def without_key(self, text: str) -> str:
        """Return a message of others with stars for the key."""
        return text.replace(self._api_key, "***") if self._api_key else text

    async def _post(
        self, messages: Sequence[Mapping[str, str]], fields: dict[str, Any], extra_body: Mapping[str, Any]
    ) -> bytes:
        # Half of a surrogate pair, which a file of problems may hold, cannot be sent.
        sendable: list[Any] = [
            {name: text.encode(errors="replace").decode() for name, text in message.items()} for message in messages
        ]
        async with self._client.chat.completions.with_streaming_response.create(
            model=self._endpoint.model, messages=sendable, extra_body=dict(extra_body), **fields
        ) as response:
            return await response.read()

    def _meaning(self, error: Exception, num_tries: int) -> Exception:
        """Return what the failure of a request means for the next one."""
        timeout = f"{self._endpoint.settings}.timeout_s"
        match error:
            case APIStatusError():
                return self._meaning_of_status(error.response, num_tries)
            case APITimeoutError():
                is_reached = not isinstance(error.__cause__, httpx.ConnectTimeout)
                what = "answer" if is_reached else "connection"
                detail = f"no {what} within {timeout}={self._endpoint.timeout_s:g}"
                return EndpointUnavailable(f"{self.url}: {detail} ({num_tries} tries)", is_passing=is_reached)
            case APIConnectionError():
                detail = self.quotable(f"{type(error.__cause__).__name__}: {error.__cause__}")
                return EndpointUnavailable(f"{self.url}: {detail} ({num_tries} tries)")
            case TimeoutError():
                return EndpointRefused(f"not complete within {timeout}")
            case ReplyUnreadable():
                return EndpointRefused("too large or packed", str(error))
            case httpx.HTTPError():
                return EndpointRefused("broken off", f"{type(error).__name__}: {error}")
            case _:
                return EndpointRefused(f"the client fails with {type(error).__name__}", self.quotable(str(error)))

    def _meaning_of_status(self, response: httpx.Response, num_tries: int) -> Exception:
        status = response.status_code
        detail = f"status {status}: {self.quotable(response.content)}"
        if status >= 500 or status in TRANSIENT_STATUSES:
            return EndpointUnavailable(f"{self.url}: {detail} ({num_tries} tries)", is_passing=True)
        if status < 400 or status in PERMANENT_STATUSES:
            return EndpointUnavailable(f"{self.url}: {detail}{self._key_hint(status)}")
        return EndpointRefused(f"the endpoint refuses with status {status}", detail, is_request_refused=True)

    def _key_hint(self, status: int) -> str:
        if status not in (401, 403):
            return ""
        state = "" if self._api_key else ", which is not set"
        return f"; check ${self._endpoint.api_key_env}{state}"


def checked_key(api_key: str | None, variable: str) -> str:
    """Return the key as a header can carry it, "" without one. Raises `ValueError`, which does not tell the key."""
    key = (api_key or "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"${variable} must hold a key of printable ASCII characters")
    return key
