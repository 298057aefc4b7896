"""A run folder as it is looked at: read again only where it has grown. Nothing is ever written into it."""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from megatron_p2o.evolve.record.library import LibraryFile
from megatron_p2o.metrics.jsonl import JsonObject
from megatron_p2o.metrics.read import MetricLine, MetricLines
from megatron_p2o.report.runs import Run, ShownLibrary, arm_and_seed, read_results, read_rounds, shown_library
from megatron_p2o.rl.hard_samples import LedgerEntry, entry_from
from megatron_p2o.view.engines import EngineState, engine_states
from megatron_p2o.view.followed import FileState, FollowedFile, file_state
from megatron_p2o.view.libraries import LibraryFiles
from megatron_p2o.view.rollouts import RolloutIndex
from megatron_p2o.view.rounds import ViewedRound
from megatron_p2o.view.settings import SettingsFile

Content = TypeVar("Content")

MARKS = ("config.yaml", "metrics.jsonl", "results.json")
"""A folder with one of these files is that of a run."""

MAX_DEPTH = 3
"""Folders between `runs/` and a run, itself included: `runs/<experiment>/<group>/<run>`."""


def newest_runs(folder: Path) -> list[Path]:
    """Return the run folders below a folder, the one that was last written to first.

    Raises:
        ValueError: there is none.
    """
    found: dict[Path, int] = {}
    folders = [folder]
    for _ in range(MAX_DEPTH):
        folders = [path for each in folders for path in _subfolders(each)]
        times = {path: _last_written(path) for path in folders}
        found |= {path: time for path, time in times.items() if time is not None}
        folders = [path for path, time in times.items() if time is None]
    if not found:
        raise ValueError(f"there is no run below {folder}/: name its folder, as in p2o view RUN, or p2o train CONFIG")
    return sorted(found, key=lambda path: (-found[path], path))


def _subfolders(folder: Path) -> list[Path]:
    try:
        return [path for path in sorted(folder.iterdir()) if path.is_dir()]
    except OSError:  # none, or not to be read
        return []


def _last_written(folder: Path) -> int | None:
    """Return when a run last wrote, ns since 1970; None when the folder is none of a run."""
    states = [state for mark in MARKS if (state := file_state(folder / mark)) is not None]
    return max((time_ns for _, _, time_ns in states), default=None)


class ViewedRun:
    """One run. Its methods may be called from several threads; each brings up to date what it returns."""

    def __init__(self, directory: Path) -> None:
        """Raises `ValueError` when `directory` is no run folder."""
        self.directory = directory
        if not any((directory / mark).exists() for mark in MARKS):
            raise ValueError(f"{directory} holds none of {', '.join(MARKS)}: name the directory of a run")
        self._lock = threading.Lock()
        self._metrics = MetricLines()
        self._metrics_file = FollowedFile(directory / "metrics.jsonl", self._metrics.clear, self._take_metrics)
        self._ledger: dict[tuple[int, int, str], LedgerEntry] = {}
        self._ledger_file = FollowedFile(directory / "hard_samples.jsonl", self._ledger.clear, self._take_entry)
        self._warnings: list[JsonObject] = []
        self._warnings_file = FollowedFile(directory / "warnings.jsonl", self._warnings.clear, self._take_warning)
        self._index = RolloutIndex(directory / "rollouts")
        self._rounds: dict[Path, ViewedRound] = {}
        self._settings_file = SettingsFile(directory)
        self._library_files = LibraryFiles(directory)
        self._ended_rounds = directory / "evolution" / "rounds.jsonl"

    @property
    def name(self) -> str:
        return self.directory.name

    def lines(self) -> Sequence[MetricLine]:
        """Return the metrics by step."""
        with self._lock:
            self._metrics_file.catch_up()
            return self._metrics.by_step()

    def written(self) -> Sequence[MetricLine]:
        """Return the metrics line by line, in the order they were written."""
        with self._lock:
            self._metrics_file.catch_up()
            return self._metrics.as_written()

    def ledger(self) -> Sequence[LedgerEntry]:
        """Return the ledger's entries in order; of a group that was recorded twice, the later record."""
        with self._lock:
            self._ledger_file.catch_up()
            return list(self._ledger.values())

    def rollouts(self) -> RolloutIndex:
        """Return the index of the rollouts."""
        with self._lock:
            self._index.catch_up()
            return self._index

    def rounds(self) -> Sequence[ViewedRound]:
        """Return the rounds of prompt evolution, oldest first."""
        with self._lock:
            paths = sorted((self.directory / "evolution").glob("journal-*.jsonl"))
            self._rounds = {path: self._rounds.get(path) or ViewedRound(path) for path in paths if _is_round(path)}
            for found in self._rounds.values():
                found.catch_up()
            return list(self._rounds.values())

    def libraries(self) -> Sequence[LibraryFile]:
        """Return the published libraries, oldest first."""
        with self._lock:
            self._library_files.catch_up()
            return self._library_files.libraries()

    def warnings(self) -> Sequence[JsonObject]:
        """Return what the run warned of, oldest first."""
        with self._lock:
            self._warnings_file.catch_up()
            return list(self._warnings)

    def damages(self) -> list[str]:
        """Return a sentence for each file of the run that cannot be read."""
        sentences: list[str] = []
        if not self.directory.is_dir():
            sentences.append(f"{self.directory} is gone")
        for read in (self._results, self._settings):
            try:
                read()
            except ValueError as error:
                sentences.append(str(error))
        with self._lock:
            followed = (self._metrics_file, self._ledger_file, self._warnings_file)
            if num_damaged := sum(file.num_damaged for file in followed):
                sentences.append(f"{num_damaged} damaged lines of metrics, ledger or warnings are left out")
            self._library_files.catch_up()
            sentences += self._library_files.damages()
        return sentences + [found.damage for found in self._rounds.values() if found.damage]

    def engines(self) -> Sequence[EngineState]:
        """Return what each engine last told of itself, by number."""
        return engine_states(self.directory / "engines")

    def results(self) -> JsonObject | None:
        """Return results.json; None before the end, or when it is damaged."""
        return _or_none(self._results)

    def settings(self) -> Mapping[str, object]:
        """Return the resolved settings by dotted name; none when they are missing or damaged."""
        return _or_none(self._settings) or {}

    def arm_and_seed(self) -> tuple[str, int | None]:
        return _or_none(self._identity) or (self.directory.name, None)

    def reported(self) -> Run:
        """Return the run as figures and tables are made of it."""
        arm, seed = self.arm_and_seed()
        results = self.results()
        return Run(
            directory=self.directory,
            arm=arm,
            seed=seed,
            lines=self.lines(),
            written=self._metrics.as_written(),
            libraries=self.shown_libraries(),
            ledger=self.ledger(),
            rounds=read_rounds(self._ended_rounds),
            results=results,
            is_results_damaged=results is None and (self.directory / "results.json").exists(),
            rollouts_of=lambda step, problem_id: self.rollouts().of_step(step, problem_id),
        )

    def shown_libraries(self) -> list[ShownLibrary]:
        """Return the published libraries with the ancestors of their templates, oldest first."""
        lineages = [found.lineage for found in self.rounds() if found.lineage is not None]
        return [shown_library(library, lineages) for library in self.libraries()]

    def report_state(self) -> Sequence[FileState | None]:
        """Return what changes when the report of the run does: the state of the files it is made of."""
        names = ("metrics.jsonl", "hard_samples.jsonl", "results.json", "config.yaml")
        libraries = sorted((self.directory / "templates").glob("*.json"))
        return [
            file_state(path) for path in (*(self.directory / name for name in names), self._ended_rounds, *libraries)
        ]

    def _results(self) -> JsonObject | None:
        return read_results(self.directory)

    def _settings(self) -> Mapping[str, object]:
        return self._settings_file.read()

    def _identity(self) -> tuple[str, int | None]:
        return arm_and_seed(self.directory, self.results())

    def _take_metrics(self, line: bytes) -> None:
        self._metrics.add(json.loads(line))

    def _take_warning(self, line: bytes) -> None:
        self._warnings.append(json.loads(line))

    def _take_entry(self, line: bytes) -> None:
        entry = entry_from(json.loads(line))
        self._ledger[entry.epoch, entry.step, entry.problem_id] = entry


def _is_round(path: Path) -> bool:
    return path.stem.removeprefix("journal-").partition("-")[0].isdecimal()


def _or_none(read: Callable[[], Content]) -> Content | None:
    """Return what `read` does, or None when the file is damaged or gone."""
    try:
        return read()
    except (OSError, ValueError):
        return None
