"""Who writes new templates: a language model behind an OpenAI-compatible endpoint, or a book of phrases."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from megatron_p2o.config import ReflectionConfig
from megatron_p2o.evolve.phrasebook import Phrasebook
from megatron_p2o.evolve.reflection import ReflectionRequest
from megatron_p2o.processes import PROXY_VARIABLES

SELF_REFLECTION_FIELDS = {"chat_template_kwargs": {"enable_thinking": False}}
"""SGLang's way to switch Qwen3's thinking off: thoughts would use up `max_tokens` before the template begins."""


class Reflector(Protocol):
    """Writes a template from feedback on its parent."""

    async def propose(self, request: ReflectionRequest) -> str:
        """Return a template. Raise `ReflectionRefused` for a useless answer, `ReflectionUnavailable` for none."""
        ...

    async def close(self) -> None:
        """Give connections back."""
        ...


def secrets_of(config: ReflectionConfig) -> tuple[str, ...]:
    """Return the environment variables that may hold secrets and that the process which reflects needs."""
    return (config.api_key_env, *PROXY_VARIABLES) if config.backend == "openai" else ()


def build_reflector(config: ReflectionConfig, seed: int, environment: Mapping[str, str]) -> Reflector:
    """Return the reflector `evolution.reflection.backend` names; `environment` holds its key.

    Raises `ValueError` or `OSError` for settings that cannot work.
    """
    if config.backend == "phrasebook":
        if config.phrases is None:
            raise ValueError("evolution.reflection.backend=phrasebook needs evolution.reflection.phrases: name a file")
        return Phrasebook.from_file(Path(config.phrases), seed)
    from megatron_p2o.evolve.chat_completions import ChatCompletions  # aiohttp, which a phrasebook does without

    extra_fields = SELF_REFLECTION_FIELDS if config.backend == "self" else {}
    return ChatCompletions(config, environment.get(config.api_key_env), seed, extra_fields)
