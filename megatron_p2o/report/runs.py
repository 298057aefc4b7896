"""A run as figures and tables are made of it. Every part may be missing, and the run may still be writing."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_p2o.config.tree import RunConfig
from megatron_p2o.config.yaml_reader import load_yaml
from megatron_p2o.evolve.record.library import LibraryFile, shifted_id
from megatron_p2o.metrics.jsonl import JsonObject, read_records
from megatron_p2o.metrics.read import MetricLine, read_object
from megatron_p2o.records import from_json
from megatron_p2o.report.lineage import RoundLineage, ancestors
from megatron_p2o.rl.hard_samples import LedgerEntry
from megatron_p2o.types import Template

Points = Sequence[tuple[float, float]]
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
    task: str = ""
    """Task it was evolved on; "" in a run with a single one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownLibrary:
    """One `templates/library-<version>.json`."""

    version: int
    templates: Sequence[ShownTemplate]
    ancestors: Sequence[ShownTemplate]
    """Ancestors of the templates, as far as the round's journal has them."""
    num_problems: Mapping[int, int]
    """Template id to the number of problems it is assigned to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Outcome:
    accuracy: float
    mean_reward: float | None = None
    has_partial_rewards: bool = False
    by_source: Mapping[str, float] | None = None
    interval: Mapping[str, float] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Results:
    """What of `results.json` must be of its type to be shown."""

    arm: str | None = None
    seed: int | None = None
    evaluation: Mapping[str, _Outcome] | None = None
    templated_evaluation: Mapping[str, _Outcome] | None = None
    num_rollouts_train: int | None = None
    num_rollouts_evolution: int | None = None
    pass_at_n_plain: float | None = None
    wall_s: float = 0
    compute: Mapping[str, float] | None = None
    compute_redone: Mapping[str, float] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownRound:
    """What is shown of a round in `evolution/rounds.jsonl`: see `RoundStats` for its fields."""

    epoch: int = 0
    task: str = ""
    ended_by: str = ""
    num_hard: int = 0
    num_dev: int = 0
    num_feedback: int = 0
    num_rollouts: int = 0
    num_candidates: int = 0
    num_templates: int = 0
    outcomes: Mapping[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run directory."""

    directory: Path
    arm: str
    """What is compared: runs of one arm differ by seed. As the run recorded it, else the folder's name."""
    seed: int | None
    """Seed of the run; None if it recorded none."""
    written: Sequence[MetricLine]
    """Lines of metrics.jsonl as they were written; several may speak of one step."""
    lines: Sequence[MetricLine]
    """The same, merged by step."""
    libraries: Sequence[ShownLibrary]
    """Oldest first; empty for a run without evolution."""
    ledger: Sequence[LedgerEntry]
    rounds: Sequence[ShownRound]
    """Rounds of evolution: why each ended, and its proposals by outcome."""
    results: JsonObject | None
    """`results.json`, which is written at the end; None before it, after an early end, or when it is damaged."""
    is_results_damaged: bool
    rollouts_of: Callable[[int, str], Sequence[JsonObject]]
    """Rollouts of a step and a problem; none where they were not written."""

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


def read_rounds(path: Path) -> list[ShownRound]:
    """Return the rounds in `rounds.jsonl`, without lines that hold none."""
    return list(read_records(path, lambda line: from_json(ShownRound, line, skips_unknown=True)))


def read_results(directory: Path) -> JsonObject | None:
    """Return a run's `results.json`; None before it is written.

    Raises:
        ValueError: it is damaged; the message names the file.
    """
    path = directory / "results.json"
    results = read_object(path)
    try:
        from_json(_Results, results or {}, skips_unknown=True)
    except ValueError as error:
        raise ValueError(f"{path} holds no results of a run ({error}): restore it") from error
    return results


def arm_and_seed(directory: Path, results: JsonObject | None) -> tuple[str, int | None]:
    """Return what results.json says, before the end what config.yaml does.

    Raises:
        ValueError: config.yaml is damaged.
    """
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


def shown_library(stored: LibraryFile, rounds: Sequence[RoundLineage]) -> ShownLibrary:
    """Return a library with the ancestors of its templates, from the rounds that have published libraries."""
    by_round = {(found.version, found.task): found for found in rounds}
    templates = [_template(template) for template in stored.templates]
    assigned = Counter(template_id for ids in stored.assignments.values() for template_id in set(ids))
    return ShownLibrary(
        version=stored.version,
        templates=templates,
        ancestors=[
            ancestor
            for task in dict.fromkeys(template.task for template in templates)
            if (stored.version, task) in by_round
            for ancestor in _ancestors(
                [template for template in templates if template.task == task],
                by_round[stored.version, task],
                stored.first_ids.get(task, 0),
            )
        ],
        num_problems=dict(assigned),
    )


def _ancestors(templates: Sequence[ShownTemplate], round_: RoundLineage, first_id: int) -> list[ShownTemplate]:
    """Return the unpublished ancestors of templates of one task, whose ids in the library begin at `first_id`."""
    published = [template.id - first_id for template in templates]
    found = {older.id: older for candidate_id in published for older in ancestors(round_, candidate_id)}
    return [
        ShownTemplate(
            id=shifted_id(older.id, first_id),
            text=older.text,
            parent=shifted_id(older.parent, first_id),
            task=round_.task,
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
        task=template.task,
    )
