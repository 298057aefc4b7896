"""The checkpoints of a run: written during training, complete or not at all, and checked before use.

runs/<name>/checkpoints/step-000030/policy/          weights, optimizer and random states
                                    run_state.json   where training stands, see `run_folder.state.RunState`
                                    made_with.json   settings, problems and files, see `run_folder.made_with.MadeWith`
                                    manifest.json    size and sha256 of every other file, written last
runs/<name>/checkpoints/latest                       name of the newest checkpoint, written once it is there
runs/<name>/checkpoints/best                         name and score of the best one, see `evaluation.best_set`

A folder that begins with a dot is not a checkpoint (yet, or any more).
"""

import json
import logging
import os
import shutil
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from megatron_p2o import __version__
from megatron_p2o.files import FileDigest, digest_of, write_whole
from megatron_p2o.interfaces import Policy
from megatron_p2o.records import from_text, to_json
from megatron_p2o.run_folder.made_with import MADE_WITH_FILE, MadeWith, made_with_text
from megatron_p2o.run_folder.state import STATE_FILE, UNREADABLE, CheckpointError, RunState, write_state

POLICY_FOLDER = "policy"
MANIFEST_FILE = "manifest.json"
BEST_FILE = "best"
LATEST_FILE = "latest"
FORMAT = 1

PARTIAL = ".partial-"
REPLACED = ".replaced-"
"""Begin the names of a checkpoint that is being written, and of one that another of its step takes the place of."""

WRITE_TIMEOUT_S = 3600.0
"""Longest wait for the files of one checkpoint."""

HASHED_BYTES = 16 << 30
"""Before a checkpoint is used, its files are hashed up to this total, small ones first: 10 to 30 s. Sizes are always
compared. The hashes of larger files remain in the manifest, for a check by hand."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Best:
    """The checkpoint that did best on an evaluation set."""

    checkpoint: str
    """Name of its folder."""
    step: int
    set: str
    """Name under `data.evaluation`."""
    metric: str
    """avg or pass_at_k."""
    score: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a whole checkpoint consists of."""

    format: int = FORMAT
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    """Versions of the packages that wrote it."""
    files: Mapping[str, FileDigest]
    """Digests by relative file name, without the manifest itself."""


class CheckpointSaver:
    """Saves the checkpoints of a run, one at a time, from rank 0."""

    def __init__(
        self,
        run_dir: Path,
        policy: Policy,
        keep_last: int,
        resumed: Path | None = None,
        record: MadeWith | None = None,
    ) -> None:
        """`keep_last`: checkpoints to keep, the one just written included. `resumed`: what the run goes on from.

        Later ones than `resumed`, damaged or of a history given up, count for nothing and go when they are passed.
        `record` goes into every checkpoint.
        """
        self._folder = run_dir / "checkpoints"
        self._policy = policy
        self._keep_last = keep_last
        self._record = record
        self._saving: Future[Path] | None = None
        restore_replaced(self._folder)
        found = [path.name for path in self._folder.glob("step-*")]
        self._own = {name for name in found if resumed is not None and name <= resumed.name}
        """Names of this history's checkpoints."""
        self._healthy_until = 0
        """The newest step that was sampled and learnt from with numbers."""

    def begin(self, state: RunState, best: Best | None = None) -> None:
        """Return once the state is copied; the files are written beside training. Waits for the checkpoint before.

        `best`: what makes this the best checkpoint so far; None where it is not.

        Raises:
            CheckpointError: the checkpoint before, or the beginning of this one, could not be written (disk full).
        """
        self.finish()
        name = checkpoint_name(state.step)
        partial = self._folder / f"{PARTIAL}{name}"
        try:
            for left in self._folder.glob(f"{PARTIAL}*"):
                shutil.rmtree(left)
            (partial / POLICY_FOLDER).mkdir(parents=True)
            write_state(partial / STATE_FILE, state)
            if self._record is not None:
                write_whole(partial / MADE_WITH_FILE, made_with_text(self._record))
            written = self._policy.save(partial / POLICY_FOLDER)
        except (OSError, RuntimeError) as error:  # a rank that fails is a RuntimeError here
            raise self._failure(name, error) from error
        self._saving = saving = Future()
        work = (name, written, saving, best)
        threading.Thread(target=self._complete, args=work, daemon=True, name="checkpoint").start()

    def confirm(self, step: int) -> None:
        """Note that `step` was healthy: so were the weights before it. The newest checkpoint of such weights stays."""
        self._healthy_until = step

    @property
    def newest_healthy(self) -> str:
        """Name of the newest checkpoint that was sampled and trained well since; "" before there is one."""
        return max((name for name in self._own if name < checkpoint_name(self._healthy_until)), default="")

    def way_back(self, is_newest_good: bool) -> str:
        """Return which checkpoint to go back to when the policy has diverged, and how.

        `is_newest_good`: whether the newest is known to be, although no step has ended since.
        """
        if not self._own:
            return "there is no checkpoint yet: start the run again with a lower optimizer.lr"
        newest = max(self._own)
        healthy = newest if is_newest_good else self.newest_healthy
        lower = "start the run again with a lower optimizer.lr, which it takes from there"
        if healthy == newest:
            return f"{self._folder / newest} is good, nothing was saved since: {lower}"
        pointer = self._folder / LATEST_FILE
        if healthy:
            return f"{self._folder / healthy} is the newest that is good: write {healthy} into {pointer} and {lower}"
        return f"no checkpoint is known to be good: write the name of an earlier one into {pointer} and {lower}"

    def check(self) -> None:
        """Raise `CheckpointError` if the last checkpoint has failed. Does not wait."""
        if self._saving is not None and self._saving.done():
            self.finish()

    def finish(self) -> None:
        """Wait until the last checkpoint is whole. Raises `CheckpointError` when it never will be."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result(WRITE_TIMEOUT_S)

    def point_best(self, best: Best) -> None:
        """Make a checkpoint that is there the best. Raises `OSError`."""
        write_whole(self._folder / BEST_FILE, json.dumps(to_json(best), indent=1) + "\n")

    def _complete(
        self, name: str, written: Future[Mapping[str, FileDigest]], saving: Future[Path], best: Best | None
    ) -> None:
        partial, final = self._folder / f"{PARTIAL}{name}", self._folder / name
        try:
            digests = {f"{POLICY_FOLDER}/{file}": digest for file, digest in written.result(WRITE_TIMEOUT_S).items()}
            small = [name for name in (STATE_FILE, MADE_WITH_FILE) if (partial / name).exists()]
            write_manifest(partial, {**digests, **{name: digest_of(partial / name) for name in small}})
            put_in_place(partial, final)
            write_whole(self._folder / LATEST_FILE, name)
            if best is not None:
                self.point_best(best)
            self._prune(name)
            saving.set_result(final)
        except Exception as error:  # whatever it is, the thread that trains waits for it
            failure = self._failure(name, error)
            failure.__cause__ = error
            saving.set_exception(failure)

    def _failure(self, name: str, error: Exception) -> CheckpointError:
        """Clear away what there is of a checkpoint, and return what to say of it."""
        room = self._room_left()
        shutil.rmtree(self._folder / f"{PARTIAL}{name}", ignore_errors=True)
        return CheckpointError(
            f"{self._folder / name} could not be written{room}: {error}; the checkpoint before is intact: free some "
            "space and start the run again"
        )

    def _room_left(self) -> str:
        """Return what is free on the disk, as a part of a sentence; nothing where the disk does not say."""
        try:
            return f" with {shutil.disk_usage(self._folder).free >> 20} MiB free on its disk"
        except OSError:
            return ""

    def _prune(self, newest: str) -> None:
        """Remove checkpoints older than `newest`, except the `keep_last` newest of this history, the best and the
        healthy one."""
        best = read_best(self._folder.parent)
        self._own.add(newest)
        kept = {*sorted(self._own)[-self._keep_last :], best.checkpoint if best else "", self.newest_healthy}
        for name in sorted(path.name for path in self._folder.glob("step-*")):
            if name < newest and name not in kept:
                shutil.rmtree(self._folder / name)
                self._own.discard(name)


def checkpoint_name(step: int) -> str:
    """Return the name of a checkpoint's folder."""
    return f"step-{step:06d}"


def read_best(run_dir: Path) -> Best | None:
    """Return the best checkpoint so far; None before the first evaluation, or where none is kept.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = run_dir / "checkpoints" / BEST_FILE
    if not path.exists():
        return None
    try:
        return from_text(Best, path.read_bytes())
    except UNREADABLE as error:
        raise CheckpointError(f"{path} names no best checkpoint ({error}): remove it") from error


def put_in_place(partial: Path, final: Path) -> None:
    """Rename `partial` to `final`, which may exist: one of both is there at any moment, see `restore_replaced`."""
    replaced = final.with_name(f"{REPLACED}{final.name}")
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)


def restore_replaced(folder: Path) -> None:
    """Give checkpoints back that a kill caught between two renames."""
    for replaced in folder.glob(f"{REPLACED}*"):
        final = folder / replaced.name.removeprefix(REPLACED)
        if final.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(final)


def write_manifest(checkpoint: Path, digests: Mapping[str, FileDigest]) -> None:
    """Write down what every file of the checkpoint must be, and which versions wrote it. Raises `OSError`."""
    missing = sorted(set(files_below(checkpoint)) - set(digests))
    assert not missing, f"nobody vouches for {missing}"
    manifest = Manifest(
        versions={"megatron-p2o": __version__, **{name: version(name) for name in ("megatron-core", "torch")}},
        files=dict(sorted(digests.items())),
    )
    write_whole(checkpoint / MANIFEST_FILE, json.dumps(to_json(manifest), indent=1))


def read_manifest(checkpoint: Path) -> Manifest:
    """Return what `write_manifest` wrote. Raises `OSError`, and `ValueError` when it is damaged."""
    return from_text(Manifest, (checkpoint / MANIFEST_FILE).read_bytes(), skips_unknown=True)


def files_below(folder: Path) -> list[str]:
    """Return the files in a folder and below by relative name."""
    return [
        str((Path(where) / name).relative_to(folder)) for where, _, names in os.walk(folder) for name in sorted(names)
    ]


def damage_of(checkpoint: Path) -> str | None:
    """Return the damage of a checkpoint with the name of the file; None if it is complete."""
    try:
        smallest_first = sorted(read_manifest(checkpoint).files.items(), key=lambda item: item[1].size_bytes)
    except FileNotFoundError:
        return f"it has no {MANIFEST_FILE}: it was never completed"
    except UNREADABLE as error:
        return f"its {MANIFEST_FILE} cannot be read ({error})"
    hashed_bytes = 0
    for name, digest in smallest_first:
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != digest.size_bytes:
            return f"{name} has {path.stat().st_size} bytes where {digest.size_bytes} were written"
        hashed_bytes += digest.size_bytes
        try:
            if hashed_bytes <= HASHED_BYTES and digest_of(path) != digest:
                return f"{name} does not match its sha256"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def undamaged(checkpoint: Path | None) -> Path | None:
    """Return a checkpoint that a user names, if any. Raises `CheckpointError` when it is damaged."""
    damage = damage_of(checkpoint) if checkpoint else None
    if damage is not None:
        raise CheckpointError(f"{checkpoint} is damaged: {damage}")
    return checkpoint


def pointed_name(folder: Path) -> str:
    """Return the name in the file `latest`; "" where there is none. Raises `CheckpointError` when it is unreadable."""
    try:
        return (folder / LATEST_FILE).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""
    except UNREADABLE as error:
        raise CheckpointError(
            f"{folder / LATEST_FILE} must hold the name of a checkpoint and cannot be read ({error}): write the newest "
            "one's into it"
        ) from error


def latest_checkpoint(run_dir: Path) -> Path | None:
    """Return the checkpoint that `latest` names, or the one before it when that is damaged; None before the first.

    Logs a warning that names a damaged one.

    Raises:
        CheckpointError: there are checkpoints and all are damaged.
    """
    folder = run_dir / "checkpoints"
    restore_replaced(folder)
    names = sorted((path.name for path in folder.glob("step-*")), reverse=True)
    newest = pointed_name(folder)
    damaged: list[str] = []
    for name in names:
        if newest and name > newest:  # of a history that was given up, or that no kill let become the latest
            continue
        damage = damage_of(folder / name)
        if damage is None:
            return folder / name
        damaged.append(f"{folder / name} is damaged: {damage}")
        logger.warning("%s; the checkpoint before it is used", damaged[-1])
    if names or newest:
        raise CheckpointError(
            "; ".join(damaged or [f"{folder / LATEST_FILE} names {newest!r}, which is not there"])
            + f": no checkpoint is left to resume from; remove {folder} to begin the run afresh"
        )
    return None
