"""Which path runs is decided by the device, said by errors, and never needs triton on CPU."""

import subprocess
import sys

import pytest
import torch

from p2o_kernels.lm_head import HeadOptions, path_for
from p2o_kernels.lm_head.torch_path import TorchHead

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError
import torch
from p2o_kernels import LossRule, grouped_advantage, linear_logprob, linear_policy_loss
hidden, weight, targets = torch.randn(5, 4), torch.randn(7, 4), torch.arange(5)
linear_logprob(hidden, weight, targets)
ones = torch.ones(5)
linear_policy_loss(hidden, weight, targets, advantages_T=ones, weights_T=ones, rule=LossRule(context="replace"))
grouped_advantage(ones, targets, ones > 0, estimator="grpo")
print("done")
"""


class CudaLike(torch.Tensor):
    """A tensor that says it lies on a CUDA device."""

    is_cuda = True


def test_cpu_tensors_take_the_torch_path():
    assert isinstance(path_for(torch.zeros(1)), TorchHead)


def test_an_unsupported_cuda_dtype_is_refused_and_not_run_elsewhere():
    with pytest.raises(ValueError, match=r"hidden_TD is torch.float32: .* path=TorchHead\(\) \(setting head.kernel"):
        path_for(torch.zeros(1).as_subclass(CudaLike))


def test_one_option_selects_the_kernel_of_a_cuda_tensor():
    pytest.importorskip("triton", reason="triton is not installed: only torch can be selected")
    from p2o_kernels.lm_head.triton_path import PLAIN_TILE, Tile, TritonHead

    hidden = torch.zeros(1, dtype=torch.bfloat16).as_subclass(CudaLike)
    assert path_for(hidden) == TritonHead(tile=Tile(), weight_grad="fast")
    assert Tile().warp_specialize and not PLAIN_TILE.warp_specialize
    plain = path_for(hidden, HeadOptions(kernel="plain", weight_grad="precise"))
    assert plain == TritonHead(tile=PLAIN_TILE, weight_grad="precise")
    assert path_for(hidden.float(), HeadOptions(kernel="torch")) == TorchHead(chunk_bytes=2**30)


def test_every_operation_runs_on_cpu_without_triton():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "done", done.stderr
