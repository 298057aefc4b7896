"""GPU memory shared by two processes: one allocates it, the other opens it by a handle (CUDA IPC).

Runs in the trainer and in the engine. Straight from the driver, because what torch's allocator gives out may lie in
memory that has no handle (growing segments, torch_memory_saver). Imports torch and cuda.bindings only.
"""

import contextlib
import importlib
import importlib.util
import logging
import math
import secrets
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from megatron_p2o.rollout.buckets.weight_message import MemoryAddress

PAGE_BYTES = 2 << 20
"""What the driver hands out at a time. Of a smaller piece the handle would open whatever lies beside it as well."""

BINDINGS = "cuda.bindings"
"""NVIDIA's package, which SGLang requires."""


class DeviceMemory:
    """Bytes on the current GPU that another process with that GPU can open. Kept until this process ends."""

    def __init__(self, num_bytes: int) -> None:
        """Args:
        num_bytes: a multiple of `ALIGNMENT_BYTES`.

        Raises:
            RuntimeError: the GPU has not so much left, or the driver shares no memory.
        """
        device = current_device()
        cuda = driver()
        num_pages = math.ceil(num_bytes / PAGE_BYTES)
        pointer = driver_values("cuMemAlloc", cuda.cuMemAlloc(num_pages * PAGE_BYTES))
        handle = driver_values("cuIpcGetMemHandle", cuda.cuIpcGetMemHandle(pointer))
        self.content = span(int(pointer), num_bytes, device)
        """[num_bytes] uint8."""
        self.address = MemoryAddress(
            path="",
            buffer_id=secrets.token_hex(8),
            num_bytes=num_bytes,
            ipc_handle=bytes(handle.reserved).hex(),
            gpu_uuid=uuid_of(device),
        )


def can_share_device_memory() -> bool:
    """Return whether this machine has a GPU and the libraries to share its memory."""
    return (
        torch.cuda.is_available()
        and importlib.util.find_spec("cuda") is not None
        and importlib.util.find_spec(BINDINGS) is not None
    )


def open_device_memory(address: MemoryAddress) -> Tensor:
    """Return the bytes at an address on the current GPU; `close_device_memory` gives them up.

    Raises:
        RuntimeError: they lie on another GPU, or the driver refuses.
    """
    device = current_device()
    if uuid_of(device) != address.gpu_uuid:
        raise RuntimeError(
            f"weights were left on GPU {address.gpu_uuid} for an engine on GPU {uuid_of(device)}: "
            "rollout.weight_transfer=host does not depend on which GPU an engine is on"
        )
    cuda = driver()
    handle = cuda.CUipcMemHandle()
    handle.reserved = bytes.fromhex(address.ipc_handle)
    flags = cuda.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS.value
    pointer = driver_values("cuIpcOpenMemHandle", cuda.cuIpcOpenMemHandle(handle, flags))
    return span(int(pointer), address.num_bytes, device)


def close_device_memory(memory: Tensor) -> None:
    """Give up what `open_device_memory` returned; nothing may be reading it."""
    driver_values("cuIpcCloseMemHandle", driver().cuIpcCloseMemHandle(memory.data_ptr()))


def current_device() -> torch.device:
    """Return this thread's GPU, whose context the driver then works in."""
    torch.cuda.current_stream().synchronize()
    return torch.device("cuda", torch.cuda.current_device())


def uuid_of(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def span(pointer: int, num_bytes: int, device: torch.device) -> Tensor:
    """Return the bytes at a GPU's address as a tensor that owns nothing."""
    return torch.as_tensor(CudaArray(pointer, num_bytes), device=device)


class CudaArray:
    """A description of memory that torch takes without copying it."""

    def __init__(self, pointer: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "version": 3,
        }


def driver() -> Any:
    """Return NVIDIA's binding of the CUDA driver."""
    return importlib.import_module(f"{BINDINGS}.driver")


def driver_values(call: str, answer: tuple[Any, ...]) -> Any:
    """Return what a call of the driver gave, or raise `RuntimeError` with the setting that does without it."""
    error, *values = answer
    if int(error) != 0:
        raise RuntimeError(f"{call}: {error!r}; rollout.weight_transfer=host works without shared GPU memory")
    return values[0] if values else None


BLOCK_WORDS = 1 << 20
"""64-bit words per pass: bounds the temporary memory to three times 8 MiB."""

MODULUS = 1 << 64
BLOCK_FACTOR = 0x9E3779B97F4A7C15
"""Odd, so multiplying by it modulo 2**64 loses nothing."""


@torch.no_grad()
def checksum(tensor: Tensor) -> int:
    """Return a number in [0, 2**64) that depends on every bit of the elements and on their order, not on strides.

    Each 64-bit word is multiplied by an odd factor of its position, so that any change within one word changes the sum
    for certain, and other changes (swapped rows, swapped tensors of one shape) go unseen with probability about 2**-63.
    """
    flat_bytes = tensor.detach().contiguous().flatten().view(torch.uint8)
    num_words = flat_bytes.numel() // 8
    words = flat_bytes[: num_words * 8]
    if words.storage_offset() % 8:
        words = words.clone()
    tail = int.from_bytes(bytes(flat_bytes[num_words * 8 :].tolist()), "little")
    total = flat_bytes.numel() * BLOCK_FACTOR + tail
    for block in words.view(torch.int64).split(BLOCK_WORDS):
        factors = position_factors(block.device)[: block.numel()]
        total = (total * BLOCK_FACTOR + int((block * factors).sum())) % MODULUS
    return total


@lru_cache(maxsize=8)
def position_factors(device: torch.device) -> Tensor:
    """Return [BLOCK_WORDS] odd int64 factors; products wrap modulo 2**64."""
    positions = torch.arange(1, BLOCK_WORDS + 1, dtype=torch.int64, device=device)
    mixed = positions * (BLOCK_FACTOR - MODULUS)
    return (mixed ^ (mixed >> 29)) | 1


PORTABLE = 1
"""cudaHostRegisterPortable: locked for every GPU of the process."""

logger = logging.getLogger(__name__)


def pin(memory: Tensor) -> None:
    """Lock the pages of `memory`, a mapping of this process, until `unpin`. Where that fails copies are slower."""
    if torch.cuda.is_available():
        error = cuda_runtime().cudaHostRegister(memory.data_ptr(), memory.nbytes, PORTABLE)
        if int(error) != 0:
            forget_error()
            logger.warning("%d MiB of staged weights could not be page-locked: %s", memory.nbytes >> 20, error)


def unpin(memory: Tensor) -> None:
    """Undo `pin` before unmapping. Otherwise CUDA takes the next mapping at this address for locked."""
    if memory.is_pinned() and int(cuda_runtime().cudaHostUnregister(memory.data_ptr())) != 0:
        forget_error()


def forget_error() -> None:
    """Clear CUDA's sticky last error. Otherwise the next kernel launch reports it as its own."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")


def cuda_runtime() -> Any:
    """Return torch's binding of the CUDA runtime."""
    return torch.cuda.cudart()


def finish_copies() -> None:
    """Return when the copies that this thread has begun are done."""
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
