"""The report's text parts: templates with their lineage and scores, and example answers (Figure 5)."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_p2o.report.charts import number_text
from megatron_p2o.report.examples import Answer, Example, find_examples
from megatron_p2o.report.markup import Child, Html, element, join
from megatron_p2o.report.runs import LibraryTemplate, PublishedLibrary, Run
from megatron_p2o.types import PLAIN


def templates_section(runs: Sequence[Run]) -> Html | None:
    """Return each run's templates as trees of who was reflected from whom; None when no run has any."""
    evolved = [run for run in runs if any(library.templates for library in run.libraries)]
    if not evolved:
        return None
    note = (
        "Each template below the one it was reflected from; words added to the parent are underlined, dropped ones "
        "struck through. Score: mean reward on the development problems."
    )
    return element("section", element("h2", "Templates"), element("p", note), [_run_templates(run) for run in evolved])


def examples_section(runs: Sequence[Run]) -> Html | None:
    """Return problems with their plain and templated answers; None when no rollouts were written."""
    shown = [_run_examples(run, examples) for run in runs_with_examples(runs) if (examples := find_examples(run))]
    if not shown:
        return None
    note = "The same problem asked plainly and through a template (Figure 5 of the paper)."
    return element("section", element("h2", "Examples"), element("p", note), shown)


def _problems(num: int) -> str:
    return "1 problem" if num == 1 else f"{num} problems"


def runs_with_examples(runs: Sequence[Run]) -> list[Run]:
    """Return the first run of each arm that used templates; without any, the first run."""
    templated = [run for run in runs if any(entry.templated_tries for entry in run.ledger)]
    first_of_arm = {run.arm: run for run in reversed(templated)}
    return [run for run in runs if run is first_of_arm.get(run.arm)] or list(runs[:1])


def word_changes(before: str, after: str) -> Html:
    """Return `after` with its changes against `before` marked word by word."""
    old, new = re.findall(r"\s+|[^\s]+", before), re.findall(r"\s+|[^\s]+", after)
    parts: list[Html] = []
    for kind, old_from, old_to, new_from, new_to in difflib.SequenceMatcher(
        None, old, new, autojunk=False
    ).get_opcodes():
        if kind == "equal":
            parts.append(join("".join(new[new_from:new_to])))
            continue
        if old_to > old_from:
            parts.append(element("del", "".join(old[old_from:old_to])))
        if new_to > new_from:
            parts.append(element("ins", "".join(new[new_from:new_to])))
    return join(parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Lineage:
    """One library as a forest. Ids are unique within a version; between versions only the text tells."""

    library: PublishedLibrary
    earlier: Mapping[str, int]
    """Text of every template of an earlier library to the first version that held it."""

    def parent_of(self, template: LibraryTemplate) -> LibraryTemplate | None:
        """Return the parent as far as library and journal know it; None for what the round began with."""
        if template.parent is None or template.parent == template.id:
            return None
        return next((other for other in self.templates() if other.id == template.parent), None)

    def templates(self) -> list[LibraryTemplate]:
        """Return the published templates and their known ancestors."""
        return [*self.library.templates, *self.library.ancestors]

    def below(self, parent: LibraryTemplate | None) -> list[LibraryTemplate]:
        """Return the templates reflected from `parent` (None: the roots), those with the best descendant first."""
        children = [template for template in self.templates() if self.parent_of(template) == parent]
        return sorted(children, key=lambda template: (-self.best_score(template), template.id))

    def best_score(self, template: LibraryTemplate) -> float:
        """Return the best score among a template and what descends from it."""
        return max(template.score or 0.0, *(self.best_score(child) for child in self.below(template)), 0.0)


def _run_templates(run: Run) -> Html:
    libraries = [library for library in run.libraries if library.templates]
    earlier: dict[str, int] = {}
    shown: list[Html] = []
    for library in libraries:
        lineage = _Lineage(library=library, earlier=dict(earlier))
        state = f"Library version {library.version}: {len(library.templates)} templates"
        trees = element("ul", [_tree(root, lineage) for root in lineage.below(None)], class_="lineage")
        shown.append(element("details", element("summary", state), trees, open=library is libraries[-1]))
        for template in library.templates:
            earlier.setdefault(template.text, library.version)
    return element("div", element("h3", run.name), shown[::-1])


def _tree(template: LibraryTemplate, lineage: _Lineage) -> Html:
    subtrees = [_tree(child, lineage) for child in lineage.below(template)]
    return element("li", _template(template, lineage), element("ul", subtrees) if subtrees else None)


def _template(template: LibraryTemplate, lineage: _Lineage) -> Html:
    parent = lineage.parent_of(template)
    text: Child = word_changes(parent.text, template.text) if parent and parent.text else template.text
    fill = element("span", class_="fill", style=f"width:{100 * min(1.0, max(0.0, template.score or 0.0)):.1f}%")
    return element(
        "div",
        element(
            "p", element("b", f"Template {template.id}"), " · ", " · ".join(_facts(template, lineage)), class_="facts"
        ),
        element("div", fill, class_="bar", aria_hidden="true") if template.score is not None else None,
        element("pre", text) if template.text else element("p", "Asks plainly.", class_="empty"),
        class_="template" if template.score is not None else "template unpublished",
    )


def _facts(template: LibraryTemplate, lineage: _Lineage) -> Iterator[str]:
    if template.score is None:
        yield "an ancestor, not published"
    else:
        yield f"score {number_text(template.score, 'share')} at weight version {template.weight_version}"
    num_problems = lineage.library.num_problems.get(template.id, 0)
    if num_problems:
        yield f"assigned to {_problems(num_problems)}"
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


def _run_examples(run: Run, examples: Sequence[Example]) -> Html:
    return element("div", element("h3", run.name), [_example(example) for example in examples])


def _example(example: Example) -> Html:
    mark = element("span", "internalised", class_="mark") if example.is_internalised else None
    level = f" · {example.level}" if example.level else ""
    return element(
        "article",
        element("h4", f"Problem {example.problem_id}{level} ", mark),
        element("pre", example.question),
        element("p", "Gold answer: ", element("code", example.gold)),
        element("div", [_answer(answer) for answer in example.answers], class_="answers"),
        class_="example",
    )


def _answer(answer: Answer) -> Html:
    kind, verdict = ("good", "correct") if answer.is_correct else ("bad", "not correct")
    return element(
        "div",
        element("h5", answer.label, " ", element("span", verdict, class_=f"mark {kind}")),
        element("p", f"{answer.num_tokens} tokens"),
        element("pre", answer.template, class_="instruction") if answer.template else None,
        element("pre", answer.text),
        class_="answer",
    )
