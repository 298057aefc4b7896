"""What a run keeps on disk besides its weights, and how a checkpoint is made whole or not at all.

runs/<name>/config.yaml          resolved settings
runs/<name>/hard_samples.jsonl   ledger, one line per group
runs/<name>/checkpoints/step-000030/{policy/, run_state.json}
runs/<name>/checkpoints/latest   name of the newest whole checkpoint, written last
runs/<name>/stop                 touch it: the run saves and ends after the current step
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_p2o.files import write_whole
from megatron_p2o.interfaces import Policy
from megatron_p2o.rl.hard_samples import HardSampleLedger, LedgerEntry

POLICY_FOLDER = "policy"
STATE_FILE = "run_state.json"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used, with its path and what is wrong with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """The part of `algorithm.TrainState` that is written, by identity rather than by value."""

    step: int
    epoch: int
    batch: int
    hard_problem_ids: tuple[str, ...]
    library_version: int
    num_ledger_entries: int
    """Lines of the ledger that belong to this state; later ones are of steps that will be run again."""
    num_rollouts_train: int = 0
    num_rollouts_evolution: int = 0
    best_template: str = ""
    """Text of the best template of the last library that had any; "" before."""
    wall_s: float = 0.0
    """Time spent training so far, over all restarts."""
    round_epoch: int = -1
    """After which the round that ran beside training began; -1 when none ran."""
    round_problem_ids: tuple[str, ...] = ()
    """The hard problems it worked on."""


class LedgerFile:
    """The hard-sample ledger on disk: appended to after each step."""

    def __init__(self, path: Path, num_entries: int) -> None:
        """Open `path` and keep its first `num_entries` lines.

        Raises:
            CheckpointError: the file holds fewer entries than the checkpoint says.
        """
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        kept = lines[:num_entries]
        if len(kept) < num_entries:
            raise CheckpointError(f"{path} holds {len(lines)} ledger entries where the checkpoint counts {num_entries}")
        write_whole(path, "".join(kept))
        self.ledger = HardSampleLedger([LedgerEntry(**json.loads(line)) for line in kept])
        self._file = path.open("a", encoding="utf-8")

    def append(self, entries: Sequence[LedgerEntry]) -> None:
        """Record `entries` in memory and on disk."""
        for entry in entries:
            self.ledger.record(entry)
            self._file.write(json.dumps(asdict(entry)) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def save_checkpoint(run_dir: Path, state: RunState, policy: Policy, keep_last: int) -> Path:
    """Write a checkpoint under a temporary name, rename it, then point `latest` at it. Call on rank 0.

    Raises:
        CheckpointError: it could not be written (disk full); the previous checkpoint stays the latest.
    """
    folder = run_dir / "checkpoints"
    final = folder / f"step-{state.step:06d}"
    partial = folder / f".partial-step-{state.step:06d}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        (partial / POLICY_FOLDER).mkdir(parents=True)
        policy.save(partial / POLICY_FOLDER)
        write_whole(partial / STATE_FILE, json.dumps(asdict(state), indent=1))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        write_whole(folder / "latest", final.name)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{final} could not be written: {error}") from error
    for old in sorted(folder.glob("step-*"))[:-keep_last]:
        shutil.rmtree(old)
    return final


def latest_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest whole checkpoint of a run, or None when it has none."""
    pointer = run_dir / "checkpoints" / "latest"
    if not pointer.exists():
        return None
    checkpoint = pointer.parent / pointer.read_text(encoding="utf-8").strip()
    if not (checkpoint / STATE_FILE).exists():
        raise CheckpointError(f"{pointer} names {checkpoint.name}, which is missing or incomplete: point it elsewhere")
    return checkpoint


def read_state(checkpoint: Path) -> RunState:
    """Return the state a checkpoint holds.

    Raises:
        CheckpointError: not a checkpoint, or its state cannot be read.
    """
    path = checkpoint / STATE_FILE
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        return RunState(**{**fields, **lists})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no readable run state: {error}") from error


class StopRequest:
    """Whether the run should save and end after the current step: someone has touched its stop file."""

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / "stop"

    def is_made(self) -> bool:
        return self._file.exists()

    def clear(self) -> None:
        """Remove the stop file, so that the next start of the run trains."""
        self._file.unlink(missing_ok=True)
