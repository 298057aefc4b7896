"""Reflection by a language model behind an OpenAI-compatible endpoint: a hosted one, or the initial policy's server."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_p2o.config.tree import ReflectionConfig
from megatron_p2o.endpoints.chat import ChatEndpoint, Endpoint, EndpointUnavailable
from megatron_p2o.endpoints.reply import EndpointRefused, Reply, read_reply
from megatron_p2o.evolve.reflection.endpoint import endpoint_of
from megatron_p2o.evolve.reflection.reflection import (
    ReflectionRefused,
    ReflectionRequest,
    ReflectionUnavailable,
    ReflectionUsage,
    reflection_prompt,
    with_markup_as_text,
)
from megatron_p2o.evolve.reflection.reply import template_in
from megatron_p2o.seeds import seed_of

MAX_REFUSED_REQUESTS = 5
"""Refused requests in a row before evolution pauses. An endpoint that refuses a field refuses it in every request."""

MAX_USELESS_REPLIES = 20
"""Useless replies in a row before evolution pauses. A model that fails three times in four has one such row in 300."""


class ChatCompletions:
    """A `Reflector` that posts to `<base_url>/chat/completions`."""

    def __init__(
        self,
        config: ReflectionConfig,
        api_key: str | None,
        seed: int,
        extra_body: Mapping[str, Any] | None = None,
        control_tokens: Sequence[str] = (),
    ) -> None:
        """`extra_body` goes into every request, beneath `config.extra_body`.

        `control_tokens` are what the model's tokenizer takes for control tokens also in what a user says.

        Raises `ValueError` when the endpoint is not named, or the key or a proxy of the environment cannot be used.
        """
        base_url, model = endpoint_of(config)
        endpoint = Endpoint(
            base_url=base_url,
            model=model,
            timeout_s=config.timeout_s,
            max_retries=config.max_retries,
            api_key_env=config.api_key_env,
            settings="evolution.reflection",
            may_use_proxy=config.backend == "openai",
        )
        self._config = config
        self._seed = seed
        self._extra_body = {**(extra_body or {}), **config.extra_body}
        self._control_tokens = tuple(control_tokens)
        self._endpoint = ChatEndpoint(endpoint, api_key)
        self._num_refused = self._num_useless = 0
        """Refused requests, and useless replies, in a row."""

    async def propose(self, request: ReflectionRequest) -> str:
        """Raises `ReflectionUnavailable` for what the next request would meet as well, or after too many bad ones."""
        try:
            prompt = with_markup_as_text(reflection_prompt(request), self._control_tokens)
            request.usage.prompt = prompt
            reply = await self._reply_to(prompt, request.proposal)
            reply = replace(reply, text=self._endpoint.without_key(reply.text))
            request.usage.reply = reply.text
            self._num_refused = 0
            _count(reply, request.usage)
            template = template_in(reply, request.parent_text)
        except ReflectionRefused as refused:
            self._num_useless += 1
            if self._num_refused >= MAX_REFUSED_REQUESTS or self._num_useless >= MAX_USELESS_REPLIES:
                detail = f": {refused.detail}" if refused.detail else ""
                raise ReflectionUnavailable(
                    f"{self._endpoint.url}: the last {self._num_useless} requests gave no template, the last one: "
                    f"{refused}{detail}"
                ) from refused
            raise
        self._num_useless = 0
        return template

    async def probe(self) -> None:
        """Ask for one word, as for a template. Raises `ReflectionUnavailable` or `ReflectionRefused`."""
        await self._reply_to("Reply with the word ready.", 0)

    async def close(self) -> None:
        await self._endpoint.close()

    async def _reply_to(self, prompt: str, proposal: int) -> Reply:
        config = self._config
        body = b""
        try:
            body = await self._endpoint.complete(
                [{"role": "user", "content": prompt}],
                temperature=config.temperature,
                max_tokens=config.max_tokens,
                # A deterministic engine answers every request without a seed from one and the same.
                seed=seed_of(self._seed, "reflection", proposal) if config.backend == "self" else None,
                extra_body=self._extra_body,
            )
            return read_reply(body)
        except EndpointUnavailable as unavailable:
            raise ReflectionUnavailable(str(unavailable), is_passing=unavailable.is_passing) from unavailable
        except EndpointRefused as refused:
            self._num_refused += refused.is_request_refused
            detail = self._endpoint.quotable(body) if body else refused.detail
            raise ReflectionRefused(str(refused), detail) from refused


def _count(reply: Reply, usage: ReflectionUsage) -> None:
    """Add what a reply took to `usage`."""
    if reply.prompt_tokens is None or reply.completion_tokens is None:
        usage.num_unknown += 1
        return
    usage.prompt_tokens += reply.prompt_tokens
    usage.completion_tokens += reply.completion_tokens
