"""Memory of a GPU in two processes: only a GPU can show it."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
import torch

from megatron_p2o.rollout.buckets.device_memory import (
    DeviceMemory,
    can_share_device_memory,
    close_device_memory,
    open_device_memory,
)
from megatron_p2o.rollout.buckets.weight_message import MemoryAddress

TIMEOUT_S = 120

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not can_share_device_memory(), reason="no CUDA device, or no cuda.bindings"),
]


def double(address: MemoryAddress, num_values: int) -> list[int]:
    """Return what lies at an address and leave twice that there: an engine's side."""
    memory = open_device_memory(address)
    found = memory[:num_values].tolist()
    memory.mul_(2)
    torch.cuda.synchronize()
    close_device_memory(memory)
    return found


def refusal(address: MemoryAddress) -> str:
    with pytest.raises(RuntimeError) as refused:
        open_device_memory(address)
    return str(refused.value)


@pytest.fixture
def other_process():
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def test_two_processes_read_and_write_the_same_bytes(other_process: ProcessPoolExecutor) -> None:
    memory = DeviceMemory(1 << 20)
    assert memory.content.is_cuda and memory.content.dtype == torch.uint8 and memory.content.numel() == 1 << 20
    for turn in (1, 2):  # opened again after it was closed
        memory.content.copy_(torch.arange(1 << 20) % 100 + turn)
        torch.cuda.synchronize()
        found = other_process.submit(double, memory.address, 8).result(TIMEOUT_S)
        assert found == [turn + index for index in range(8)]
        assert memory.content[:8].tolist() == [2 * value for value in found]


def test_memory_of_another_gpu_is_refused_by_name(other_process: ProcessPoolExecutor) -> None:
    address = replace(DeviceMemory(1 << 16).address, gpu_uuid="another")
    assert "were left on GPU another for an engine on GPU" in other_process.submit(refusal, address).result(TIMEOUT_S)


def test_memory_that_is_not_there_is_an_error_with_its_remedy() -> None:
    with pytest.raises(RuntimeError, match=r"cuMemAlloc: .*rollout\.weight_transfer=host"):
        DeviceMemory(1 << 50)
