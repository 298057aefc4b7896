"""Importing megatron-core without CUDA."""

import subprocess
import sys

import pytest
import torch

from megatron_p2o.policy.model.cpu_compat import without_compiler

IMPORTS = """
import sys
import torch
from megatron_p2o.policy.model.cpu_compat import without_compiler

compiler = torch.compile
with without_compiler():
    import megatron.core.tensor_parallel
    assert torch.compile(fullgraph=True)(len) is len
assert torch.compile is compiler
print(*(name for name in sys.modules if name.startswith("torch._inductor.compile")))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA, megatron-core compiles what it decorates")
def test_megatron_is_imported_without_torch_inductor() -> None:
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", IMPORTS], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == []


def test_the_compiler_is_back_after_an_import_that_failed() -> None:
    compiler = torch.compile
    with pytest.raises(ModuleNotFoundError), without_compiler():
        import no_such_module  # pyright: ignore[reportMissingImports]  # noqa: F401
    assert torch.compile is compiler
