"""The report's text parts: templates with their lineage and scores, and example answers (Figure 5)."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_p2o.report.charts import number_text
from megatron_p2o.report.examples import ShownProblem, find_examples
from megatron_p2o.report.runs import Points, Run, ShownLibrary, ShownTemplate
from megatron_p2o.types import PLAIN

SHIFT_KEY = re.compile(r"template/(\d+)/shift_per_token")


@dataclass(frozen=True, kw_only=True, slots=True)
class WordSpan:
    """Some words of a template, beside those of its parent."""

    kind: Literal["kept", "added", "dropped"]
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TemplateNode:
    """A template and those that were reflected from it."""

    id: int
    score: float | None
    """Score from 0 to 1; None for a template that was not published."""
    facts: Sequence[str]
    text: Sequence[WordSpan]
    """Empty for the one that asks plainly."""
    children: Sequence["TemplateNode"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LibraryTree:
    """The templates of one library."""

    version: int
    num_templates: int
    """Published ones."""
    roots: Sequence[TemplateNode]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunExamples:
    """Problems of one run with their answers."""

    name: str
    examples: Sequence[ShownProblem]


def shown_problems(runs: Sequence[Run]) -> list[RunExamples]:
    """Return problems with their plain and templated answers; none when no rollouts were written."""
    found = [RunExamples(name=run.name, examples=find_examples(run)) for run in runs_with_examples(runs)]
    return [run for run in found if run.examples]


def _problems(num: int) -> str:
    return "1 problem" if num == 1 else f"{num} problems"


def runs_with_examples(runs: Sequence[Run]) -> list[Run]:
    """Return the first run of each arm that used templates; without any, the first run."""
    templated = [run for run in runs if any(entry.templated_tries for entry in run.ledger)]
    first_of_arm = {run.arm: run for run in reversed(templated)}
    return [run for run in runs if run is first_of_arm.get(run.arm)] or list(runs[:1])


def word_changes(before: str, after: str) -> list[WordSpan]:
    """Return `after` with its changes against `before`, word by word."""
    old, new = re.findall(r"\s+|[^\s]+", before), re.findall(r"\s+|[^\s]+", after)
    changes: list[WordSpan] = []
    for kind, old_from, old_to, new_from, new_to in difflib.SequenceMatcher(
        None, old, new, autojunk=False
    ).get_opcodes():
        if kind == "equal":
            changes.append(WordSpan(kind="kept", text="".join(new[new_from:new_to])))
            continue
        if old_to > old_from:
            changes.append(WordSpan(kind="dropped", text="".join(old[old_from:old_to])))
        if new_to > new_from:
            changes.append(WordSpan(kind="added", text="".join(new[new_from:new_to])))
    return changes


@dataclass(frozen=True, kw_only=True, slots=True)
class _Lineage:
    """One library as a forest. Ids are unique within a version; between versions only the text tells."""

    library: ShownLibrary
    earlier: Mapping[str, int]
    """Text of every template of an earlier library to the first version that held it."""
    shifts: Mapping[int, Points]
    """Template id to (step, nats per token that it added to responses)."""

    by_id: Mapping[int, ShownTemplate]
    """The published templates and their known ancestors."""
    children: Mapping[int | None, Sequence[ShownTemplate]]
    """Id of a template to those reflected from it; None: those the round began with."""

    def parent_of(self, template: ShownTemplate) -> ShownTemplate | None:
        """Return the parent as far as library and journal know it; None for what the round began with."""
        parent = _parent_id(template, self.by_id)
        return None if parent is None else self.by_id[parent]

    def below(self, parent: ShownTemplate | None) -> list[ShownTemplate]:
        """Return the templates reflected from `parent` (None: the roots), those with the best descendant first."""
        children = self.children.get(None if parent is None else parent.id, ())
        return sorted(children, key=lambda template: (-self.best_score(template), template.id))

    def best_score(self, template: ShownTemplate) -> float:
        """Return the best score among a template and what descends from it."""
        return max(template.score or 0.0, *(self.best_score(child) for child in self.below(template)), 0.0)


def _lineage(library: ShownLibrary, earlier: Mapping[str, int], shifts: Mapping[int, Points]) -> _Lineage:
    templates = [*library.templates, *library.ancestors]
    by_id = {template.id: template for template in reversed(templates)}
    children: dict[int | None, list[ShownTemplate]] = {}
    for template in templates:
        children.setdefault(_parent_id(template, by_id), []).append(template)
    return _Lineage(library=library, earlier=earlier, shifts=shifts, by_id=by_id, children=children)


def _parent_id(template: ShownTemplate, by_id: Mapping[int, ShownTemplate]) -> int | None:
    return template.parent if template.parent in by_id and template.parent != template.id else None


def library_trees(run: Run) -> list[LibraryTree]:
    """Return the published templates as trees of who was reflected from whom, the newest library first."""
    earlier: dict[str, int] = {}
    trees: list[LibraryTree] = []
    for library in run.libraries:
        if not library.templates:
            continue
        shifts = template_shifts(run, library.version)
        lineage = _lineage(library, dict(earlier), shifts)
        roots = [_node(root, lineage) for root in lineage.below(None)]
        trees.append(LibraryTree(version=library.version, num_templates=len(library.templates), roots=roots))
        for template in library.templates:
            earlier.setdefault(template.text, library.version)
    return trees[::-1]


def template_shifts(run: Run, version: int) -> dict[int, Points]:
    """Return for each template of a library (step, mean shift in nats per token); see docs/metrics.md."""
    shifts: dict[int, list[tuple[float, float]]] = {}
    for line in run.lines:
        if line.metrics.get("template/library_version") == version:
            for key, number in line.metrics.items():
                if found := SHIFT_KEY.fullmatch(key):
                    shifts.setdefault(int(found[1]), []).append((line.step, number))
    return dict(shifts)


def _node(template: ShownTemplate, lineage: _Lineage) -> TemplateNode:
    parent = lineage.parent_of(template)
    return TemplateNode(
        id=template.id,
        score=None if template.score is None else min(1.0, max(0.0, template.score)),
        facts=list(_facts(template, lineage)),
        text=word_changes(parent.text if parent and parent.text else template.text, template.text),
        children=[_node(child, lineage) for child in lineage.below(template)],
    )


def _facts(template: ShownTemplate, lineage: _Lineage) -> Iterator[str]:
    if template.task:
        yield f"task {template.task}"
    if template.score is None:
        yield "an ancestor, not published"
    else:
        yield f"score {number_text(template.score, 'share')} at weight version {template.weight_version}"
    num_problems = lineage.library.num_problems.get(template.id, 0)
    if num_problems:
        yield f"assigned to {_problems(num_problems)}"
    if shifts := lineage.shifts.get(template.id):
        (first_step, first), (last_step, last) = shifts[0], shifts[-1]
        yield (
            f"added {number_text(first)} nats per token to responses in step {first_step:g}, {number_text(last)} in "
            f"step {last_step:g}"
        )
    if template.num_lineage_problems:
        yield f"has seen {_problems(template.num_lineage_problems)}"
    if template.id == PLAIN.id:
        return
    if template.text in lineage.earlier:
        yield f"carried over from version {lineage.earlier[template.text]}"
    elif template.parent == PLAIN.id:
        yield "reflected from the plain prompt"
    elif template.parent is not None and lineage.parent_of(template) is None:
        yield f"reflected from template {template.parent}, with which the round began"
