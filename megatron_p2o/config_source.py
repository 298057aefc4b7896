"""Reads YAML files and `--set` overrides into a flat table of settings that remembers where each was written."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import yaml

from megatron_p2o.config import Config

NamePath = tuple[str, ...]
"""A dotted name in parts: ("optimizer", "lr")."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfigProblem:
    """One thing wrong with the settings."""

    name: str
    """Dotted name of the setting; "" when the file as a whole is wrong."""
    where: str
    """`file:line`, or `--set`; "" for what was found outside the settings."""
    sentence: str
    """Name, value, rule and remedy."""

    def __str__(self) -> str:
        return f"{self.where}: {self.sentence}" if self.where else self.sentence


class ConfigError(ValueError):
    """The settings cannot be used; `problems` holds everything that is wrong with them."""

    def __init__(self, problems: Sequence[ConfigProblem | str]) -> None:
        located = [
            problem if isinstance(problem, ConfigProblem) else ConfigProblem(name="", where="", sentence=problem)
            for problem in problems
        ]
        self.problems = tuple(sorted(located, key=_place))
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n  ".join([f"{count} in the settings:", *map(str, self.problems)]))


def _place(problem: ConfigProblem) -> tuple[str, int]:
    """Return the key that lists problems by file and line."""
    source, _, line = problem.where.rpartition(":")
    return (source, int(line)) if line.isdigit() else (problem.where, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A value as it was written, and where."""

    value: object
    """What YAML made of it."""
    text: str
    """How it is quoted in messages."""
    where: str


Settings = dict[NamePath, Setting]


def read_with_bases(path: Path, problems: list[ConfigProblem]) -> Settings:
    """Return the settings of a file over those of its bases, nearest first; add what is wrong to `problems`.

    Raises:
        ConfigError: a file cannot be read as a mapping at all.
    """
    chain: list[Settings] = []
    visited: list[Path] = []
    next_path: Path | None = path
    while next_path is not None:
        visited.append(next_path.resolve())
        settings = _read_file(next_path, problems)
        chain.append(settings)
        base = settings.pop(("base",), None)
        if base is None:
            break
        if not isinstance(base.value, str):
            raise ConfigError([problem(base.where, "base", base.text, "must be the path of a settings file")])
        next_path = next_path.parent / base.value
        if next_path.resolve() in visited:
            rule = "leads back to a file that inherits from it: remove one of the two"
            raise ConfigError([problem(base.where, "base", base.text, rule)])
        if not next_path.is_file():
            rule = f"must be an existing settings file: there is no {next_path}"
            raise ConfigError([problem(base.where, "base", base.text, rule)])
    merged: Settings = {}
    for settings in reversed(chain):
        merged |= settings
    return merged


def _read_file(path: Path, problems: list[ConfigProblem]) -> Settings:
    def fail(sentence: str, line: int | None = None) -> ConfigError:
        where = str(path) if line is None else f"{path}:{line}"
        return ConfigError([ConfigProblem(name="", where=where, sentence=sentence)])

    try:
        raw = path.read_bytes()
    except OSError as error:
        raise fail(f"the file cannot be read ({error.strerror}): check the path and its permissions") from error
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise fail("the file must be UTF-8: convert it", raw.count(b"\n", 0, error.start) + 1) from error
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        raise fail(f"YAML syntax: {error.problem or error}", line) from error
    except yaml.YAMLError as error:
        raise fail(f"YAML syntax: {error}") from error
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise fail("the file must be a mapping of sections: write `run:`, `model:`, ...", root.start_mark.line + 1)
    problems += _repeated_keys(root, str(path))
    return dict(_flatten(_Reader(loader=loader, source=str(path), problems=problems), root, Config, ()))


def read_overrides(overrides: Sequence[str], problems: list[ConfigProblem]) -> Settings:
    """Return the settings of "name=value" strings, values in YAML."""
    settings: Settings = {}
    for override in overrides:
        dotted, equals, text = override.partition("=")
        name = _override_path(dotted.strip())
        if not equals:
            sentence = f"{override} must have the form name=value"
            problems.append(ConfigProblem(name=dotted, where="--set", sentence=sentence))
            continue
        try:
            loader = yaml.SafeLoader(text)
            node = loader.get_single_node() or yaml.ScalarNode("tag:yaml.org,2002:null", "")
        except yaml.YAMLError as error:
            problems.append(problem("--set", dotted, text, f"must be a YAML value ({error}): quote it"))
            continue
        reader = _Reader(loader=loader, source=None, problems=problems)
        settings.update(_flatten(reader, node, annotation_at(name), name))
    return settings


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reader:
    """What turns nodes of one document into settings."""

    loader: yaml.SafeLoader
    source: str | None
    """The file; None for `--set`."""
    problems: list[ConfigProblem]

    def where(self, node: yaml.Node) -> str:
        return "--set" if self.source is None else f"{self.source}:{node.start_mark.line + 1}"


def _flatten(
    reader: _Reader, node: yaml.Node, annotation: object, name: NamePath
) -> Iterator[tuple[NamePath, Setting]]:
    """Yield the leaves under `node`, going down only where the tree of settings does."""
    if is_section(annotation) or is_mapping(annotation):
        if isinstance(node, yaml.MappingNode):
            for key_node, value_node in node.value:
                key = _key_text(key_node)
                yield from _flatten(reader, value_node, child_annotation(annotation, key), (*name, key))
            return
        if node.tag == "tag:yaml.org,2002:null":
            return
    text = _quote(node)
    try:
        value = reader.loader.construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError) as error:
        reason = error.problem if isinstance(error, yaml.MarkedYAMLError) else error
        rule = f"cannot be read ({reason}): quote it"
        reader.problems.append(problem(reader.where(node), ".".join(name), text, rule))
        return
    yield name, Setting(value=value, text=text, where=reader.where(node))


def _repeated_keys(root: yaml.MappingNode, source: str) -> Iterator[ConfigProblem]:
    waiting: list[tuple[NamePath, yaml.MappingNode]] = [((), root)]
    visited: set[int] = set()
    while waiting:
        name, node = waiting.pop()
        if id(node) in visited:
            continue
        visited.add(id(node))
        first_lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = _key_text(key_node), key_node.start_mark.line + 1
            if key in first_lines:
                dotted = ".".join((*name, key))
                sentence = f"{dotted} is set twice (first on line {first_lines[key]}): keep one"
                yield ConfigProblem(name=dotted, where=f"{source}:{line}", sentence=sentence)
            first_lines.setdefault(key, line)
            if isinstance(value_node, yaml.MappingNode):
                waiting.append(((*name, key), value_node))


def problem(where: str, name: str, text: str, rule: str) -> ConfigProblem:
    """Return the problem that the setting `name`, written as `text`, breaks `rule` (which ends with the remedy)."""
    return ConfigProblem(name=name, where=where, sentence=f"{name}={text} {rule}")


def _override_path(dotted: str) -> NamePath:
    """Split at the dots; below a mapping field the rest is one key, dots included."""
    parts = tuple(dotted.split("."))
    for depth in range(1, len(parts)):
        if is_mapping(annotation_at(parts[:depth])):
            return (*parts[:depth], ".".join(parts[depth:]))
    return parts


def annotation_at(name: NamePath) -> object:
    """Return the type of a setting, None when there is no such setting."""
    annotation: object = Config
    for part in name:
        annotation = child_annotation(annotation, part)
    return annotation


def child_annotation(annotation: object, key: str) -> object:
    """Return the type of `key` in a section or mapping, None when it has no such key."""
    if is_mapping(annotation):
        return get_args(annotation)[1]
    return get_type_hints(annotation).get(key) if is_section(annotation) else None


def is_section(annotation: object) -> bool:
    """Whether the type is a dataclass of the tree."""
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)


def is_mapping(annotation: object) -> bool:
    """Whether the type is a Mapping with free keys."""
    return get_origin(annotation) is Mapping


def _key_text(node: yaml.Node) -> str:
    """Return a key as written, so that `on:` is not read as a boolean."""
    return str(node.value) if isinstance(node, yaml.ScalarNode) else _quote(node)


def _quote(node: yaml.Node, limit: int = 80) -> str:
    """Return how messages show a value."""
    if isinstance(node, yaml.ScalarNode):
        text = str(node.value)
        return text if len(text) <= limit else text[:limit] + "..."
    return "(a mapping)" if isinstance(node, yaml.MappingNode) else "(a list)"
