"""The published libraries of a run, parsed once for each state of their files."""

from collections.abc import Sequence
from pathlib import Path

from megatron_p2o.evolve.record.library import LibraryFile
from megatron_p2o.files import read_json_object
from megatron_p2o.records import from_json
from megatron_p2o.view.followed import FileState, file_state


class LibraryFiles:
    """`templates/library-*.json`."""

    def __init__(self, run_dir: Path) -> None:
        self._directory = run_dir / "templates"
        self._known: dict[Path, tuple[FileState, LibraryFile | str]] = {}
        """The state of each file, and what it held: a library, or a sentence on what is wrong with it."""

    def catch_up(self) -> None:
        """Read the files that are new."""
        states = {path: file_state(path) for path in self._directory.glob("library-*.json")}
        self._known = {
            path: known if (known := self._known.get(path)) and known[0] == state else (state, _content(path))
            for path, state in states.items()
            if state is not None
        }

    def libraries(self) -> Sequence[LibraryFile]:
        """Return those that can be read, oldest first."""
        read = [content for _, content in self._known.values() if isinstance(content, LibraryFile)]
        return sorted(read, key=lambda library: library.version)

    def damages(self) -> list[str]:
        """Return a sentence for each that cannot be read."""
        contents = (self._known[path][1] for path in sorted(self._known))
        return [content for content in contents if isinstance(content, str)]


def _content(path: Path) -> LibraryFile | str:
    try:
        return from_json(LibraryFile, read_json_object(path), skips_unknown=True)
    except (OSError, ValueError) as error:
        return f"{path} is no library of templates ({error}): restore it"
