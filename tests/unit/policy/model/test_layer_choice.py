"""A Transformer Engine that is installed and broken: login nodes and image builds have no driver."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
from megatron_p2o.policy.model.layer_choice import choose_layers, machine_capabilities
from megatron_p2o.policy.model.model import build_models
import megatron.core.extensions
print(choose_layers("auto", machine_capabilities()).layers_reason)
"""


def run_with_path(program: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run a Python program that finds the packages of `folder` first."""
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("fails_in", "error"),
    [
        ("__init__.py", "FileNotFoundError('Could not find shared object file for Transformer Engine torch lib.')"),
        ("pytorch/__init__.py", "OSError('libcuda.so.1: cannot open shared object file')"),
    ],
    ids=["no extension for torch", "no driver"],
)
def test_a_transformer_engine_that_cannot_be_imported_is_named_and_done_without(
    fails_in: str, error: str, tmp_path: Path
) -> None:
    package = tmp_path / "transformer_engine"
    (package / "pytorch").mkdir(parents=True)
    for name in ("__init__.py", "pytorch/__init__.py"):
        (package / name).write_text(f"raise {error}\n" if name == fails_in else "")
    done = run_with_path(PROGRAM, tmp_path)
    assert done.returncode == 0, done.stderr
    quoted = error.split("'")[1]
    assert done.stdout.strip().endswith(f"Transformer Engine cannot be imported: {quoted}")


def test_transformer_engine_does_not_take_the_flash_attn_4_that_sglang_brings() -> None:
    program = (
        "import megatron_p2o.policy.model.transformer_engine_attention\n"
        "from transformer_engine.pytorch.attention.dot_product_attention.utils import FlashAttentionUtils\n"
        "print(FlashAttentionUtils.v4_is_installed)"
    )
    done = run_with_path(program, Path(__file__).parents[3] / "stand_ins")
    assert (done.stdout.strip(), done.returncode) == ("False", 0), done.stderr
