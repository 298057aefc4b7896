"""Hugging Face model directories: reading cuts of tensors, writing weights with configuration and tokenizer."""

import json
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
MAX_FILE_BYTES = 5 * 2**30
"""Size at which a written file is closed and the next begun, as transformers does."""


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

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, dimension: int | None = None, start: int = 0, end: int | None = None) -> Tensor:
        """Return a tensor, or the part of it from `start` to `end` along `dimension` (0 or 1); reads only that."""
        tensor = self._slice(name)
        if dimension is None:
            return tensor[:]
        return tensor[start:end] if dimension == 0 else tensor[:, start:end]

    def _slice(self, name: str) -> Any:
        if name not in self._file_of:
            raise ValueError(f"model.path={self.directory} has no tensor {name}: the weights do not fit config.json")
        return self._file(self._file_of[name]).get_slice(name)

    def _file(self, file_name: str) -> Any:
        if file_name not in self._open:
            self._open[file_name] = self._files.enter_context(safe_open(self.directory / file_name, framework="pt"))
        return self._open[file_name]

    def _read_index(self) -> Mapping[str, str]:
        index = self.directory / INDEX_FILE
        if index.is_file():
            return json.loads(index.read_text())["weight_map"]
        if not (self.directory / SINGLE_FILE).is_file():
            raise ValueError(f"model.path={self.directory} has neither {SINGLE_FILE} nor {INDEX_FILE}")
        return dict.fromkeys(self._file(SINGLE_FILE).keys(), SINGLE_FILE)


def write_hf_directory(
    weights: Iterable[tuple[str, Tensor]], source: Path, directory: Path, max_file_bytes: int = MAX_FILE_BYTES
) -> None:
    """Write `weights` as safetensors into `directory`, with the configuration and tokenizer files of `source`.

    Consumes `weights` to the end; holds one file's worth of tensors at a time.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix not in WEIGHT_SUFFIXES and path.name not in (INDEX_FILE, "config.json"):
            shutil.copyfile(path, directory / path.name)
    names_of_files: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    dtype, total_bytes, pending_bytes = "float32", 0, 0
    for name, tensor in weights:
        num_bytes = tensor.numel() * tensor.element_size()
        if pending and pending_bytes + num_bytes > max_file_bytes:
            names_of_files.append(_write_file(pending, directory, len(names_of_files)))
            pending, pending_bytes = {}, 0
        pending[name] = tensor.cpu().contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        pending_bytes += num_bytes
        total_bytes += num_bytes
    names_of_files.append(_write_file(pending, directory, len(names_of_files)))
    _name_files(directory, names_of_files, total_bytes)
    _write_config(source, directory, dtype)


def _write_file(tensors: Mapping[str, Tensor], directory: Path, number: int) -> list[str]:
    save_file(dict(tensors), directory / f"part-{number}.safetensors", metadata={"format": "pt"})
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
    settings = json.loads((source / "config.json").read_text())
    settings.pop("torch_dtype", None)
    settings["dtype"] = dtype
    (directory / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
