"""Loading a checkpoint without running what is in it: megatron-core and torch keep part of it as pickles."""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

CHECKPOINT_METADATA = "torch.distributed.checkpoint.metadata"

ALLOWED = frozenset(
    {
        ("pathlib", "Path"),
        ("pathlib", "PosixPath"),
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


class RefusedPickle(ValueError):
    """A pickle names something that has no place in a checkpoint."""


def _member(kind: Any, name: str) -> Any:
    """Stand in for `getattr`, by which Python 3.11.2 pickles members of enumerations: it gives nothing else."""
    if isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__:
        return kind[name]
    raise RefusedPickle("builtins.getattr")


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) == ("builtins", "getattr"):
            return _member
        is_data_type = module_name == "torch" and global_name in DATA_TYPES
        if not is_data_type and (module_name, global_name) not in ALLOWED:
            raise RefusedPickle(f"{module_name}.{global_name}")
        return super().find_class(module_name, global_name)


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
    """Have every `torch.load` of this process refuse arbitrary objects inside the block, whatever its caller asks."""
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
