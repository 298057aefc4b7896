"""Sends one request to the reflection endpoint before a run starts, so that a wrong setting fails at once."""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatron_p2o.config.tree import Config, EvolutionConfig, ReflectionConfig, RunConfig
from megatron_p2o.evolve.reflection.reflection import ReflectionRefused, ReflectionUnavailable

logger = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 60.0
"""Longest wait for the probe's reply; `evolution.reflection.timeout_s` where that is less."""

REMEDY = "mend it, or set evolution.enabled=false to train without evolution"


@dataclass(frozen=True, kw_only=True, slots=True)
class EndpointTrouble:
    """Why the reflection endpoint did not answer a probe."""

    reason: str
    is_passing: bool
    """It is busy or slow; later requests may fare better."""


def needs_endpoint(config: EvolutionConfig) -> bool:
    """Return whether evolution needs an endpoint that the run does not start itself."""
    return config.enabled and config.reflection.backend == "openai"


def has_checkpoint(config: RunConfig) -> bool:
    """Return whether the run would go on from a checkpoint."""
    return any((config.folder / "checkpoints").glob("step-*"))


def probe(config: ReflectionConfig, environment: Mapping[str, str]) -> EndpointTrouble | None:
    """Ask the endpoint of the `openai` backend for one word, with the fields that every later request has.

    Returns None when it answers. `environment` holds its key. A reply that is cut off is an answer.
    """
    # Imported here: only who probes needs the openai client.
    from megatron_p2o.evolve.reflection.chat_completions import ChatCompletions

    async def ask() -> None:
        patience = replace(
            config, max_retries=min(1, config.max_retries), timeout_s=min(config.timeout_s, PROBE_TIMEOUT_S)
        )
        client = ChatCompletions(patience, environment.get(config.api_key_env), seed=0)
        try:
            await client.probe()
        finally:
            await client.close()

    try:
        asyncio.run(ask())
    except ValueError as error:
        return EndpointTrouble(reason=str(error), is_passing=False)
    except ReflectionUnavailable as unavailable:
        return EndpointTrouble(reason=str(unavailable), is_passing=unavailable.is_passing)
    except ReflectionRefused as refused:
        detail = f": {refused.detail}" if refused.detail else ""
        return EndpointTrouble(reason=f"{config.base_url}: {refused}{detail}", is_passing=False)
    return None


def check_endpoint(config: Config, environment: Mapping[str, str]) -> None:
    """Probe the reflection endpoint if the run needs one.

    A busy endpoint is only a warning. For a run that resumes from a checkpoint any failure is a warning, because it
    costs only rounds of evolution.

    Raises:
        ValueError: the endpoint cannot serve a new run.
    """
    trouble = probe(config.evolution.reflection, environment) if needs_endpoint(config.evolution) else None
    if trouble is None:
        return
    message = f"evolution.reflection: {trouble.reason}"
    if not trouble.is_passing and not has_checkpoint(config.run):
        raise ValueError(f"{message}: {REMEDY}")
    logger.warning("%s; while this lasts, rounds of evolution find no templates: %s", message, REMEDY)
