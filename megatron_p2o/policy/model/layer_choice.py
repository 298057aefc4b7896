"""Chooses the layers and the attention kernel of the trainer from what the machine has, and gives the reason."""

import functools
import importlib
import importlib.util
import sys
from dataclasses import dataclass
from typing import Literal, assert_never

import torch

LayerBackend = Literal["transformer_engine", "local"]
"""Whose layers; `local`: megatron-core's own, with the attention and norms of this package."""

IMPORT_FAILURES = (ImportError, OSError, RuntimeError, AttributeError)
"""Errors raised by importing a package that was compiled for another torch or CUDA, or that finds no GPU driver."""

AttentionKernel = Literal["transformer_engine", "flash_attn", "torch_varlen", "sdpa"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Capabilities:
    """What of a machine decides."""

    has_cuda: bool
    flash_attn_problem: str | None
    """Why flash-attn cannot be used; None: it can."""
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
    match setting:
        case "local":
            return _local_layers(capabilities, "model.layer_backend=local")
        case "transformer_engine" if problem is not None:
            raise ValueError(
                f"model.layer_backend=transformer_engine cannot be used here: Transformer Engine {problem}. "
                "Set model.layer_backend to auto or local, or repair that; `p2o doctor` shows what is found"
            )
        case "auto" if problem is not None:
            return _local_layers(capabilities, f"Transformer Engine {problem}")
        case "auto" | "transformer_engine":
            return LayerChoice(
                layers="transformer_engine",
                layers_reason="Transformer Engine's (model.layer_backend=local for megatron-core's own)",
                attention="transformer_engine",
                attention_reason="Transformer Engine's choice of flash-attn and cuDNN, packed (NVTE_DEBUG=1 shows it)",
            )
        case _:
            assert_never(setting)


def fused_operations(layers: LayerBackend, capabilities: Capabilities, *, is_dense: bool) -> dict[str, bool]:
    """Return the fields of TransformerConfig by which Megatron fuses what lies between matrix products.

    Megatron's own training scripts set them, the class does not. The activation is compiled by torch, the rotary
    embedding is a kernel of Transformer Engine. Experts keep their activation as it is: theirs, with another number of
    tokens each time, has not been measured. Settings under `megatron` go first.
    """
    if not capabilities.has_cuda:
        return {}
    return {"bias_activation_fusion": is_dense, "apply_rope_fusion": layers == "transformer_engine"}


def _local_layers(capabilities: Capabilities, why: str) -> LayerChoice:
    kernel, kernel_reason = _local_attention(capabilities)
    return LayerChoice(
        layers="local", layers_reason=f"megatron-core's own: {why}", attention=kernel, attention_reason=kernel_reason
    )


def _local_attention(capabilities: Capabilities) -> tuple[AttentionKernel, str]:
    if not capabilities.has_cuda:
        return "sdpa", "torch scaled_dot_product_attention per packed segment: no CUDA"
    if capabilities.flash_attn_problem is None:
        return "flash_attn", "flash-attn, variable length"
    return "torch_varlen", f"torch variable-length attention: flash-attn {capabilities.flash_attn_problem}"


@functools.cache
def machine_capabilities() -> Capabilities:
    """Return those of this machine. With CUDA it imports what may be built for another torch."""
    has_cuda = torch.cuda.is_available()
    return Capabilities(
        has_cuda=has_cuda,
        flash_attn_problem=import_problem("flash_attn", "flash_attn_varlen_func", has_cuda=has_cuda),
        transformer_engine_problem=import_problem(
            "transformer_engine.pytorch", "DotProductAttention", has_cuda=has_cuda
        ),
    )


def import_problem(module_name: str, attribute: str, *, has_cuda: bool) -> str | None:
    """Return why a module compiled for CUDA cannot be used; None when it has been imported and has the attribute.

    That a package of the name is found says little: SGLang brings flash-attn-4, whose modules lie in the folder of
    flash-attn, of which it has none.
    """
    if _is_broken_transformer_engine(module_name):
        return f"cannot be imported: {transformer_engine_failure()}"
    if importlib.util.find_spec(module_name.partition(".")[0]) is None:
        return "is not installed"
    if not has_cuda:
        return "needs CUDA"
    failure = import_failure(module_name)
    if failure is not None:
        return f"cannot be imported: {failure}"
    has_attribute = hasattr(sys.modules[module_name], attribute)
    return None if has_attribute else f"is not installed: {module_name} is there without {attribute}"


def import_failure(module_name: str) -> str | None:
    """Return the error with which an installed module fails to import; None if it imports or is not installed."""
    if _is_broken_transformer_engine(module_name):
        return transformer_engine_failure()
    if importlib.util.find_spec(module_name.partition(".")[0]) is None:
        return None
    try:
        importlib.import_module(module_name)
    except IMPORT_FAILURES as error:
        return str(error)
    return None


@functools.cache
def transformer_engine_failure() -> str | None:
    """Return why an installed Transformer Engine cannot be imported; None if it can be or is not installed.

    A broken one is hidden from this process. megatron-core imports Transformer Engine wherever it is installed and
    expects no error but ImportError, while Transformer Engine raises OSError without a GPU driver and
    FileNotFoundError without its extension for torch. Call this before anything imports megatron.core.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        return None
    try:
        importlib.import_module("transformer_engine.pytorch")
    except IMPORT_FAILURES as error:
        for name in [name for name in sys.modules if name.startswith("transformer_engine.")]:
            del sys.modules[name]
        sys.modules["transformer_engine"] = None  # pyright: ignore[reportArgumentType]  # imports raise ImportError
        return str(error)
    return None


def _is_broken_transformer_engine(module_name: str) -> bool:
    return module_name.startswith("transformer_engine") and transformer_engine_failure() is not None
