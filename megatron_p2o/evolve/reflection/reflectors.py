"""Writers of new templates: a language model behind an OpenAI-compatible endpoint, or a phrasebook."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, assert_never

from megatron_p2o.config.tree import ReflectionConfig
from megatron_p2o.evolve.reflection.endpoint import endpoint_of
from megatron_p2o.evolve.reflection.phrasebook import Phrasebook
from megatron_p2o.evolve.reflection.reflection import ReflectionRequest
from megatron_p2o.processes import PROXY_VARIABLES

if TYPE_CHECKING:
    from megatron_p2o.evolve.reflection.chat_completions import ChatCompletions

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
    match config.backend:
        case "openai":
            return (config.api_key_env, *PROXY_VARIABLES)
        case "self" | "phrasebook":
            return ()
        case _:
            assert_never(config.backend)


def phrasebook_of(config: ReflectionConfig, seed: int) -> Phrasebook:
    """Return the phrasebook of the `phrasebook` backend. Raises `ValueError` or `OSError` when it holds no phrase."""
    if config.phrases is None:
        raise ValueError("evolution.reflection.backend=phrasebook needs evolution.reflection.phrases: name a file")
    return Phrasebook.from_file(Path(config.phrases), seed)


def check_settings(config: ReflectionConfig) -> None:
    """Raise the errors of `build_reflector` for settings that cannot work, without its imports."""
    match config.backend:
        case "phrasebook":
            phrasebook_of(config, seed=0)
        case "openai" | "self":
            endpoint_of(config)
        case _:
            assert_never(config.backend)


def build_reflector(
    config: ReflectionConfig, seed: int, environment: Mapping[str, str], control_tokens: Sequence[str] = ()
) -> Reflector:
    """Return the reflector `evolution.reflection.backend` names; `environment` holds its key.

    `control_tokens` of the policy's tokenizer: under `self` its server would take them for markup in a user's text.

    Raises `ValueError` or `OSError` for settings that cannot work.
    """
    match config.backend:
        case "phrasebook":
            return phrasebook_of(config, seed)
        case "openai":
            return _chat_completions()(config, environment.get(config.api_key_env), seed)
        case "self":
            api_key = environment.get(config.api_key_env)
            return _chat_completions()(config, api_key, seed, SELF_REFLECTION_BODY, control_tokens)
        case _:
            assert_never(config.backend)


def _chat_completions() -> "type[ChatCompletions]":
    """Return the reflector of endpoints. The openai client takes 0.7 s to import, and a phrasebook does without."""
    from megatron_p2o.evolve.reflection.chat_completions import ChatCompletions

    return ChatCompletions
