"""Reflection by a language model behind an OpenAI-compatible endpoint: a hosted one, or the initial policy's server."""

import asyncio
import json
import random
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp

from megatron_p2o.config import ReflectionConfig
from megatron_p2o.evolve.reflection import (
    ReflectionRefused,
    ReflectionRequest,
    ReflectionUnavailable,
    extract_template,
    reflection_prompt,
)
from megatron_p2o.seeds import seed_of

PERMANENT_STATUSES = frozenset({401, 403, 404, 405})
"""Wrong key, no permission, wrong address: the next request would fare no better."""

TRANSIENT_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Worth a retry; any other refusal is about this one request."""

BASE_DELAY_S = 1.0
"""Before the first retry; doubles each time, with jitter of half to one and a half."""

MAX_DELAY_S = 60.0
"""Longest wait before a retry, also where Retry-After asks for more."""

MAX_DETAIL_CHARS = 200
"""Of an error page that is quoted in messages."""


class TransientError(Exception):
    """This try failed; another may not."""

    def __init__(self, detail: str, retry_after_s: float | None = None) -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s


class ChatCompletions:
    """A `Reflector` that posts to `<base_url>/chat/completions`."""

    def __init__(
        self,
        config: ReflectionConfig,
        api_key: str | None,
        seed: int,
        extra_fields: Mapping[str, Any] | None = None,
        base_delay_s: float = BASE_DELAY_S,
    ) -> None:
        """`extra_fields` go into every request. Raises `ValueError` when the endpoint is not named."""
        if not config.base_url or not config.model:
            raise ValueError(
                f"evolution.reflection.backend={config.backend} needs evolution.reflection.base_url and .model"
            )
        self._config = config
        self._url = config.base_url.rstrip("/") + "/chat/completions"
        self._api_key = api_key
        self._seed = seed
        self._extra_fields = dict(extra_fields or {})
        self._base_delay_s = base_delay_s
        self._session: aiohttp.ClientSession | None = None

    async def propose(self, request: ReflectionRequest) -> str:
        """Raises `ReflectionUnavailable` at once for a permanent refusal, else after `max_retries` retries."""
        rng = random.Random(f"retry/{self._seed}/{request.proposal}")
        body = self._body(reflection_prompt(request))
        if self._config.backend == "self":
            # A deterministic engine answers every request without a seed from one and the same.
            body["seed"] = seed_of(self._seed, "reflection", request.proposal)
        num_tries = self._config.max_retries + 1
        for attempt in range(num_tries):
            try:
                return extract_template(await self._complete(body))
            except TransientError as error:
                if attempt + 1 == num_tries:
                    raise ReflectionUnavailable(f"{self._url}: {error} ({num_tries} tries)") from error
                await asyncio.sleep(retry_delay_s(attempt, self._base_delay_s, error.retry_after_s, rng))
        raise AssertionError("the last try returned or raised")

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _body(self, prompt: str) -> dict[str, Any]:
        return {
            "model": self._config.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": self._config.temperature,
            "max_tokens": self._config.max_tokens,
            **self._extra_fields,
        }

    async def _complete(self, body: Mapping[str, Any]) -> str:
        """Return the answer's text. Raise `TransientError`, `ReflectionUnavailable` or `ReflectionRefused`."""
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=self._config.timeout_s)
            self._session = aiohttp.ClientSession(timeout=timeout)
        headers = {} if self._api_key is None else {"Authorization": f"Bearer {self._api_key}"}
        try:
            # A redirect would carry the key to another host.
            async with self._session.post(self._url, json=body, headers=headers, allow_redirects=False) as response:
                content = await response.read()
                if response.status != 200:
                    raise self._failure(response.status, content, response.headers.get("Retry-After"))
        except TimeoutError as error:
            raise TransientError(f"no answer within {self._config.timeout_s:g} s") from error
        except aiohttp.ClientError as error:
            raise TransientError(f"{type(error).__name__}: {error}") from error
        return answer_text(content)

    def _failure(self, status: int, content: bytes, retry_after: str | None) -> Exception:
        detail = f"status {status}: {self._quotable(content)}"
        if status in TRANSIENT_STATUSES:
            return TransientError(detail, retry_after_s(retry_after))
        if status in PERMANENT_STATUSES:
            hint = f"; check ${self._config.api_key_env}" if status in (401, 403) else ""
            return ReflectionUnavailable(f"{self._url}: {detail}{hint}")
        return ReflectionRefused(f"the endpoint refuses the request with status {status}")

    def _quotable(self, content: bytes) -> str:
        """Return the beginning of an error page without the key, which some endpoints echo."""
        text = content.decode(errors="replace")
        if self._api_key:
            text = text.replace(self._api_key, "***")
        return " ".join(text.split())[:MAX_DETAIL_CHARS]


def answer_text(content: bytes) -> str:
    """Return the first choice's text of a chat completion. Raise `TransientError` when there is none."""
    try:
        answer: Any = json.loads(content)
        text: Any = answer["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise TransientError(f"not a chat completion: {content[:80]!r}") from error
    if not isinstance(text, str) or not text.strip():
        raise TransientError("an empty answer")
    return text


def retry_delay_s(attempt: int, base_s: float, retry_after: float | None, rng: random.Random) -> float:
    """Return the wait before the retry after try `attempt` (from 0): what the endpoint asks for, else doubling."""
    wanted = retry_after if retry_after is not None else base_s * 2**attempt * rng.uniform(0.5, 1.5)
    return min(wanted, MAX_DELAY_S)


def retry_after_s(header: str | None) -> float | None:
    """Return how long a Retry-After header asks to wait (seconds or a date); None when it says nothing usable."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        moment = parsedate_to_datetime(header)
    except ValueError:
        return None
    return max(0.0, (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
