"""Writers of new templates: a language model behind an OpenAI-compatible endpoint, a phrasebook, or one's own code."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from megatron_p2o.config.tree import ReflectionConfig
from megatron_p2o.evolve.reflection.endpoint import endpoint_of
from megatron_p2o.evolve.reflection.own import OwnReflector
from megatron_p2o.evolve.reflection.phrasebook import Phrasebook
from megatron_p2o.evolve.reflection.reflection import ReflectionRequest
from megatron_p2o.processes import PROXY_VARIABLES, keys_named_in, variables_named_in

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """A kind of writer."""

    secrets: Callable[[ReflectionConfig], tuple[str, ...]]
    """Returns the environment variables that may hold secrets and that the process which reflects needs."""
    check: Callable[[ReflectionConfig], object]
    """Raises the errors of `build` for settings that cannot work, without an endpoint's imports."""
    build: Callable[[ReflectionConfig, int, Mapping[str, str], Sequence[str]], Reflector]
    """Returns the reflector; takes what `build_reflector` takes."""


def phrasebook_of(config: ReflectionConfig, seed: int) -> Phrasebook:
    """Return the phrasebook of the `phrasebook` backend. Raises `ValueError` or `OSError` when it holds no phrase."""
    if config.phrases is None:
        raise ValueError("evolution.reflection.backend=phrasebook needs evolution.reflection.phrases: name a file")
    return Phrasebook.from_file(Path(config.phrases), seed)


def _remote(
    config: ReflectionConfig, seed: int, environment: Mapping[str, str], control_tokens: Sequence[str]
) -> Reflector:
    return _chat_completions()(config, environment.get(config.api_key_env), seed)


def _initial_policy(
    config: ReflectionConfig, seed: int, environment: Mapping[str, str], control_tokens: Sequence[str]
) -> Reflector:
    api_key = environment.get(config.api_key_env)
    return _chat_completions()(config, api_key, seed, SELF_REFLECTION_BODY, control_tokens)


BACKENDS: Mapping[str, Backend] = {
    "openai": Backend(
        secrets=lambda config: (config.api_key_env, *PROXY_VARIABLES),
        check=endpoint_of,
        build=_remote,
    ),
    "self": Backend(secrets=lambda config: (), check=endpoint_of, build=_initial_policy),
    "phrasebook": Backend(
        secrets=lambda config: (),
        check=lambda config: phrasebook_of(config, seed=0),
        build=lambda config, seed, environment, control_tokens: phrasebook_of(config, seed),
    ),
}
"""Our own writers, by the value of `evolution.reflection.backend`."""

OWN = Backend(
    secrets=lambda config: (*variables_named_in(config.arguments), *PROXY_VARIABLES),
    check=OwnReflector,
    build=lambda config, seed, environment, control_tokens: OwnReflector(config),
)
"""What any other value is: a callable of the user's."""


def secrets_of(config: ReflectionConfig) -> tuple[str, ...]:
    """Return the environment variables that may hold secrets and that the process which reflects needs."""
    return _backend(config).secrets(config)


def reflection_keys(config: ReflectionConfig) -> set[str]:
    """Return the environment variables that the settings say hold a key, whatever their names."""
    return {config.api_key_env, *keys_named_in(config.arguments)}


def check_settings(config: ReflectionConfig) -> None:
    """Raise the errors of `build_reflector` for settings that cannot work, without an endpoint's imports."""
    _backend(config).check(config)


def build_reflector(
    config: ReflectionConfig, seed: int, environment: Mapping[str, str], control_tokens: Sequence[str] = ()
) -> Reflector:
    """Return the reflector `evolution.reflection.backend` names; `environment` holds its key.

    `control_tokens` of the policy's tokenizer: under `self` its server would take them for markup in a user's text.

    Raises `ValueError` or `OSError` for settings that cannot work.
    """
    return _backend(config).build(config, seed, environment, control_tokens)


def _backend(config: ReflectionConfig) -> Backend:
    if config.backend in BACKENDS and config.arguments:
        raise ValueError(
            f"evolution.reflection.arguments are of a backend of one's own, and evolution.reflection.backend="
            f"{config.backend} has settings instead: remove them"
        )
    return BACKENDS.get(config.backend, OWN)


def _chat_completions() -> "type[ChatCompletions]":
    """Return the reflector of endpoints. The openai client takes 0.7 s to import, and a phrasebook does without."""
    from megatron_p2o.evolve.reflection.chat_completions import ChatCompletions

    return ChatCompletions
