"""Who writes new templates: a language model behind an OpenAI-compatible endpoint, or a book of phrases."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from megatron_p2o.config import ReflectionConfig
from megatron_p2o.evolve.phrasebook import Phrasebook
from megatron_p2o.evolve.reflection import ReflectionRequest


class ReflectionUnavailable(Exception):
    """Nobody can reflect now; evolution stops proposing until the next round."""


class Reflector(Protocol):
    """Writes a template from feedback on its parent."""

    async def propose(self, request: ReflectionRequest) -> str:
        """Return a template. Raise `ReflectionRefused` for a useless answer, `ReflectionUnavailable` for none."""
        ...

    async def close(self) -> None:
        """Give connections back."""
        ...


def build_reflector(config: ReflectionConfig, seed: int, environment: Mapping[str, str]) -> Reflector:
    """Return the reflector `evolution.reflection.backend` names; `environment` holds its key.

    Raises `ValueError` or `OSError` for settings that cannot work.
    """
    if config.backend == "phrasebook":
        if config.phrases is None:
            raise ValueError("evolution.reflection.backend=phrasebook needs evolution.reflection.phrases: name a file")
        return Phrasebook.from_file(Path(config.phrases), seed)
    raise NotImplementedError
