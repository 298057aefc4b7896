"""Which program made a run: its version, its commit and a digest of its source."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

from megatron_p2o import __version__
from megatron_p2o.files import digest_of, json_digest

PACKAGE = Path(__file__).parents[1]

GIT_TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgramVersion:
    """What ran."""

    version: str
    commit: str
    """Commit of the checkout that holds the package; "" where it is in none, or git does not answer."""
    source: str
    """64 bits of the SHA-256 of the package's Python files: what is not committed shows here."""


def this_program() -> ProgramVersion:
    """Return what runs now."""
    files = {str(path.relative_to(PACKAGE)): digest_of(path).sha256 for path in sorted(PACKAGE.rglob("*.py"))}
    return ProgramVersion(version=__version__, commit=_commit(PACKAGE.parent), source=json_digest(files)[:16])


def _commit(checkout: Path) -> str:
    if not (checkout / ".git").exists():
        return ""
    command = ["git", "-C", str(checkout), "rev-parse", "--short=12", "HEAD"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return said.stdout.strip() if said.returncode == 0 else ""
