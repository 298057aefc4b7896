"""The state of a run on disk besides its weights. `checkpoints` combines the two.

runs/<name>/config.yaml          resolved settings
runs/<name>/hard_samples.jsonl   ledger, one line per group
runs/<name>/warnings.jsonl       what the conducting rank warned of
runs/<name>/run_id               identity of the run for services that show its metrics
runs/<name>/stop                 touch it: the run saves and ends after the current step
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_p2o.files import write_whole
from megatron_p2o.metrics.compute import ComputeAccount
from megatron_p2o.metrics.jsonl import keep_lines, read_records
from megatron_p2o.records import from_text, to_json
from megatron_p2o.rl.hard_samples import HardSampleLedger, LedgerEntry, entry_from

STATE_FILE = "run_state.json"

UNREADABLE = (OSError, ValueError)
"""What reading a file of JSON that is damaged, or is none, ends with."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message has its path and the reason."""


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
    """Text of the best template of the last library that had any; "" before, and in a run with several tasks."""
    best_templates: Mapping[str, str] = field(default_factory=dict[str, str])
    """The same of each task, in a run with several."""
    num_metrics_lines: int = 0
    """Lines of metrics.jsonl that belong to this state."""
    first_round: Mapping[str, float | bool] = field(default_factory=dict[str, float | bool])
    """Numbers of the first round of prompt evolution; empty before."""
    published_accuracy: Mapping[str, float] = field(default_factory=dict[str, float])
    """Accuracy by evaluation set under the first published template; empty before."""
    wall_s: float = 0.0
    """Time spent training so far, over all restarts."""
    compute: ComputeAccount = field(default_factory=ComputeAccount)
    """What was spent so far, less the rounds of evolution, whose journals say it."""
    num_batches: int = 0
    """Batches of the epoch; 0 in checkpoints of before a curriculum could shorten one."""
    round_epoch: int = -1
    """Epoch after which the round beside training started; -1 if none ran."""
    round_problem_ids: tuple[str, ...] = ()
    """The hard problems it worked on."""


class LedgerFile:
    """The hard-sample ledger on disk: appended to after each step."""

    def __init__(self, path: Path, num_entries: int) -> None:
        """Open `path` and keep its first `num_entries` entries; later ones move to `<name>.discarded` beside it.

        A damaged one is named in a warning, stays where it is and counts for nothing: its problem's success rate is
        that of its other tries.

        Raises:
            CheckpointError: the file holds fewer entries than the checkpoint says.
        """
        found = keep_lines(path, num_entries)
        if found < num_entries:
            raise CheckpointError(
                f"{path} holds {found} ledger entries where the checkpoint counts {num_entries}: restore the file, or "
                "write the name of an earlier checkpoint into checkpoints/latest"
            )
        self.ledger = HardSampleLedger(list(read_records(path, entry_from)))
        self.num_entries = num_entries
        """Number of entries in the file, including damaged ones."""
        self._file = path.open("a", encoding="utf-8")

    def append(self, entries: Sequence[LedgerEntry]) -> None:
        """Record `entries` in memory and on disk."""
        for entry in entries:
            self.ledger.record(entry)
            self._file.write(json.dumps(to_json(entry)) + "\n")
            self.num_entries += 1
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def write_state(path: Path, state: RunState) -> None:
    """Write what `read_state` reads. Raises `OSError`."""
    write_whole(path, json.dumps(to_json(state), indent=1))


def read_state(path: Path) -> RunState:
    """Return what `write_state` wrote. Raises `CheckpointError` when it cannot be read."""
    try:
        return from_text(RunState, path.read_bytes())
    except UNREADABLE as error:
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
