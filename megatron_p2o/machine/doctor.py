"""`p2o doctor`: reports what this machine has and what is missing, without starting anything."""

import importlib.util
import platform
import shutil
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet

from megatron_p2o.machine.findings import Finding
from megatron_p2o.policy.model.layer_choice import choose_layers, import_failure, machine_capabilities

REQUIRED = {
    "torch": ">=2.11",
    "megatron-core": ">=0.16.1,<0.20",
    "sglang": ">=0.5.21",  # older ones unpickle whatever a weight update holds
    "transformers": ">=5",
    "tokenizers": "",
    "safetensors": "",
    "math-verify": "",
    "aiohttp": "",
    "openai": ">=2.6",
    "msgspec": "",
    "orjson": "",
}
"""Distributions without which no run starts, and the versions it takes."""

REQUIRED_ON_GPU = ("triton", "sglang-kernel", "flashinfer-python")
"""Distributions without which SGLang does not serve, or the fused kernels do not run, on a GPU.

Only a GPU that is visible or expected needs them: PyPI's torch for Linux is a CUDA build, on laptops too.
"""

OPTIONAL_ON_GPU = ("transformer-engine", "flash-attn", "torch-memory-saver")
"""Distributions that a run on a GPU does without."""

IMPORTED_ON_GPU = {"transformer-engine": "transformer_engine.pytorch", "flash-attn": "flash_attn"}
"""Distributions compiled against a specific torch. Importing the module shows whether it is the installed one."""

MIN_SHARED_MEMORY_BYTES = 1 << 30
"""Least size of /dev/shm, which transfers weights and which NCCL uses. Containers often have 64 MiB."""

MIN_FREE_GPU_SHARE = 0.9
"""Least free share of a GPU's memory before a job starts. With less, another process still holds some."""


def examine(num_gpus: int = 0, required: Collection[str] = ()) -> list[Finding]:
    """Return what was found, most basic first.

    Args:
        num_gpus: how many GPUs a job expects here, all to itself; 0 expects none.
        required: further requirements ("flash-attn", "torch==2.13.0").

    Raises:
        ValueError: one of `required` is no requirement.
    """
    num_visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    findings = [_lane(num_visible), Finding(subject="python", finding=platform.python_version())]
    accepted: dict[str, str | None] = {**REQUIRED, **dict.fromkeys(OPTIONAL_ON_GPU)}
    accepted |= dict.fromkeys(REQUIRED_ON_GPU, "" if num_gpus or num_visible else None)
    findings += [package_finding(name, versions) for name, versions in {**accepted, **_versions(required)}.items()]
    if num_visible:
        findings += _compiled_packages()
    if num_gpus or num_visible:
        findings += _gpus(num_visible, num_gpus)
    findings.append(_shared_memory(is_expected=num_gpus > 0))
    choice = choose_layers("auto", machine_capabilities())
    findings.append(Finding(subject="layers", finding=choice.layers_reason))
    findings.append(Finding(subject="attention", finding=choice.attention_reason))
    capability = torch.cuda.get_device_capability() if num_visible else None
    findings += kernel_findings(capability, has_triton=importlib.util.find_spec("triton") is not None)
    findings.append(Finding(subject="apex", finding=_apex()))
    return findings


def _lane(num_visible: int) -> Finding:
    if num_visible:
        lane = f"GPU ({num_visible} x {torch.cuda.get_device_name()}, CUDA {torch.version.cuda})"
    elif torch.version.cuda is not None:
        lane = f"GPU packages (CUDA {torch.version.cuda}), but no GPU is visible"
    else:
        lane = "CPU (gloo, float32)"
    return Finding(subject="lane", finding=lane)


def _versions(requirements: Collection[str]) -> dict[str, str]:
    """Return the versions each requirement accepts, by distribution."""
    try:
        parsed = [Requirement(requirement) for requirement in requirements]
    except InvalidRequirement as error:
        raise ValueError(f"--require: {error}") from error
    return {requirement.name: str(requirement.specifier) for requirement in parsed}


def package_finding(name: str, accepted: str | None) -> Finding:
    """Return whether a distribution is installed in an accepted version ("" accepts all, None does without)."""
    try:
        installed = version(name)
    except PackageNotFoundError:
        if accepted is None:
            return Finding(subject=name, finding="not installed (optional, GPU only)")
        return Finding(subject=name, finding=f'pip install "{name}{accepted}"', is_missing=True)
    if not SpecifierSet(accepted or "").contains(installed, prereleases=True):
        return Finding(subject=name, finding=f"{installed}, but must be {accepted}", is_missing=True)
    return Finding(subject=name, finding=installed)


def _compiled_packages() -> list[Finding]:
    """Return the installed packages that cannot be imported: they were compiled for another torch or CUDA."""
    broken: list[Finding] = []
    for name, module in IMPORTED_ON_GPU.items():
        failure = import_failure(module)
        if failure is not None:
            finding = f"cannot be imported, install it for torch {torch.__version__}: {failure}"
            broken.append(Finding(subject=name, finding=finding, is_missing=True))
    return broken


def _gpus(num_visible: int, num_expected: int) -> list[Finding]:
    """Return whether the expected number is there, and for each whether it computes and has its memory to itself."""
    if num_visible < num_expected:
        finding = (
            f"{num_visible} of {num_expected} are visible: see nvidia-smi, CUDA_VISIBLE_DEVICES and the job's GRES"
            f"{_cuda_complaint()}"
        )
        return [Finding(subject="gpus", finding=finding, is_missing=True)]
    return [_gpu(index, is_expected=index < num_expected) for index in range(num_visible)]


def _cuda_complaint() -> str:
    """Return why torch cannot use any GPU, such as a driver older than its CUDA; "" when it can."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"; torch says: {error}"
    return ""


def _gpu(index: int, *, is_expected: bool) -> Finding:
    subject = f"gpu {index}"
    try:
        free, total = torch.cuda.mem_get_info(index)
        ones = torch.ones(16, 16, device=f"cuda:{index}", dtype=torch.bfloat16)
        is_right = bool(((ones @ ones) == 16).all())
    except RuntimeError as error:
        return Finding(subject=subject, finding=f"does not compute: {error}", is_missing=True)
    memory = f"{free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
    if not is_right:
        return Finding(subject=subject, finding="computes wrongly: 16 ones do not add up to 16", is_missing=True)
    if is_expected and free < MIN_FREE_GPU_SHARE * total:
        return Finding(subject=subject, finding=f"{memory}: another process holds memory", is_missing=True)
    return Finding(subject=subject, finding=memory)


def _shared_memory(*, is_expected: bool) -> Finding:
    path = Path("/dev/shm")
    free = shutil.disk_usage(path).free if path.exists() else 0
    is_short = free < MIN_SHARED_MEMORY_BYTES
    remedy = f", a job with GPUs needs {MIN_SHARED_MEMORY_BYTES >> 20}: raise --shm-size" if is_short else ""
    return Finding(subject="/dev/shm", finding=f"{free >> 20} MiB free{remedy}", is_missing=is_short and is_expected)


HOPPER = (9, 0)
"""Compute capability the Triton kernels are written for."""

HEAD_OPERATIONS = ("linear_policy_loss", "linear_logprob")
"""Fused operations that multiply by the LM head; `head.kernel` chooses among their forms on a GPU."""

OTHER_OPERATIONS = ("grouped_advantage", "active_token_index")
"""Fused operations that are passes over memory."""


def kernel_findings(capability: tuple[int, int] | None, *, has_triton: bool) -> list[Finding]:
    """Return for each fused operation which path runs on which device, and why.

    Args:
        capability: compute capability of the GPU; None without one.
    """
    head, other = _kernel_paths(capability, has_triton=has_triton)
    return [
        *(Finding(subject=name, finding=head) for name in HEAD_OPERATIONS),
        *(Finding(subject=name, finding=other) for name in OTHER_OPERATIONS),
    ]


def _kernel_paths(capability: tuple[int, int] | None, *, has_triton: bool) -> tuple[str, str]:
    if capability is None:
        here = "torch on the CPU: no GPU is visible"
        return here, here
    if not has_triton:
        refused = "none: CUDA tensors are refused without triton, which is not installed"
        return f"{refused} (head.kernel: torch runs without it)", refused
    if capability == HOPPER:
        return "triton on the GPU, a Hopper: bfloat16 models; float32 ones need head.kernel: torch", "triton on the GPU"
    here, meant = (f"{major}.{minor}" for major, minor in (capability, HOPPER))
    untried = f"triton on the GPU: written for compute capability {meant}, untried on {here}"
    return f"{untried}; should it fail, set head.kernel to plain or torch", "triton on the GPU"


def _apex() -> str:
    # The distribution called apex on PyPI is an unrelated web toolkit; NVIDIA's is known by its extension.
    found = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    return "fused weight gradients" if found else "not installed (optional)"
