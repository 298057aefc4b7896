"""The source of prepared problems: repository, revision, licence and the checksum of every file."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_p2o.data.published.sources import Source
from megatron_p2o.files import digest_of

NOT_STATED = "not stated beside the files"

_COMMIT = re.compile(r"[0-9a-f]{40}")
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """A download."""

    name: str
    repository: str | None
    revision: str | None
    """Commit of the repository; None when nobody tells it."""
    licence: str
    """Licence that the card beside the files states. Whoever published them may not own every problem."""
    files: tuple[tuple[str, int, str], ...]
    """Name, bytes, SHA-256."""


def origin_of(source: Source, files: Sequence[Path], revision: str | None = None, licence: str | None = None) -> Origin:
    """Return where `files` come from; revision and licence are looked for where the hub's client leaves them."""
    return Origin(
        name=source.name,
        repository=source.hub_repository,
        revision=revision or _revision_of(files[0]),
        licence=licence or _licence_of(files[0]),
        files=tuple((path.name, digest.size_bytes, digest.sha256) for path in files for digest in [digest_of(path)]),
    )


def _revision_of(file: Path) -> str | None:
    """Return the commit that the hub's client recorded: in its cache as a folder's name, else in a file of its own."""
    from_path = next((part for part in reversed(file.absolute().parts) if _COMMIT.fullmatch(part)), None)
    return from_path or next(filter(None, (_recorded_commit(file, folder) for folder in file.absolute().parents)), None)


def _recorded_commit(file: Path, folder: Path) -> str | None:
    name = file.absolute().relative_to(folder)
    record = folder / ".cache" / "huggingface" / "download" / f"{name}.metadata"
    if not record.is_file():
        return None
    first_line = record.read_text(encoding="utf-8", errors="replace").partition("\n")[0].strip()
    return first_line if _COMMIT.fullmatch(first_line) else None


def _licence_of(file: Path) -> str:
    """Return the licence of the nearest card: beside the file, or a folder above where the rows lie in `data/`."""
    cards = (folder / "README.md" for folder in list(file.absolute().parents)[:2])
    card = next((card for card in cards if card.is_file()), None)
    front_matter = card and _FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace"))
    if not front_matter:
        return NOT_STATED
    try:
        fields = yaml.safe_load(front_matter[1])
    except (yaml.YAMLError, RecursionError):
        return NOT_STATED
    stated = fields.get("license") if isinstance(fields, dict) else None
    names = stated if isinstance(stated, list) else [stated]
    return ", ".join(name for name in names if isinstance(name, str)) or NOT_STATED
