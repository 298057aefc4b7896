"""Unpickles without running code. Parts of checkpoints and messages between ranks are pickles.

Of the peers of a rank nothing is known but that they have connected: gloo checks nobody.
"""

import dataclasses
import io
import os
import pathlib
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed import distributed_c10d

CHECKPOINT_METADATA = "torch.distributed.checkpoint.metadata"

# By this name Python 3.13 pickles paths, and other versions then load its checkpoints.
sys.modules.setdefault("pathlib._local", pathlib)

ALLOWED = frozenset(
    {
        *((module, name) for module in ("pathlib", "pathlib._local") for name in ("Path", "PosixPath")),
        ("torch", "Size"),
        ("torch", "device"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
        *((CHECKPOINT_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
        *((CHECKPOINT_METADATA, f"{kind}StorageMetadata") for kind in ("Tensor", "Bytes", "Chunk")),
        (CHECKPOINT_METADATA, "_MEM_FORMAT_ENCODING"),
    }
)
"""What the index of a checkpoint consists of, besides torch's data types: records and enumerations without effects."""

DATA_TYPES = frozenset(
    {"float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"}
)


RECORD_PACKAGES = ("megatron_p2o", "megatron.core", "torch.distributed.checkpoint")
"""Packages whose records, enumerations and errors ranks may tell one another."""

PEER_ALLOWED = ALLOWED | {
    *(("builtins", name) for name in ("set", "frozenset", "slice", "complex", "bytearray", "range")),
    *(("collections", name) for name in ("OrderedDict", "deque")),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *(("numpy", name) for name in ("ndarray", "dtype")),
    *(("torch._utils", f"_rebuild_{kind}") for kind in ("tensor_v2", "parameter")),
    *(("traceback", name) for name in ("StackSummary", "FrameSummary")),
}
"""What else they may: containers, arrays, tensors, and where an error came from."""

STORAGE_LOADERS = (("torch.storage", "_load_from_bytes"), ("megatron.core.safe_globals", "safe_load_from_bytes"))
"""By what a pickle says that it holds a tensor's numbers; megatron-core from 0.19 puts its own in torch's place."""


class RefusedPickle(ValueError):
    """A pickle names something that has no place in it."""


def _member(kind: Any, name: str) -> Any:
    """Stand in for `getattr`, by which Python 3.11.2 pickles members of enumerations: it gives nothing else."""
    if isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__:
        return kind[name]
    raise RefusedPickle("builtins.getattr")


class ErrorOfPeer(Exception):
    """An error of another rank whose class is not made here: the name of the class, then the arguments of the error."""

    def __str__(self) -> str:
        name, *told = self.args
        return f"{name}: {', '.join(map(str, told))}"


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) == ("builtins", "getattr"):
            return _member
        is_data_type = module_name == "torch" and global_name in DATA_TYPES
        if not is_data_type and (module_name, global_name) not in ALLOWED:
            raise RefusedPickle(f"{module_name}.{global_name}")
        return super().find_class(module_name, global_name)


class _PeerUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        name = (module_name, global_name)
        if name == ("builtins", "getattr"):
            return _member
        if name in STORAGE_LOADERS:
            return _load_storage
        is_of_records = any(f"{module_name}.".startswith(f"{package}.") for package in RECORD_PACKAGES)
        is_data_type = module_name == "torch" and global_name in DATA_TYPES
        # Nothing is imported for the question, and no attribute of what is allowed can be reached.
        if "." not in global_name and (
            is_of_records or module_name == "builtins" or is_data_type or name in PEER_ALLOWED
        ):
            found = super().find_class(module_name, global_name)
            if is_data_type or name in PEER_ALLOWED or _is_record(found, module_name):
                return found
        if global_name.isidentifier() and global_name.endswith(("Error", "Exception")):
            return partial(ErrorOfPeer, global_name)
        raise RefusedPickle(
            f"a peer of this rank sent {module_name}.{global_name}, which ranks do not tell one another: it is not made"
        )


def _is_record(kind: object, module_name: str) -> bool:
    """Return whether `kind` is a class of that module without effects when it is made."""
    if not isinstance(kind, type) or kind.__module__ != module_name:
        return False
    is_named_tuple = issubclass(kind, tuple) and hasattr(kind, "_fields")
    return is_named_tuple or dataclasses.is_dataclass(kind) or issubclass(kind, (Enum, BaseException))


def _load_storage(content: bytes) -> Any:
    """Stand in for the functions of `STORAGE_LOADERS`; torch's own would unpickle anything."""
    with weights_only_loading():
        return torch.load(io.BytesIO(content))


def refuse_code_of_peers() -> None:
    """Have the object collectives of this process, Megatron's too, make nothing but records and tensors.

    Raises:
        RuntimeError: the installed torch unpickles in another way than is known here.
    """
    if not hasattr(distributed_c10d, "_unpickler"):
        raise RuntimeError(f"torch {torch.__version__} has no distributed_c10d._unpickler to restrict: use torch 2.13")
    distributed_c10d._unpickler = _PeerUnpickler


def check_pickle(path: Path) -> None:
    """Read the index of a checkpoint, making nothing but what `ALLOWED` names.

    Raises:
        RefusedPickle: it names anything else: it was not written by this program, or was tampered with.
        OSError, pickle.UnpicklingError, EOFError: it is missing or damaged.
    """
    try:
        with path.open("rb") as file:
            _RestrictedUnpickler(file).load()
    except RefusedPickle as refused:
        raise RefusedPickle(f"{path} names {refused}, which has no place in a checkpoint: it is not loaded") from None


@contextmanager
def weights_only_loading() -> Iterator[None]:
    """Make every `torch.load` of this process refuse arbitrary objects inside the block, whatever its arguments."""
    wanted = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}
    before = {name: os.environ.get(name) for name in wanted}
    # Where the second asks for the opposite, torch would load nothing at all.
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
