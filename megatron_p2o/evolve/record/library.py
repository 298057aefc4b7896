"""The outcome of a round: the templates of the next epoch. An immutable file with version and checksum."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_p2o.files import json_digest, write_whole
from megatron_p2o.records import from_json, to_json
from megatron_p2o.types import PLAIN, Problem, Template


@dataclass(frozen=True, kw_only=True, slots=True)
class LibraryFile:
    """Layout of the JSON file, less its checksum."""

    version: int
    templates: tuple[Template, ...] = ()
    assignments: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    """Problem id to one template id per rollout."""
    first_ids: Mapping[str, int] = field(default_factory=dict[str, int])
    """In a library of several tasks: task to what was added to the candidates' ids of its round, but for 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedLibrary:
    """A `TemplateLibrary` (see `megatron_p2o.interfaces`)."""

    version: int
    templates: tuple[Template, ...] = ()
    """Templates considered for assignment, best first. The next round may start with them."""
    assignments: Mapping[str, tuple[Template, ...]] = field(default_factory=dict[str, tuple[Template, ...]])
    """Problem id to one template per rollout."""
    first_ids: Mapping[str, int] = field(default_factory=dict[str, int])
    """As `LibraryFile.first_ids`."""

    def assigned(self, problem: Problem) -> Sequence[Template]:
        return self.assignments.get(problem.id, ())

    def cleared(self) -> "PublishedLibrary":
        return PublishedLibrary(version=self.version + 1)

    def save(self, run_dir: Path, task: str = "") -> Path:
        """Write the file that `library_path` names, whole or not at all; return its path."""
        content = to_json(
            LibraryFile(
                version=self.version,
                templates=self.templates,
                assignments={
                    problem_id: tuple(template.id for template in templates)
                    for problem_id, templates in self.assignments.items()
                },
                first_ids=self.first_ids,
            ),
            is_sorted=True,
        )
        path = library_path(run_dir, self.version, task)
        write_whole(path, json.dumps({"checksum": json_digest(content, is_compact=True), **content}, indent=1) + "\n")
        return path


EMPTY_LIBRARY = PublishedLibrary(version=0)
"""The library before the first round: no problem has a template."""


def library_path(run_dir: Path, version: int, task: str = "") -> Path:
    """Return where version `version` of a run's library lies, or the part of it that the round of a task has made."""
    if task:
        return run_dir / "evolution" / f"library-{version}-{task}.json"
    return run_dir / "templates" / f"library-{version}.json"


def merged(parts: Mapping[str, PublishedLibrary], num_candidates: Mapping[str, int], version: int) -> PublishedLibrary:
    """Return the library of several tasks, best templates first.

    Args:
        parts: the library of each task's round.
        num_candidates: of each round: ids of its templates are below.
    """
    first_ids: dict[str, int] = {}
    templates: list[Template] = []
    assignments: dict[str, tuple[Template, ...]] = {}
    next_id = 0
    for task, part in parts.items():
        first_ids[task] = next_id
        numbered = {template: _numbered(template, next_id) for template in part.templates} | {PLAIN: PLAIN}
        templates += [numbered[template] for template in part.templates]
        assignments |= {key: tuple(numbered[each] for each in given) for key, given in part.assignments.items()}
        next_id += num_candidates[task]
    return PublishedLibrary(
        version=version,
        templates=tuple(sorted(templates, key=lambda template: (-template.score, template.id))),
        assignments=assignments,
        first_ids=first_ids,
    )


def _numbered(template: Template, first_id: int) -> Template:
    """Return a template with the ids that it and its parent have in a library of several tasks."""
    parent = template.parent
    return replace(
        template,
        id=shifted_id(template.id, first_id),
        parent=None if parent is None else shifted_id(parent, first_id),
    )


def shifted_id(candidate_id: int, first_id: int) -> int:
    """Return a candidate's id in a library of several tasks; that of the empty template is the same for all."""
    return PLAIN.id if candidate_id == PLAIN.id else candidate_id + first_id


WAYS_OUT = (
    "restore it, or move it away: a resumed run then asks without templates until the next round of prompt evolution"
)
"""What to do with a damaged library, for messages."""


def load_library(path: Path) -> PublishedLibrary:
    """Read what `PublishedLibrary.save` wrote. Raise `ValueError` when it was altered, `OSError` when it is missing."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        expected = content.pop("checksum")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a template library ({error!r}): {WAYS_OUT}") from error
    if json_digest(content, is_compact=True) != expected:
        raise ValueError(f"{path} does not match its checksum, it was altered or damaged: {WAYS_OUT}")
    stored = from_json(LibraryFile, content)
    by_id = {template.id: template for template in stored.templates} | {PLAIN.id: PLAIN}
    return PublishedLibrary(
        version=stored.version,
        templates=stored.templates,
        first_ids=stored.first_ids,
        assignments={key: _looked_up(ids, by_id, path) for key, ids in stored.assignments.items()},
    )


def _looked_up(ids: Iterable[int], by_id: Mapping[int, Template], path: Path) -> tuple[Template, ...]:
    try:
        return tuple(by_id[template_id] for template_id in ids)
    except KeyError as error:
        raise ValueError(f"{path} assigns template {error}, which it does not hold") from error
