"""Who writes new templates: a language model behind an OpenAI-compatible endpoint, or a book of phrases."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from megatron_p2o.config.tree import ReflectionConfig
from megatron_p2o.evolve.reflection.endpoint import endpoint_of
from megatron_p2o.evolve.reflection.phrasebook import Phrasebook
from megatron_p2o.evolve.reflection.reflection import ReflectionRequest
from megatron_p2o.processes import PROXY_VARIABLES

SELF_REFLECTION_BODY = {"chat_template_kwargs": {"enable_thinking": False}}
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


def phrasebook_of(config: ReflectionConfig, seed: int) -> Phrasebook:
    """Return the phrasebook of the `phrasebook` backend. Raises `ValueError` or `OSError` when it holds no phrase."""
    if config.phrases is None:
        raise ValueError("evolution.reflection.backend=phrasebook needs evolution.reflection.phrases: name a file")
    return Phrasebook.from_file(Path(config.phrases), seed)


def check_settings(config: ReflectionConfig) -> None:
    """Raise what `build_reflector` would for settings that cannot work, without what it imports."""
    if config.backend == "phrasebook":
        phrasebook_of(config, seed=0)
    else:
        endpoint_of(config)


def build_reflector(
    config: ReflectionConfig, seed: int, environment: Mapping[str, str], control_tokens: Sequence[str] = ()
) -> Reflector:
    """Return the reflector `evolution.reflection.backend` names; `environment` holds its key.

    `control_tokens` of the policy's tokenizer: under `self` its server would take them for markup in a user's text.

    Raises `ValueError` or `OSError` for settings that cannot work.
    """
    if config.backend == "phrasebook":
        return phrasebook_of(config, seed)
    # Imported here: the openai client takes 0.7 s, and a phrasebook does without.
    from megatron_p2o.evolve.reflection.chat_completions import ChatCompletions

    api_key = environment.get(config.api_key_env)
    if config.backend == "self":
        return ChatCompletions(config, api_key, seed, SELF_REFLECTION_BODY, control_tokens)
    return ChatCompletions(config, api_key, seed)
