"""The policy's settings in Megatron's terms, checked without ranks, weights or a GPU."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron.core.transformer import TransformerConfig

from megatron_p2o.config.tree import Config
from megatron_p2o.policy.model.architecture import Architecture, read_architecture
from megatron_p2o.policy.model.layer_choice import Capabilities, choose_layers
from megatron_p2o.policy.model.model import transformer_config
from megatron_p2o.policy.training.megatron_settings import (
    MegatronOverrides,
    check_lending,
    check_offload,
    megatron_overrides,
    offload_problem,
)
from megatron_p2o.policy.training.optimizer import data_parallel_config, megatron_optimizer_config
from megatron_p2o.policy.weights.hf_directory import WeightFiles
from megatron_p2o.policy.weights.hf_weights import check_finite


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicySettings:
    """What a rank builds its part of the policy from."""

    architecture: Architecture
    overrides: MegatronOverrides
    transformer: TransformerConfig


def policy_settings(config: Config, fused: Mapping[str, bool] | None = None) -> PolicySettings:
    """Return the settings of the policy. Local; reads config.json of `model.path`.

    Args:
        fused: `fused_operations` of the machine that will run it; they change results by rounding alone.

    Raises:
        ValueError: they cannot work on any machine: a field of `megatron` that the installed version does not have or
            refuses, a size that does not divide, a model that is not supported.
    """
    architecture = read_architecture(Path(config.model.path))
    is_sharded = config.parallel.distributed_optimizer
    overrides = megatron_overrides(config.megatron)
    check_offload(config.megatron, is_sharded=is_sharded)
    check_lending(config.megatron, config.optimizer)
    with _named(config.megatron):
        chosen = {**(fused or {}), **overrides.transformer}
        if overrides.transformer.get("use_te_activation_func"):  # the other way to fuse; Megatron refuses both
            chosen["bias_activation_fusion"] = overrides.transformer.get("bias_activation_fusion", False)
        transformer = transformer_config(architecture, config.parallel, config.model.dtype, chosen)
        data_parallel_config(is_sharded=is_sharded, overrides=overrides)
        with suppress(RuntimeError):  # what is not installed is for `machine_problems`
            megatron_optimizer_config(config.optimizer, transformer, is_sharded=is_sharded, overrides=overrides)
    return PolicySettings(architecture=architecture, overrides=overrides, transformer=transformer)


def machine_problems(config: Config, settings: PolicySettings, capabilities: Capabilities) -> list[str]:
    """Return what keeps this machine from training with the settings, one sentence each; elsewhere they may work."""
    problems: list[str] = []
    try:
        choose_layers(config.model.layer_backend, capabilities)
    except ValueError as error:
        problems.append(str(error))
    offload = offload_problem(config.megatron, capabilities)
    if offload is not None:
        problems.append(offload)
    is_sharded = config.parallel.distributed_optimizer
    try:
        megatron_optimizer_config(
            config.optimizer, settings.transformer, is_sharded=is_sharded, overrides=settings.overrides
        )
    except RuntimeError as error:
        problems.append(f"megatron: {error}")
    return problems


def megatron_summary(config: Config) -> str:
    """Return the settings that go to megatron-core, for reports."""
    return f"{version('megatron-core')} takes {', '.join(config.megatron) or 'no settings of its own'}"


def check_weights(config: Config, architecture: Architecture) -> None:
    """Raise `ValueError` unless the tensors of `model.path` are those of its config.json. Reads their headers alone."""
    with WeightFiles(Path(config.model.path)) as files:
        files.check(architecture.weight_shapes())


def check_values(config: Config) -> None:
    """Raise `ValueError` unless every weight of `model.path` is finite. Reads all of them, one at a time."""
    with WeightFiles(Path(config.model.path)) as files:
        for name in files.names:
            check_finite(files.directory, {name: files.read(name)})


@contextmanager
def _named(megatron: Mapping[str, Any]) -> Iterator[None]:
    """Say which settings megatron-core refuses where it does by an assertion of its own."""
    try:
        yield
    except (AssertionError, TypeError, ValueError) as error:
        if not megatron or str(error).startswith("parallel."):
            raise
        given = ", ".join(f"megatron.{name}={value}" for name, value in megatron.items())
        raise ValueError(f"megatron-core {version('megatron-core')} refuses {given}: {error}") from error
