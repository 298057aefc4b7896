"""Messages between trainer and engine during a weight refresh. Runs in SGLang's process too.

SGLang passes a list of (name, tensor) to a custom weight loader. The name carries one message as JSON and the tensor is
empty: weights travel in memory that both processes map, a file of the machine's or a span of a GPU's, so that neither
torch's sharing daemon nor the size of /dev/shm is involved.
"""

import base64
import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_p2o.files import write_whole
from megatron_p2o.records import from_tagged, from_text, to_json, to_tagged

LOAD_FORMAT = "megatron_p2o.rollout.inside_sglang.weight_loader.load"
"""Import path of the loader: the value of SGLang's `custom_weight_loader` and `load_format`."""

ALIGNMENT_BYTES = 16
"""Alignment of tensors in a bucket. A view needs the alignment of its element type."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryAddress:
    """Where an engine finds a bucket on its own machine."""

    path: str
    """Path of the memory file, as the engine opens it. Empty for GPU memory, which the last two fields identify."""
    buffer_id: str
    """Unique; memory never changes its size."""
    num_bytes: int
    """A multiple of `ALIGNMENT_BYTES`."""
    ipc_handle: str = ""
    """CUDA's, in hexadecimal digits."""
    gpu_uuid: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """One weight in a bucket."""

    name: str
    """Hugging Face name."""
    dtype: str
    """Name in the torch module, e.g. bfloat16."""
    shape: tuple[int, ...]
    offset_bytes: int
    """Offset from the start of the bucket."""

    def view(self, bucket: Tensor) -> Tensor:
        """Return the weight as a view of the bucket's bytes."""
        dtype = getattr(torch, self.dtype)
        count = 1
        for size in self.shape:
            count *= size
        start = self.offset_bytes
        return bucket[start : start + count * dtype.itemsize].view(dtype).view(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadMessage:
    """Load a bucket."""

    index: int
    """Index of the bucket in this refresh; 0 starts a refresh."""
    address: MemoryAddress
    """Address of the bucket."""
    entries: tuple[TensorEntry, ...]
    checksums: tuple[int, ...] | None
    """Checksums of the trainer's tensors in the same order; None if the refresh is not verified."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishMessage:
    """All buckets are sent: check what lies in the model and write a `RefreshReport` to `report_path`.rank."""

    report_path: str
    verify: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class RefreshReport:
    """One engine rank's account of a refresh."""

    num_tensors: int
    """Weights received."""
    num_verified: int
    """Parameter slices whose checksum was computed and compared."""
    corrupted: tuple[str, ...]
    """Weights that lie in the model otherwise than in the trainer."""
    ignored: tuple[str, ...]
    """Weights this rank took nothing from, twins of used weights excepted."""
    unwritten: tuple[str, ...]
    """Parameters of the model that no weight filled completely."""
    unopened: str
    """Why a bucket's memory could not be opened, and the rest is as it was; "" when all could."""


def serialize(message: LoadMessage | FinishMessage) -> str:
    """Return the payload of one tensor-parallel rank for /update_weights_from_tensor."""
    text = json.dumps(to_tagged(message, "kind"))
    return base64.b64encode(pickle.dumps([(text, _EmptyTensor())])).decode()


def parse(text: str) -> LoadMessage | FinishMessage:
    """Undo `serialize`, given the name that SGLang hands to the loader."""
    return from_tagged({kind.__name__: kind for kind in (LoadMessage, FinishMessage)}, json.loads(text), "kind")


def write_refresh_report(report: RefreshReport, path: Path) -> None:
    """Write what `read_refresh_report` reads. A reader sees all of it or nothing."""
    write_whole(path, json.dumps(to_json(report)))


def read_refresh_report(path: Path) -> RefreshReport:
    """Return what `write_refresh_report` wrote."""
    return from_text(RefreshReport, path.read_bytes())


class _EmptyTensor:
    """Pickles as `torch.ByteTensor()`, one of the constructors that SGLang's unpickler allows by name."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return torch.ByteTensor, ()
