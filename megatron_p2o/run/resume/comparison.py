"""Lists what differs between a checkpoint's inputs and those of the run that resumes from it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_p2o.run_folder.made_with import MadeWith
from megatron_p2o.run_folder.resume_effects import (
    MAPPINGS,
    Effect,
    effect_of,
    effect_of_file,
)
from megatron_p2o.terminal import listed

MAX_PROBLEMS_NAMED = 5
"""Problems that a sentence names."""

MAX_VALUE_CHARS = 60
"""Longest value that a sentence quotes."""

CONTENT = "content "
"""Begins how a file's content is quoted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One thing that is not what the checkpoint was made with."""

    name: str
    """Dotted name of a setting, or what a file is to the model."""
    old: Any
    new: Any
    when: str
    """When the change takes effect."""

    def __str__(self) -> str:
        return f"{self.name}: {_quoted(self.old)} -> {_quoted(self.new)}: {self.when}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """The difference of one setting, and its class."""

    name: str
    old: Any
    new: Any
    effect: Effect

    def __str__(self) -> str:
        return f"{self.name}: {_quoted(self.old)} -> {_quoted(self.new)}"


def setting_differences(old: MadeWith, new: MadeWith) -> Iterator[Difference]:
    """Yield the settings of other values."""
    for name in differing(old.settings, new.settings):
        pair = (old.settings.get(name), new.settings.get(name))
        yield Difference(name=name, old=pair[0], new=pair[1], effect=effect_of(name))


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the settings that differ. One that only another version knows is none, a free key is."""
    names = [
        name
        for name in dict.fromkeys((*old, *new))
        if (name in old and name in new) or name.startswith(tuple(f"{mapping}." for mapping in MAPPINGS))
    ]
    return [name for name in names if old.get(name) != new.get(name)]


def file_differences(old: MadeWith, new: MadeWith) -> Iterator[Difference]:
    """Yield files of other content. `data.train` counts by its problems."""
    for name in sorted(old.files.keys() & new.files.keys() - {*training_files(old, new)}):
        pair = (old.files[name], new.files[name])
        if pair[0] != pair[1]:
            before, after = (f"{CONTENT}{digest[:8]}" for digest in pair)
            yield Difference(name=name, old=before, new=after, effect=effect_of_file(name))


def architecture_differences(old: MadeWith, new: MadeWith) -> Iterator[Difference]:
    """Yield the sizes of the model that are not those of the checkpoint's: each is refused."""
    for name in dict.fromkeys((*old.architecture, *new.architecture)):
        pair = (old.architecture.get(name), new.architecture.get(name))
        if pair[0] != pair[1]:
            yield Difference(name=f"{name} of model.path", old=pair[0], new=pair[1], effect="refused")


def training_files(old: MadeWith, new: MadeWith) -> list[str]:
    """Return the names by which either knows the files of `data.train`."""
    return [name for name in dict.fromkeys((*old.files, *new.files)) if name.startswith("data.train")]


def moved_problems(old: MadeWith, new: MadeWith) -> list[str]:
    """Return messages on a changed list of problems; empty if the ids and their order are the same."""
    ids = list(old.problems), list(new.problems)
    if ids[0] == ids[1]:
        return []
    added = [problem_id for problem_id in ids[1] if problem_id not in old.problems]
    removed = [problem_id for problem_id in ids[0] if problem_id not in new.problems]
    kinds = [
        f"{len(found)} {kind} ({listed(found, MAX_PROBLEMS_NAMED)})"
        for found, kind in ((added, "added"), (removed, "gone"))
        if found
    ]
    return [f"problems of data.train: {', '.join(kinds) or 'in another order'}"]


def problem_changes(old: MadeWith, new: MadeWith, when: str) -> list[Change]:
    """Return the changes of problems: added or removed ids, and questions that changed under the same id."""
    edited = [name for name in old.problems if new.problems.get(name, old.problems[name]) != old.problems[name]]
    changes = [
        Change(name=text, old=len(old.problems), new=len(new.problems), when=when) for text in moved_problems(old, new)
    ]
    if edited:
        text = f"question or answer of {len(edited)} problems of data.train ({listed(edited, MAX_PROBLEMS_NAMED)})"
        changes.append(Change(name=text, old="before", new="now", when="the next time they are asked"))
    return changes


def _quoted(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= MAX_VALUE_CHARS else text[:MAX_VALUE_CHARS] + "..."
