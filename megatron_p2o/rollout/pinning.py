"""Page-locked host memory, without which copies to and from a GPU hold the processor up. Idle without CUDA.

Runs in the trainer and in the engine: each process locks the memory it has mapped for itself. Imports torch only.
"""

import contextlib
import logging
from typing import Any

import torch
from torch import Tensor

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
    """Undo `pin`, before the mapping goes: CUDA would take what is mapped there next for locked."""
    if memory.is_pinned() and int(cuda_runtime().cudaHostUnregister(memory.data_ptr())) != 0:
        forget_error()


def forget_error() -> None:
    """Have CUDA forget a call that failed: it would tell the next launch of a kernel, which would be blamed for it."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")


def cuda_runtime() -> Any:
    """Return torch's binding of the CUDA runtime."""
    return torch.cuda.cudart()


def finish_copies() -> None:
    """Return when the copies that this thread has begun are done."""
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
