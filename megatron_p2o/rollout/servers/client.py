"""The routes of one SGLang server, with tokens in and tokens out. Lives on the broker's event loop."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any, Protocol

import aiohttp
import numpy as np
import orjson

from megatron_p2o.rollout.buckets.staging import StagingBuffer
from megatron_p2o.rollout.buckets.weight_message import MemoryAddress
from megatron_p2o.rollout.servers.answers import EngineRefused, EngineUnreachable, Generation, check_status
from megatron_p2o.rollout.servers.relay import (
    GENERATE,
    PROBE,
    SERVER_INFO,
    Asked,
    EngineAddress,
    Relayed,
    answer_of,
    engine_session,
    unpacked,
)
from megatron_p2o.rollout.servers.relay_link import RelayLink, RelayRoute
from megatron_p2o.types import SamplingParams, TokenIds

WEIGHTS, KV_CACHE = "weights", "kv_cache"
"""What a server can give the memory of away; SGLang's names."""


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
        relay: RelayRoute | None = None,
    ) -> None:
        """Args:
        stop_token_ids: end-of-sequence ids of the model.
        answer_timeout_s: longest wait for the answer to anything but a generation.
        mirror: of an engine on another machine, where it finds the weights.
        relay: what completions come through; None: they are read here.
        """
        self._base_url = base_url
        self._engine = EngineAddress(base_url=base_url, api_key=api_key)
        self._admin_key = admin_key
        self._stop_token_ids = list(stop_token_ids)
        self._answer_timeout_s = answer_timeout_s
        self._mirror = mirror
        self._released: set[str] = set()
        self._session = engine_session()
        self._numbers = count()
        self._link = None if relay is None else RelayLink(self._session, relay)

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
            "input_ids": np.ascontiguousarray(token_ids),
            "sampling_params": parameters,
            "return_logprob": True,
            "priority": priority,
        }
        return unpacked(await self._asked(GENERATE, request, timeout_s))

    async def score(self, token_ids: TokenIds, num_scored: int, request_id: str, *, priority: int = 0) -> Generation:
        """Return the last `num_scored` tokens with their log-probs given those before, at temperature 1: one prefill.

        It is for the caller to give up. Raises what `generate` raises.
        """
        request = {
            "rid": request_id,
            "input_ids": np.ascontiguousarray(token_ids),
            "sampling_params": {"temperature": 1.0, "max_new_tokens": 0},
            "return_logprob": True,
            # Of the token at the start SGLang gives none.
            "logprob_start_len": len(token_ids) - num_scored - 1,
            "priority": priority,
        }
        scored_ids = token_ids[-num_scored:]
        scores = unpacked(await self._asked(GENERATE, request, None, num_scored))
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
        await self._asked(PROBE, None, timeout_s)

    async def cache_tokens(self) -> int:
        """Return how many tokens the KV cache holds."""
        info = orjson.loads(await self._answer("GET", f"/{SERVER_INFO}", self._engine.api_key))
        return info["max_total_num_tokens"]

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
        if self._link is not None:
            await self._link.close()
        await self._session.close()

    async def _asked(
        self, path: str, request: Mapping[str, Any] | None, timeout_s: float | None, num_scored: int = 0
    ) -> Relayed:
        """Return the answer of a route that the user key opens; `num_scored` as in `Asked`."""
        url = f"{self._base_url}/{path}"
        body = b"" if request is None else orjson.dumps(request, option=orjson.OPT_SERIALIZE_NUMPY)
        asked = Asked(number=next(self._numbers), path=path, body=body, num_scored=num_scored)
        try:
            async with asyncio.timeout(timeout_s):
                if self._link is None:
                    relayed = await answer_of(asked, self._session, self._engine)
                else:
                    relayed = await self._link.ask(asked)
        except TimeoutError:
            raise TimeoutError(f"{url}: no answer within {timeout_s:g} s") from None
        check_status(url, relayed.status, relayed.words)
        return relayed

    async def _update(self, path: str, request: dict[str, Any]) -> None:
        answer = orjson.loads(await self._tell(path, request))
        if not answer["success"]:
            raise EngineRefused(f"{self._base_url}{path}: {answer['message']}")

    async def _tell(self, path: str, request: Mapping[str, Any]) -> bytes:
        """Return the answer of a route that the admin key opens."""
        return await self._answer("POST", path, self._admin_key, json=request)

    async def _answer(self, method: str, path: str, key: str, **request: Any) -> bytes:
        url = self._base_url + path
        headers = {"Authorization": f"Bearer {key}"}
        limit = aiohttp.ClientTimeout(total=self._answer_timeout_s)
        try:
            async with self._session.request(method, url, headers=headers, timeout=limit, **request) as response:
                answer = await response.read()
        except TimeoutError:
            raise TimeoutError(f"{url}: no answer within {self._answer_timeout_s:g} s") from None
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            raise EngineUnreachable(f"{url}: {error!r}") from error
        check_status(url, response.status, answer)
        return answer


def check_scored(scores: Generation, scored_ids: TokenIds) -> None:
    """Raise `EngineRefused` when log-probs of given tokens are those of other tokens."""
    # SGLang 0.5.21 echoes the vocabulary's last token as 0, as if it stood for an image; its log-prob is right.
    echoed = scores.token_ids
    if scores.finish_reason != "abort" and not ((echoed == 0) | (echoed == scored_ids)).all():
        raise EngineRefused("the server gave the log-probs of other tokens than those it was sent")
