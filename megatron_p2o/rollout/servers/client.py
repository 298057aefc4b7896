"""The routes of one SGLang server, with tokens in and tokens out. Lives on the broker's event loop."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import aiohttp
import orjson

from megatron_p2o.rollout.buckets.staging import StagingBuffer
from megatron_p2o.rollout.buckets.weight_message import MemoryAddress
from megatron_p2o.rollout.servers.answers import AnswerUnreadable, Generation, parse_generation, parse_scores
from megatron_p2o.types import SamplingParams, TokenIds

WEIGHTS, KV_CACHE = "weights", "kv_cache"
"""What a server can give the memory of away; SGLang's names."""

GONE = 502
"""Status with which a node's daemon says that the engine behind it is gone; SGLang has no use for it."""


NOT_THE_REQUEST = (401, 403, 404, 405)
"""4xx statuses that mean a wrong server or a wrong key rather than a bad request."""


class EngineUnreachable(RuntimeError):
    """The connection was refused, reset or cut: the server is gone."""


class EngineRefused(RuntimeError):
    """The server answered with an error: the request is at fault, or the server's state is."""


class RequestRefused(EngineRefused):
    """The request is at fault: another one may be served."""


class Mirror(Protocol):
    """Copies of the trainer's buckets on another machine."""

    async def place(self, bucket: StagingBuffer) -> MemoryAddress:
        """Return where the bucket lies there, after bringing it there.

        Raises:
            EngineUnreachable, TimeoutError
        """
        ...


class EngineClient:
    """HTTP client of one server. Create and use it on one event loop."""

    def __init__(
        self,
        base_url: str,
        api_key: str,
        admin_key: str,
        stop_token_ids: Sequence[int],
        answer_timeout_s: float,
        mirror: Mirror | None = None,
    ) -> None:
        """Args:
        stop_token_ids: end-of-sequence ids of the model.
        answer_timeout_s: longest wait for the answer to anything but a generation.
        mirror: of an engine on another machine, where it finds the weights.
        """
        self._base_url = base_url
        self._user = {"Authorization": f"Bearer {api_key}"}
        self._admin = {"Authorization": f"Bearer {admin_key}"}
        self._stop_token_ids = list(stop_token_ids)
        self._answer_timeout_s = answer_timeout_s
        self._mirror = mirror
        self._released: set[str] = set()
        # The broker bounds the requests in flight; the connector must not bound them a second time.
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))

    async def generate(
        self,
        token_ids: TokenIds,
        sampling: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> Generation:
        """Sample one continuation.

        `sampling.seed` is honoured by servers with `enable_deterministic_inference`, `priority` (higher goes first) by
        those with `enable_priority_scheduling`. Without `timeout_s` it is for the caller to give up.

        Raises:
            TimeoutError: no answer within `timeout_s`; the server may still be at work on it, see `abort`.
            RequestRefused: this request, for instance one that is too long for the model.
            EngineUnreachable, EngineRefused
        """
        parameters: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_new_tokens": sampling.max_new_tokens,
            "stop_token_ids": self._stop_token_ids,
        }
        if sampling.seed is not None:
            parameters["sampling_seed"] = sampling.seed
        request = {
            "rid": request_id,
            "input_ids": token_ids.tolist(),
            "sampling_params": parameters,
            "return_logprob": True,
            "priority": priority,
        }
        return await self._generate(request, parse_generation, timeout_s)

    async def score(self, token_ids: TokenIds, num_scored: int, request_id: str, *, priority: int = 0) -> Generation:
        """Return the last `num_scored` tokens with their log-probs given those before, at temperature 1: one prefill.

        It is for the caller to give up. Raises what `generate` raises.
        """
        request = {
            "rid": request_id,
            "input_ids": token_ids.tolist(),
            "sampling_params": {"temperature": 1.0, "max_new_tokens": 0},
            "return_logprob": True,
            # Of the token at the start SGLang gives none.
            "logprob_start_len": len(token_ids) - num_scored - 1,
            "priority": priority,
        }
        scored_ids = token_ids[-num_scored:]
        scores = await self._generate(request, partial(parse_scores, num_scored=num_scored), None)
        check_scored(scores, scored_ids)
        return replace(scores, token_ids=scored_ids[: len(scores.token_ids)])

    async def abort(self, request_id: str) -> None:
        """Ask the server to finish a request with what it has; `generate` then returns it as "abort"."""
        await self._tell("/abort_request", {"rid": request_id})

    async def probe(self, timeout_s: float) -> None:
        """Return once the engine has sampled something after this call; one that has nothing to do samples a token.

        Raises:
            TimeoutError, EngineRefused: it has not, within `timeout_s`.
            EngineUnreachable
        """
        await self._answer("GET", "/health_generate", None, self._user, timeout_s)

    async def pause(self) -> None:
        """Stop decoding; running requests lose their KV cache and are recomputed after `resume`."""
        await self._tell("/pause_generation", {"mode": "retract"})

    async def resume(self) -> None:
        """Go on with the requests that `pause` stopped."""
        await self._tell("/continue_generation", {})

    async def release_memory(self) -> None:
        """Give the memory of weights and KV cache away, their content with it. Only while paused.

        SGLang ends itself when it is asked to with requests at work, and without its memory saver keeps the memory.
        """
        parts = (KV_CACHE, WEIGHTS)
        # Noted first: what became of a request that got no answer is not known.
        self._released.update(parts)
        await self._tell("/release_memory_occupation", {"tags": parts})

    async def resume_memory(self, part: str) -> None:
        """Take the memory of one part back, with nothing in it. Does nothing unless this client has released it.

        SGLang ends itself when it is asked for memory that it has.
        """
        if part in self._released:
            await self._tell("/resume_memory_occupation", {"tags": [part]})
            self._released.discard(part)

    async def place(self, bucket: StagingBuffer) -> MemoryAddress:
        """Return where the engine finds a bucket of weights, after bringing it there."""
        return bucket.address if self._mirror is None else await self._mirror.place(bucket)

    async def begin_weight_update(self) -> None:
        await self._update("/begin_weight_update", {})

    async def update_weights(self, payloads: Sequence[str], load_format: str | None, flush_cache: bool) -> None:
        """Hand one serialized payload to each tensor-parallel rank. Only inside begin/end."""
        request = {
            "serialized_named_tensors": list(payloads),
            "load_format": load_format,
            "flush_cache": flush_cache,
        }
        await self._update("/update_weights_from_tensor", request)

    async def end_weight_update(self) -> None:
        await self._update("/end_weight_update", {})

    async def set_weight_version(self, version: int) -> None:
        """Mark tokens with `version` from now on."""
        request = {"new_version": str(version), "abort_all_requests": False}
        await self._update("/update_weight_version", request)

    async def close(self) -> None:
        await self._session.close()

    async def _generate(
        self, request: dict[str, Any], read: Callable[[bytes], Generation], timeout_s: float | None
    ) -> Generation:
        answer = await self._answer("POST", "/generate", request, self._user, timeout_s)
        try:
            return read(answer)
        except AnswerUnreadable as error:
            raise EngineRefused(f"{self._base_url}/generate: {error}") from error

    async def _update(self, path: str, request: dict[str, Any]) -> None:
        answer = orjson.loads(await self._tell(path, request))
        if not answer["success"]:
            raise EngineRefused(f"{self._base_url}{path}: {answer['message']}")

    async def _tell(self, path: str, request: dict[str, Any]) -> bytes:
        return await self._answer("POST", path, request, self._admin, self._answer_timeout_s)

    async def _answer(
        self, method: str, path: str, request: dict[str, Any] | None, headers: dict[str, str], timeout_s: float | None
    ) -> bytes:
        url = self._base_url + path
        limit = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.request(method, url, json=request, headers=headers, timeout=limit) as response:
                answer = await response.read()
        except TimeoutError:
            raise TimeoutError(f"{url}: no answer within {timeout_s:g} s") from None
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            raise EngineUnreachable(f"{url}: {error!r}") from error
        check_status(url, response.status, answer)
        return answer


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


def check_scored(scores: Generation, scored_ids: TokenIds) -> None:
    """Raise `EngineRefused` when log-probs of given tokens are those of other tokens."""
    # SGLang 0.5.21 echoes the vocabulary's last token as 0, as if it stood for an image; its log-prob is right.
    echoed = scores.token_ids
    if scores.finish_reason != "abort" and not ((echoed == 0) | (echoed == scored_ids)).all():
        raise EngineRefused("the server gave the log-probs of other tokens than those it was sent")
