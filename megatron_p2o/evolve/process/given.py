"""Templates from a file in place of a search: what training through templates is worth without evolution."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import msgspec

from megatron_p2o.config.tree import Config
from megatron_p2o.evolve.process.by_task import problems_by_task
from megatron_p2o.evolve.record.library import PublishedLibrary
from megatron_p2o.evolve.reflection.guards import refusal_of
from megatron_p2o.evolve.reflection.leaks import leaked_answer
from megatron_p2o.evolve.search.publish import assign
from megatron_p2o.interfaces import TemplateLibrary
from megatron_p2o.terminal import listed
from megatron_p2o.types import Problem, RunningRound, Template

MAX_TASKS_NAMED = 8
"""Tasks that an error lists."""


class GivenTemplates:
    """A `PromptEvolution` (see `megatron_p2o.interfaces`) whose rounds draw from the templates of a file."""

    def __init__(self, config: Config, path: Path) -> None:
        """Raises `ValueError` or `OSError` as `read_templates`."""
        self._config = config
        self._templates = read_templates(path, config.evolution.max_template_tokens, list(config.data.train))

    @property
    def running(self) -> RunningRound | None:
        return None

    def evolve(self, hard: Sequence[Problem], library: TemplateLibrary, epoch: int) -> PublishedLibrary:
        """Return a library that gives each hard problem templates of its task, each as likely as the others."""
        rng = random.Random(f"{self._config.run.seed}/{epoch}/given templates")
        assignments: dict[str, tuple[Template, ...]] = {}
        for task, problems in problems_by_task(hard, list(self._config.data.train)).items():
            templates = [template for template in self._templates if _serves(template, task)]
            assignments |= assign(
                list(dict.fromkeys(problem.id for problem in problems)),
                templates,
                {template.id: frozenset[str]() for template in templates},
                self._config.rollout.group_size,
                self._config.assignment,
                rng,
                guard_leaks=False,  # the file has been compared with the answers of all problems
            )
        return PublishedLibrary(version=library.version + 1, templates=self._templates, assignments=assignments)

    def newest(self, library: TemplateLibrary) -> TemplateLibrary:
        """Return `library`: nothing runs beside training."""
        return library


def _serves(template: Template, task: str) -> bool:
    return template.task in ("", task)


def read_templates(path: Path, max_template_tokens: int, tasks: Sequence[str]) -> tuple[Template, ...]:
    """Return the templates of a file: one a line, where blank lines and those with # are none; or a JSON list of texts;
    or a JSON object with such a list for each of `tasks`, those of the run.

    Raises:
        ValueError: there is none, or one that cannot be used; the message names it.
        OSError: the file cannot be read.
    """
    where = f"evolution.templates_file={path}"
    texts = _texts(path, where)
    unknown = {task for task, _ in texts} - {"", *tasks}
    if unknown:
        raise ValueError(
            f"{where} has templates of {listed(sorted(unknown), MAX_TASKS_NAMED)}, but data.train has "
            f"{listed(tasks, MAX_TASKS_NAMED)}"
        )
    for number, (task, text) in enumerate(texts, start=1):
        is_duplicate = (task, text) in texts[: number - 1]
        refusal = refusal_of(
            text, parent_text="", max_template_tokens=max_template_tokens, is_duplicate=is_duplicate, answers=()
        )
        if refusal:
            raise ValueError(f"{where}: template {number} cannot be used ({refusal}): {text:.60}")
    if not texts:
        raise ValueError(f"{where} holds no template: write one per line, or a JSON list of texts")
    own = {task: task if len(tasks) > 1 else "" for task in ("", *tasks)}
    return tuple(
        Template(id=number, text=text, parent=None, task=own[task])
        for number, (task, text) in enumerate(texts, start=1)
    )


def check_templates(path: Path, max_template_tokens: int, problems: Sequence[Problem], tasks: Sequence[str]) -> None:
    """Raise `ValueError` for a template that tells the gold answer of one of `problems`, naming both; and as
    `read_templates`."""
    for template in read_templates(path, max_template_tokens, tasks):
        told = leaked_answer(template.text, [each.answer for each in problems if each.answer is not None])
        if told is not None:
            problem = next(each for each in problems if each.answer == told)
            raise ValueError(
                f"evolution.templates_file={path}: template {template.id} holds {told!r}, the gold answer of problem "
                f"{problem.id}: take it out. {template.text:.60}"
            )


def _texts(path: Path, where: str) -> list[tuple[str, str]]:
    """Return task, "" for all, and text of each template."""
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} must be a file of UTF-8 text: convert it") from error
    if path.suffix != ".json":
        lines = (line.strip() for line in content.splitlines())
        return [("", line) for line in lines if line and not line.startswith("#")]
    try:
        given = json.loads(content)
        by_task = msgspec.convert(given if isinstance(given, dict) else {"": given}, dict[str, list[str]])
    except (ValueError, RecursionError) as error:  # msgspec's error is a ValueError, too
        raise ValueError(f"{where} must hold a JSON list of texts, or one for each task: {error}") from error
    return [(task, text.strip()) for task, texts in by_task.items() for text in texts]
