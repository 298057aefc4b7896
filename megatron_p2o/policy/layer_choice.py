"""Which layers and which attention kernel the trainer computes with: decided by what the machine has, and said."""

import functools
import importlib
import importlib.util
from dataclasses import dataclass
from typing import Literal

import torch

LayerBackend = Literal["transformer_engine", "local"]
"""Whose layers; `local`: megatron-core's own, with the attention and norms of this package."""

AttentionKernel = Literal["transformer_engine", "flash_attn", "torch_varlen", "sdpa"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Capabilities:
    """What of a machine decides."""

    has_cuda: bool
    has_flash_attn: bool
    transformer_engine_problem: str | None
    """Why Transformer Engine cannot be used; None: it can."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerChoice:
    """Layers and kernel, and why they are the ones."""

    layers: LayerBackend
    layers_reason: str
    attention: AttentionKernel
    attention_reason: str


def choose_layers(setting: Literal["auto", "transformer_engine", "local"], capabilities: Capabilities) -> LayerChoice:
    """Return what `model.layer_backend` comes to; pure, so that every machine's choice can be tested.

    Raises:
        ValueError: Transformer Engine is set but cannot be used.
    """
    problem = capabilities.transformer_engine_problem
    if setting == "transformer_engine" and problem is not None:
        raise ValueError(
            f"model.layer_backend=transformer_engine cannot be used here: Transformer Engine {problem}. "
            "Set model.layer_backend to auto or local, or repair that; `p2o doctor` shows what is found"
        )
    if setting != "local" and problem is None:
        return LayerChoice(
            layers="transformer_engine",
            layers_reason="Transformer Engine's (model.layer_backend=local for megatron-core's own)",
            attention="transformer_engine",
            attention_reason="Transformer Engine's choice of flash-attn and cuDNN, packed (NVTE_DEBUG=1 shows it)",
        )
    kernel, kernel_reason = _local_attention(capabilities)
    why = "model.layer_backend=local" if setting == "local" else f"Transformer Engine {problem}"
    return LayerChoice(
        layers="local", layers_reason=f"megatron-core's own: {why}", attention=kernel, attention_reason=kernel_reason
    )


def _local_attention(capabilities: Capabilities) -> tuple[AttentionKernel, str]:
    if not capabilities.has_cuda:
        return "sdpa", "torch scaled_dot_product_attention per packed segment: no CUDA"
    if capabilities.has_flash_attn:
        return "flash_attn", "flash-attn, variable length"
    return "torch_varlen", "torch variable-length attention: flash-attn is not installed"


@functools.cache
def machine_capabilities() -> Capabilities:
    """Return those of this machine. With CUDA it imports Transformer Engine, which may be built for another torch."""
    return Capabilities(
        has_cuda=torch.cuda.is_available(),
        has_flash_attn=importlib.util.find_spec("flash_attn") is not None,
        transformer_engine_problem=_transformer_engine_problem(),
    )


def _transformer_engine_problem() -> str | None:
    if importlib.util.find_spec("transformer_engine") is None:
        return "is not installed"
    if not torch.cuda.is_available():
        return "needs CUDA"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"cannot be imported: {error}"
    return None
