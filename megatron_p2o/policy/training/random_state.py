"""The random states of a rank on disk: Python's, numpy's, torch's and Megatron's.

Nothing in a step draws from them today (dropout is zero, rollouts have seeds of their own); they are kept so that a
setting of Megatron's that does draw resumes rightly too.
"""

import json
import random
from pathlib import Path

import numpy as np
import torch
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker, get_cuda_rng_tracker
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_p2o.files import of_usual_mode

TRACKER = "megatron/"
"""Begins the names of the states of Megatron's tracker."""


def random_state_path(directory: Path, rank: int) -> Path:
    """Return where `directory` holds the states of a rank."""
    return directory / f"random-state-{rank:05d}.safetensors"


def save_random_state(path: Path) -> None:
    """Write the states of this process. Call inside `cuda_stand_ins`."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    states = _tracker().get_states()
    tensors |= {TRACKER + name: state for name, state in states.items() if isinstance(state, Tensor)}
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    numpy_state = [kind, np.asarray(keys).tolist(), position, has_gauss, gauss]
    metadata = {"python": json.dumps(random.getstate()), "numpy": json.dumps(numpy_state)}
    with of_usual_mode(path):
        save_file({name: state.clone() for name, state in tensors.items()}, path, metadata=metadata)


def load_random_state(path: Path) -> None:
    """Restore what `save_random_state` wrote; from a machine with a GPU to one without, or back, what serves both.

    Call inside `cuda_stand_ins`.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    version, internal, gauss_next = json.loads(metadata["python"])
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, position, has_gauss, gauss = json.loads(metadata["numpy"])
    np.random.set_state((kind, np.array(keys, np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(tensors["torch"])
    if ("cuda" in tensors) != torch.cuda.is_available():
        return  # Megatron's states are the generator's of a GPU, or without one the CPU's: not the other's
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    tracker = _tracker()
    saved = {name.removeprefix(TRACKER): state for name, state in tensors.items() if name.startswith(TRACKER)}
    if saved:
        tracker.set_states({**tracker.get_states(), **saved})


def _tracker() -> CudaRNGStatesTracker:
    tracker = get_cuda_rng_tracker()
    assert tracker is not None, "Megatron makes it on first use"
    return tracker
