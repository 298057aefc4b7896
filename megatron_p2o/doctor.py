"""`p2o doctor`: what this machine offers and what is missing, before anything is started."""

import importlib.util
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

REQUIRED = ("torch", "megatron-core", "sglang", "transformers", "tokenizers", "safetensors", "math-verify", "aiohttp")
"""Distributions without which no run starts."""

GPU_ONLY = ("transformer-engine", "flash-attn", "triton", "sglang-kernel", "flashinfer-python")
"""Distributions that make the GPU lane fast; each has a fallback that this command names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One line of the report."""

    subject: str
    finding: str
    is_missing: bool = False
    """True when runs cannot start without it."""


def examine() -> list[Finding]:
    """Return what was found, most basic first."""
    has_gpu = torch.cuda.is_available()
    lane = f"GPU ({torch.cuda.get_device_name()}, CUDA {torch.version.cuda})" if has_gpu else "CPU (gloo, float32)"
    findings = [Finding(subject="lane", finding=lane), Finding(subject="python", finding=platform.python_version())]
    findings += [_package(name, is_required=True) for name in REQUIRED]
    findings += [_package(name, is_required=False) for name in GPU_ONLY]
    findings.append(Finding(subject="attention", finding=_attention(has_gpu)))
    findings.append(Finding(subject="fused kernels", finding=_kernels(has_gpu)))
    findings.append(Finding(subject="apex", finding=_apex()))
    return findings


def print_findings(findings: list[Finding], write: Callable[[str], None] = print) -> None:
    """Write one aligned line per finding."""
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        mark = "MISSING " if finding.is_missing else ""
        write(f"{finding.subject:<{width}}  {mark}{finding.finding}")


def _package(name: str, *, is_required: bool) -> Finding:
    try:
        return Finding(subject=name, finding=version(name))
    except PackageNotFoundError:
        hint = f"pip install {name}" if is_required else "not installed (optional, GPU only)"
        return Finding(subject=name, finding=hint, is_missing=is_required)


def _attention(has_gpu: bool) -> str:
    if not has_gpu:
        return "torch scaled_dot_product_attention per packed segment"
    return "Transformer Engine" if importlib.util.find_spec("transformer_engine") else "torch varlen attention"


def _kernels(has_gpu: bool) -> str:
    if not has_gpu:
        return "torch, chunked (no GPU)"
    return "triton" if importlib.util.find_spec("triton") else "torch, chunked (triton is not installed)"


def _apex() -> str:
    # The distribution called apex on PyPI is an unrelated web toolkit; NVIDIA's is known by its extension.
    found = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    return "fused weight gradients" if found else "not installed (optional)"
