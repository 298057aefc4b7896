"""Hugging Face model directories: reading cuts of tensors, writing weights with configuration and tokenizer."""

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_p2o.files import of_usual_mode, read_json_object
from megatron_p2o.terminal import listed

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
MAX_FILE_BYTES = 5 * 2**30
"""Size at which a written file is closed and the next begun, as transformers does; what the writer holds at most."""

REDUNDANT_SUFFIXES = ("lm_head.weight", "rotary_emb.inv_freq")
"""Name endings of tensors that a directory may contain although the model computes them from others."""

FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
"""Types of tensors that hold the weights themselves; of others, quantised ones, the scales would be lost."""

LFS_POINTER = b"version https://git-lfs"
"""First bytes of what `git clone` leaves of a large file without Git LFS."""

MAX_TENSORS_NAMED = 8
"""Tensors an error names of each kind."""


class WeightFiles:
    """The safetensors of a directory, opened when first asked and closed at the end of the `with` block."""

    def __init__(self, directory: Path) -> None:
        """Raise `ValueError` when the directory holds no safetensors."""
        self.directory = directory
        self._files = ExitStack()
        self._open: dict[str, Any] = {}
        self._file_of = self._read_index()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._files.close()

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compare the headers of all files with `shapes` by name; reads no weights.

        Tensors that a model can do without are passed over: a stored copy of a tied head, old rotary buffers.

        Raises:
            ValueError: a file is missing or damaged, or tensors are missing, unknown, of another shape or of whole
                numbers; it names them.
        """
        found = [name for name in self._file_of if name in shapes]
        unknown = [name for name in self._file_of if name not in shapes and not name.endswith(REDUNDANT_SUFFIXES)]
        misshaped = [
            f"{name} {self.shape(name)} instead of {shapes[name]}" for name in found if self.shape(name) != shapes[name]
        ]
        types = {name: self._slice(name).get_dtype() for name in found}
        mistyped = [f"{name} ({kind})" for name, kind in types.items() if kind not in FLOAT_TYPES]
        missing = sorted(shapes.keys() - self._file_of.keys())
        kinds = (
            ("missing", missing),
            ("unknown", sorted(unknown)),
            ("of another shape", sorted(misshaped)),
            ("not of floating point", sorted(mistyped)),
        )
        complaints = [f"{len(names)} {kind}: {first_of(names)}" for kind, names in kinds if names]
        if complaints:
            raise ValueError(
                f"model.path={self.directory}: the tensors are not those of its config.json. {'. '.join(complaints)}"
            )

    @property
    def names(self) -> Sequence[str]:
        """Names of all tensors."""
        return tuple(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, dimension: int | None = None, start: int = 0, end: int | None = None) -> Tensor:
        """Return a tensor, or the part of it from `start` to `end` along `dimension`; a view of the mapped file.

        Reads only that when it is used; but along dimension 1, parts of rows, the machine reads whole pages.
        """
        cut = (slice(None),) * (dimension or 0) + (slice(start, end),)
        return self._slice(name)[cut]

    def _slice(self, name: str) -> Any:
        if name not in self._file_of:
            raise ValueError(f"model.path={self.directory} has no tensor {name}: the weights do not fit config.json")
        file_name = self._file_of[name]
        try:
            return self._file(file_name).get_slice(name)
        except SafetensorError as error:
            raise ValueError(f"{self.directory / file_name} has no tensor {name}, as {INDEX_FILE} says") from error

    def _file(self, file_name: str) -> Any:
        if file_name not in self._open:
            self._open[file_name] = self._files.enter_context(_opened(self.directory / file_name))
        return self._open[file_name]

    def _read_index(self) -> Mapping[str, str]:
        index = self.directory / INDEX_FILE
        if index.is_file():
            weight_map = read_json_object(index).get("weight_map")
            # A name with a path could lead out of the directory.
            if not isinstance(weight_map, dict) or not all(_is_file_name(name) for name in weight_map.values()):
                raise ValueError(f"{index} must map tensors to files beside it in weight_map: download it again")
            return weight_map
        if not (self.directory / SINGLE_FILE).is_file():
            raise ValueError(f"model.path={self.directory} has neither {SINGLE_FILE} nor {INDEX_FILE}")
        return dict.fromkeys(self._file(SINGLE_FILE).keys(), SINGLE_FILE)


def _opened(path: Path) -> Any:
    """Return an open file of safetensors; its header has been read and compared with its size."""
    if not path.exists():
        raise ValueError(f"{path} is missing: {INDEX_FILE} names it, download it again")
    # safetensors calls every file missing that it may not read.
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{path} is a pointer of Git LFS instead of the weights: run `git lfs pull`")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}): download it again") from error


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name


def write_hf_directory(
    weights: Iterable[tuple[str, Tensor]], source: Path, directory: Path, max_file_bytes: int = MAX_FILE_BYTES
) -> None:
    """Write `weights` as safetensors into `directory`, with the configuration and tokenizer files of `source`.

    Consumes `weights` to the end and holds at most `max_file_bytes` of it (or one larger tensor). Written under a
    temporary name beside `directory`, which appears whole or not at all.

    Raises:
        ValueError: `directory` exists and is not empty.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} exists: name a directory that does not, or remove it")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.partial-", dir=directory.parent) as temporary:
        partial = Path(temporary) / directory.name
        partial.mkdir()
        for path in sorted(source.iterdir()):
            if path.is_file() and path.suffix not in WEIGHT_SUFFIXES and path.name not in (INDEX_FILE, "config.json"):
                shutil.copyfile(path, partial / path.name)
        dtype = _write_weights(weights, partial, max_file_bytes)
        _write_config(source, partial, dtype)
        partial.rename(directory)


def _write_weights(weights: Iterable[tuple[str, Tensor]], directory: Path, max_file_bytes: int) -> str:
    """Write the files and their index; returns the name of the tensors' dtype."""
    names_of_files: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    dtype, total_bytes, pending_bytes = "float32", 0, 0
    for name, tensor in weights:
        if pending and pending_bytes + tensor.nbytes > max_file_bytes:
            names_of_files.append(_write_file(pending, directory, len(names_of_files)))
            pending, pending_bytes = {}, 0
        pending[name] = tensor.cpu().contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        pending_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    names_of_files.append(_write_file(pending, directory, len(names_of_files)))
    _name_files(directory, names_of_files, total_bytes)
    return dtype


def _write_file(tensors: Mapping[str, Tensor], directory: Path, number: int) -> list[str]:
    path = directory / f"part-{number}.safetensors"
    with of_usual_mode(path):
        save_file(dict(tensors), path, metadata={"format": "pt"})
    return list(tensors)


def _name_files(directory: Path, names_of_files: list[list[str]], total_bytes: int) -> None:
    """Give the parts the names transformers looks for: their number is known only now."""
    count = len(names_of_files)
    if count == 1:
        (directory / "part-0.safetensors").rename(directory / SINGLE_FILE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(names_of_files):
        file_name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        (directory / f"part-{number}.safetensors").rename(directory / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _write_config(source: Path, directory: Path, dtype: str) -> None:
    settings = read_json_object(source / "config.json")
    settings.pop("torch_dtype", None)
    settings["dtype"] = dtype
    (directory / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def first_of(names: Sequence[str]) -> str:
    """Return how an error lists the names of tensors."""
    return listed(names, MAX_TENSORS_NAMED)
