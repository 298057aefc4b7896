"""Compile every Triton kernel for Hopper without a GPU and print what came out, as JSON.

    python kernels/bench/compile_sm90.py

Per variant: registers, shared memory, spill stores and the instructions that show how it was compiled: HGMMA (tensor
cores), UTMALDG / UTMASTG (bulk tensor copies), USETMAXREG (warp specialization). Uses the tools bundled with triton.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.halved_ranges import halved_ranges

from p2o_kernels.advantage import triton_kernels as advantage_kernels
from p2o_kernels.lm_head import triton_kernels as head_kernels
from p2o_kernels.lm_head.triton_path import PLAIN_TILE, TARGET_ROWS, Tile
from p2o_kernels.policy_loss import triton_kernels as loss_kernels

HOPPER = GPUTarget("cuda", 90, 32)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTIONS = ("HGMMA", "UTMALDG", "UTMASTG", "USETMAXREG", "STL", "LDL")

FLOAT_POINTERS = {
    "logits_ptr", "target_logits_ptr", "sums_ptr", "weighted_ptr", "rounded_ptr", "logprobs_ptr", "entropy_ptr",
    "scale_ptr", "complement_ptr", "probability_scale_ptr", "logprob_grad_ptr", "product_ptr", "weight_grad_ptr",
    "advantages_ptr", "weights_ptr", "old_ptr", "sampling_ptr", "losses_ptr", "token_weights_ptr", "ratio_ptr",
    "log_ratio_ptr", "reference_ptr", "rewards_ptr", "anchor_rates_ptr",
}  # fmt: skip
OTHER_POINTERS = {
    "*bf16": {"hidden_ptr", "weight_ptr", "exponentials_ptr", "result_ptr", "rest_ptr"},
    "*i64": {"targets_ptr", "order_ptr", "group_ids_ptr", "index_ptr", "ends_ptr"},
    "*i32": {"num_active_ptr"},
    "*i8": {"is_templated_ptr", "is_clipped_ptr"},
    "*u8": {"is_valid_ptr"},
}
FLOATS = {
    "scale", "inverse_temperature", "clip_low", "clip_high", "dual_clip", "ratio_low", "ratio_high", "max_log_ratio",
    "max_context_log_ratio", "kl_coefficient", "importance_cap",
}  # fmt: skip
MULTIPLES_OF_16 = {"hidden_size", "hidden_stride", "weight_stride", "exponentials_stride", "weight_grad_stride"}


Variant = tuple[str, Any, dict[str, Any], dict[str, int]]
"""Name, kernel, compile-time values, launch options."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompiledKernel:
    """What the compiler made of one variant."""

    name: str
    registers: int
    shared_bytes: int
    instructions: dict[str, int]
    num_halved_ranges: int
    num_halved_ranges_moved_twice: int
    """See `halved_ranges`. Must be 0, or results are wrong."""


def main() -> None:
    print(json.dumps([asdict(compile_kernel(*variant)) for variant in variants()], indent=1))


def variants() -> list[Variant]:
    """Return everything that production launches; of the token losses every setting, not every combination."""
    block = {"BLOCK": 1024}
    advantage = {"BLOCK_ROLLOUTS": 1024}
    return [
        exponentials_variant("gradient with entropy", Tile(), store=True, entropy=True),
        exponentials_variant("gradient", Tile(), store=True, entropy=False),
        exponentials_variant("scoring with entropy", Tile(), store=False, entropy=True),
        exponentials_variant("gradient with entropy, plain", PLAIN_TILE, store=True, entropy=True),
        exponentials_variant("scoring with entropy, plain", PLAIN_TILE, store=False, entropy=True),
        (
            "target_logits",
            head_kernels.target_logits_kernel,
            {"BLOCK_ROWS": TARGET_ROWS, "BLOCK_DEPTH": Tile().depth},
            {},
        ),
        *(
            (f"softmax_rows, {label}", head_kernels.softmax_rows_kernel, sums | {"BLOCK": 256}, {})
            for label, sums in (
                ("gradient with entropy", {"STORED": True, "ENTROPY": True}),
                ("gradient", {"STORED": True, "ENTROPY": False}),
                ("scoring with entropy", {"STORED": False, "ENTROPY": True}),
            )
        ),
        ("hidden_grad", head_kernels.hidden_grad_kernel, block, {}),
        ("scale_rows", head_kernels.scale_rows_kernel, {"REST": False} | block, {}),
        ("scale_rows, precise", head_kernels.scale_rows_kernel, {"REST": True} | block, {}),
        ("add_target_rows", head_kernels.add_target_rows_kernel, block, {}),
        *token_loss_variants(),
        *(
            (
                f"grouped_advantage, {estimator}{', anchored' if anchored else ''}",
                advantage_kernels.grouped_advantage_kernel,
                {"ESTIMATOR": estimator, "HAS_ANCHORS": anchored} | advantage,
                {},
            )
            for estimator, anchored in (("grpo", True), ("grpo", False), ("dr_grpo", True), ("rloo", True))
        ),
        ("count_active", advantage_kernels.count_active_kernel, {"BLOCK_TOKENS": 1024}, {}),
        ("active_token_index", advantage_kernels.active_token_index_kernel, {"BLOCK_TOKENS": 1024}, {}),
    ]


def token_loss_variants() -> list[Variant]:
    """Return the token losses of the settings' defaults, of an objective's second update, and of the other choices."""
    ppo = {"HAS_LOG_RATIO": False, "CISPO": False, "DUAL_CLIP": True}
    gspo = {"CISPO": False, "DUAL_CLIP": False}
    cispo = {"HAS_LOG_RATIO": False, "CISPO": True, "DUAL_CLIP": False}
    # With old log-probs the context ratio has been applied before.
    first, later = {"HAS_OLD": False, "HAS_MASK": True}, {"HAS_OLD": True, "HAS_MASK": False}
    hard, soft, fading, default = (
        {name: name == chosen for name in ("SOFT", "FADING", "ONE_SIDED")}
        for chosen in ("", "SOFT", "FADING", "ONE_SIDED")
    )
    banded, capped = {"HAS_BAND": True, "HAS_CAP": False}, {"HAS_BAND": True, "HAS_CAP": True}
    no_kl, k2, k3 = {"K2": False, "K3": False}, {"K2": True, "K3": False}, {"K2": False, "K3": True}
    chosen = {
        "ppo, first": ppo | first | default | no_kl | banded,
        "ppo, first, with k3": ppo | first | default | k3 | banded,
        "ppo, first, hard": ppo | first | hard | no_kl | banded,
        "ppo, first, soft, capped, with k2": ppo | first | soft | k2 | capped,
        "ppo, first, capped without a band": ppo | first | default | no_kl | {"HAS_BAND": False, "HAS_CAP": True},
        "ppo, first, unmasked": ppo
        | first
        | default
        | no_kl
        | {"HAS_MASK": False, "HAS_BAND": False, "HAS_CAP": False},
        "ppo, later": ppo | later | default | no_kl | banded,
        "ppo, later, hard": ppo | later | hard | no_kl | banded,
        "gspo, first, fading, capped": gspo | first | {"HAS_LOG_RATIO": False} | fading | no_kl | capped,
        "gspo, later, with k3": gspo | later | {"HAS_LOG_RATIO": True} | default | k3 | banded,
        "gspo, later": gspo | later | {"HAS_LOG_RATIO": True} | default | no_kl | banded,
        "cispo, first": cispo | first | default | no_kl | banded,
        "cispo, first, capped, with k3": cispo | first | default | k3 | capped,
    }
    kernel = loss_kernels.token_losses_kernel
    return [(f"token_losses, {label}", kernel, settings | {"BLOCK": 256}, {}) for label, settings in chosen.items()]


def exponentials_variant(label: str, tile: Tile, *, store: bool, entropy: bool) -> Variant:
    """Return the first product with one tile configuration."""
    constants = {
        "STORE": store,
        "ENTROPY": entropy,
        "WARP_SPECIALIZE": tile.warp_specialize,
        "BLOCK_ROWS": tile.rows,
        "BLOCK_COLUMNS": tile.columns,
        "BLOCK_DEPTH": tile.depth,
    }
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return f"exponentials, {label}", head_kernels.exponentials_kernel, constants, options


def compile_kernel(name: str, kernel: Any, constants: Mapping[str, Any], options: Mapping[str, int]) -> CompiledKernel:
    """Compile one variant with the argument types and alignments that a launch would have."""
    names: list[str] = kernel.arg_names
    signature = {argument: "constexpr" if argument in constants else type_of(argument) for argument in names}
    aligned = [
        index
        for index, argument in enumerate(names)
        if argument not in constants and (argument.endswith("_ptr") or argument in MULTIPLES_OF_16)
    ]
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(argument),): value for argument, value in constants.items()},
        attrs={(index,): [["tt.divisibility", 16]] for index in aligned},
    )
    compiled = triton.compile(source, target=HOPPER, options=dict(options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        assembly = _run("nvdisasm", "-c", file.name)
    num_halved_ranges, num_moved_twice = halved_ranges(compiled.asm["ttgir"])
    counts = Counter(re.findall(rf"\b({'|'.join(INSTRUCTIONS)})\b", assembly))
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    return CompiledKernel(
        name=name,
        registers=int(registers.group(1)),
        shared_bytes=compiled.metadata.shared,
        instructions={instruction: counts[instruction] for instruction in INSTRUCTIONS},
        num_halved_ranges=num_halved_ranges,
        num_halved_ranges_moved_twice=num_moved_twice,
    )


def type_of(argument: str) -> str:
    """Return the type of a kernel's argument by its name, as Triton writes it."""
    if argument in FLOAT_POINTERS:
        return "*fp32"
    for pointer, arguments in OTHER_POINTERS.items():
        if argument in arguments:
            return pointer
    return "fp32" if argument in FLOATS else "i32"


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True, timeout=60).stdout


if __name__ == "__main__":
    main()
