"""A run directory as the report reads it: every part may be missing, and the run may still be writing."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_p2o.config.tree import RunConfig
from megatron_p2o.config.yaml_reader import load_yaml
from megatron_p2o.evolve.record.library import LibraryFile
from megatron_p2o.files import read_json_object
from megatron_p2o.metrics.jsonl import JsonObject, read_lines, read_records
from megatron_p2o.metrics.read import MetricLine, read_metrics, read_object
from megatron_p2o.records import from_json
from megatron_p2o.report.lineage import RoundLineage, ancestors, read_rounds
from megatron_p2o.rl.hard_samples import LedgerEntry, entry_from
from megatron_p2o.types import Template

Points = list[tuple[float, float]]
"""(x, y), x ascending."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownTemplate:
    """A template of a library's lineage, as the report shows it."""

    id: int
    text: str
    parent: int | None
    score: float | None
    """None: an ancestor that was not published itself."""
    weight_version: int
    num_lineage_problems: int
    """Problems its reflection was shown, its ancestors' included if it was published."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownLibrary:
    """One `templates/library-<version>.json`."""

    version: int
    templates: Sequence[ShownTemplate]
    ancestors: Sequence[ShownTemplate]
    """Of the templates, as far as the round's journal tells them."""
    num_problems: Mapping[int, int]
    """Template id to the number of problems it is assigned to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run directory."""

    directory: Path
    arm: str
    """What is compared: runs of one arm differ by seed. As the run recorded it, else the folder's name."""
    seed: int | None
    """None when the run recorded none."""
    lines: Sequence[MetricLine]
    libraries: Sequence[ShownLibrary]
    """Oldest first; empty for a run without evolution."""
    ledger: Sequence[LedgerEntry]
    rounds: Sequence[JsonObject]
    """Of evolution, `evolution/rounds.jsonl`: why each ended and how its proposals did."""
    results: JsonObject | None
    """`results.json`, which is written at the end; None while the run is in progress or when it was ended early."""

    @property
    def name(self) -> str:
        return self.directory.name

    def points(self, key: str) -> Points:
        """Return (step, number) wherever `key` was written."""
        return [(line.step, line.metrics[key]) for line in self.lines if key in line.metrics]

    def keys(self, prefix: str) -> list[str]:
        """Return the metric keys that begin with `prefix`, sorted."""
        return sorted({key for line in self.lines for key in line.metrics if key.startswith(prefix)})

    def total(self, key: str) -> float:
        """Return the sum of `key` over all steps; 0 when it was never written."""
        return sum(number for _, number in self.points(key))


def read_run(directory: Path) -> Run:
    """Read a run directory.

    Raises:
        ValueError: it is not a run directory, or a file in it is damaged (other than by being written right now).
    """
    if not (directory / "metrics.jsonl").exists() and not (directory / "results.json").exists():
        raise ValueError(f"{directory} holds neither metrics.jsonl nor results.json: name the directory of a run")
    results = read_object(directory / "results.json")
    arm, seed = _arm_and_seed(directory, results)
    return Run(
        directory=directory,
        arm=arm,
        seed=seed,
        lines=read_metrics(directory / "metrics.jsonl"),
        libraries=read_libraries(directory),
        ledger=read_ledger(directory / "hard_samples.jsonl"),
        rounds=list(read_lines(directory / "evolution" / "rounds.jsonl")),
        results=results,
    )


def _arm_and_seed(directory: Path, results: JsonObject | None) -> tuple[str, int | None]:
    """Return what results.json says, before the end what config.yaml does."""
    if results is not None and "arm" in results and "seed" in results:
        return str(results["arm"]), int(results["seed"])
    settings = directory / "config.yaml"
    match _settings_in(settings) if settings.is_file() else None:
        case {"run": {"name": str(name), "seed": int(seed)}}:
            return RunConfig(name=name, seed=seed).arm, seed
        case _:
            return directory.name, None


def _settings_in(path: Path) -> object:
    try:
        return load_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}): restore it") from error


def read_libraries(directory: Path) -> list[ShownLibrary]:
    """Return the published libraries of a run directory, oldest first; empty when the run has none."""
    rounds = {found.version: found for found in read_rounds(directory / "evolution")}
    libraries = [_library_in(path, rounds) for path in sorted((directory / "templates").glob("library-*.json"))]
    return sorted(libraries, key=lambda library: library.version)


def read_ledger(path: Path) -> list[LedgerEntry]:
    """Return the ledger's entries in order; of a group recorded twice, the later record."""
    entries: dict[tuple[int, int, str], LedgerEntry] = {}
    for entry in read_records(path, entry_from):
        entries[entry.epoch, entry.step, entry.problem_id] = entry
    return list(entries.values())


def _library_in(path: Path, rounds: Mapping[int, RoundLineage]) -> ShownLibrary:
    try:
        stored = from_json(LibraryFile, read_json_object(path), skips_unknown=True)
    except ValueError as error:
        raise ValueError(f"{path} is no library of templates ({error}): restore it") from error
    templates = [_template(template) for template in stored.templates]
    assigned = Counter(template_id for ids in stored.assignments.values() for template_id in set(ids))
    return ShownLibrary(
        version=stored.version,
        templates=templates,
        ancestors=_ancestors(templates, rounds[stored.version]) if stored.version in rounds else [],
        num_problems=dict(assigned),
    )


def _ancestors(templates: Sequence[ShownTemplate], round_: RoundLineage) -> list[ShownTemplate]:
    published = {template.id for template in templates}
    found = {older.id: older for template in templates for older in ancestors(round_, template.id)}
    return [
        ShownTemplate(
            id=older.id,
            text=older.text,
            parent=older.parent,
            score=None,
            weight_version=0,
            num_lineage_problems=older.num_problems,
        )
        for older in found.values()
        if older.id not in published
    ]


def _template(template: Template) -> ShownTemplate:
    return ShownTemplate(
        id=template.id,
        text=template.text,
        parent=template.parent,
        score=template.score,
        weight_version=template.weight_version,
        num_lineage_problems=len(template.lineage_problem_ids),
    )
