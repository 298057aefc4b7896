"""Random states from checkpoint to checkpoint."""

from pathlib import Path

import pytest
import torch
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker, get_cuda_rng_tracker
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_p2o.policy.model.cpu_compat import cuda_stand_ins
from megatron_p2o.policy.training.random_state import TRACKER, load_random_state, save_random_state

NAME = "a-region"
CUDA_STATE = torch.zeros(16, dtype=torch.uint8)
"""State of a GPU's generator: 16 bytes, where the CPU's has 5056."""


@pytest.mark.parametrize("is_of_a_gpu", [False, True])
def test_a_machine_without_a_gpu_takes_what_serves_it(is_of_a_gpu: bool, tmp_path: Path) -> None:
    path = tmp_path / "states.safetensors"
    with cuda_stand_ins():
        tracker = get_cuda_rng_tracker()
        assert isinstance(tracker, CudaRNGStatesTracker)
        before = tracker.get_states()
        tracker.set_states({NAME: torch.Generator().manual_seed(5).get_state()})
        try:
            torch.manual_seed(3)
            save_random_state(path)
            expected = torch.rand(2), drawn(tracker)
            if is_of_a_gpu:
                as_of_a_gpu(path)
            tracker.set_states({NAME: torch.Generator().manual_seed(6).get_state()})
            other = drawn(tracker)
            tracker.set_states({NAME: torch.Generator().manual_seed(6).get_state()})
            torch.manual_seed(4)
            load_random_state(path)
            assert torch.equal(torch.rand(2), expected[0])
            assert torch.equal(drawn(tracker), other if is_of_a_gpu else expected[1])
        finally:
            tracker.set_states(before)


def drawn(tracker: CudaRNGStatesTracker) -> torch.Tensor:
    with tracker.fork(NAME):
        return torch.rand(2)


def as_of_a_gpu(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file({**tensors, "cuda": CUDA_STATE, TRACKER + NAME: CUDA_STATE.clone()}, path, metadata=metadata)
