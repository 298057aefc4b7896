"""Reads YAML files and `--set` overrides into a flat table of settings that remembers where each was written."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_p2o.config.shape import (
    ONLY_TASK,
    child_annotation,
    is_listed,
    is_mapping,
    is_section,
    record_of,
    shorthand_of,
)
from megatron_p2o.config.tree import Config
from megatron_p2o.config.yaml_reader import MAX_BYTES, NULL, SettingsLoader, YamlError, construct, parse_yaml

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
    """The text that messages quote."""
    where: str
    is_clearing: bool = False
    """Whether it is the empty mapping, which takes away what a setting of lower rank put into it."""


Settings = dict[NamePath, Setting]


def over(lower: Settings, upper: Settings) -> Settings:
    """Return `upper`, completed with the values of `lower`."""
    cleared = [name for name, setting in upper.items() if setting.is_clearing]
    kept = {name: setting for name, setting in lower.items() if not any(name[: len(c)] == c for c in cleared)}
    return kept | upper


def read_with_bases(path: Path, problems: list[ConfigProblem]) -> Settings:
    """Return the settings of a file and its bases, the nearest first; add errors to `problems`.

    Raises:
        ConfigError: a file cannot be read as a mapping at all.
    """
    return with_bases(_read_file(path, problems), path, problems)


def with_bases(settings: Settings, path: Path, problems: list[ConfigProblem]) -> Settings:
    """Return settings that stand in the file at `path`, completed with those of the bases that they name."""
    chain: list[Settings] = []
    visited: list[Path] = []
    next_path: Path | None = path
    while next_path is not None:
        visited.append(next_path.resolve())
        if chain:
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
        merged = over(merged, settings)
    return merged


def _read_file(path: Path, problems: list[ConfigProblem]) -> Settings:
    loader, root = read_document(path)
    return {} if root is None else settings_below(loader, root, path, problems)


def settings_below(
    loader: SettingsLoader, root: yaml.MappingNode, path: Path, problems: list[ConfigProblem]
) -> Settings:
    """Return the settings of a mapping that stands in the file at `path`; add errors to `problems`."""
    problems += _key_problems(root, (), str(path))
    return dict(_flatten(_Reader(loader=loader, source=str(path), problems=problems), root, Config, ()))


def read_document(path: Path) -> tuple[SettingsLoader, yaml.MappingNode | None]:
    """Return the mapping that a file holds, None for an empty one, and what constructs its values.

    Raises:
        ConfigError: it cannot be read as a mapping.
    """

    def fail(sentence: str, line: int | None = None) -> ConfigError:
        where = str(path) if line is None else f"{path}:{line}"
        return ConfigError([ConfigProblem(name="", where=where, sentence=sentence)])

    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise fail(f"the file cannot be read ({error.strerror}): check the path and its permissions") from error
    if len(raw) > MAX_BYTES:
        raise fail(f"the file is larger than {MAX_BYTES} bytes: give a settings file")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise fail("the file must be UTF-8: convert it", raw.count(b"\n", 0, error.start) + 1) from error
    try:
        loader, root = parse_yaml(text)
    except YamlError as error:
        raise fail(str(error), error.line) from error
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise fail("the file must be a mapping of sections: write `run:`, `model:`, ...", root.start_mark.line + 1)
    return loader, root


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
            loader, root = parse_yaml(text)
        except YamlError as error:
            problems.append(problem("--set", dotted, shown(text), f"must be a YAML value ({error}): quote it"))
            continue
        node = root or yaml.ScalarNode(NULL, "")
        problems += _key_problems(node, name, None)
        reader = _Reader(loader=loader, source=None, problems=problems)
        if is_section(annotation_at(name)) and isinstance(node, yaml.MappingNode) and not node.value:
            problems.append(problem("--set", dotted, "{}", "sets nothing: name a setting below it"))
            continue
        settings = over(settings, dict(_flatten(reader, node, annotation_at(name), name)))
    return settings


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reader:
    """What turns nodes of one document into settings."""

    loader: SettingsLoader
    source: str | None
    """The file; None for `--set`."""
    problems: list[ConfigProblem]

    def where(self, node: yaml.Node) -> str:
        return _where(self.source, node)


def _where(source: str | None, node: yaml.Node) -> str:
    return "--set" if source is None else f"{source}:{node.start_mark.line + 1}"


def _flatten(
    reader: _Reader, node: yaml.Node, annotation: object, name: NamePath
) -> Iterator[tuple[NamePath, Setting]]:
    """Yield the leaves under `node`, going down only where the tree of settings does."""
    if is_listed(annotation) and (node.tag != NULL and not isinstance(node, yaml.MappingNode)):
        yield from _flatten_list(reader, node, annotation, name)
        return
    if is_section(annotation) or is_mapping(annotation):
        if isinstance(node, yaml.MappingNode):
            if is_mapping(annotation) and not node.value:
                yield name, Setting(value={}, text="{}", where=reader.where(node), is_clearing=True)
            elif is_listed(annotation) and ONLY_TASK not in map(_key_text, (key for key, _ in node.value)):
                # Records with names take the place of one that was written alone.
                only = (*name, ONLY_TASK)
                yield only, Setting(value={}, text="{}", where=reader.where(node), is_clearing=True)
            for key_node, value_node in node.value:
                key = _key_text(key_node)
                if _is_merge(key_node):
                    continue  # a problem by itself
                yield from _flatten(reader, value_node, child_annotation(annotation, key), (*name, key))
            if node.value or shorthand_of(annotation) is None:
                return
        # The value alone stands for a record.
        short = shorthand_of(annotation)
        if short is not None and isinstance(node, yaml.ScalarNode) and node.tag != NULL:
            yield from _flatten(reader, node, child_annotation(annotation, short), (*name, short))
            return
        # A section whose lines are all commented out is an empty one. "null" is a value, and no section has it.
        if reader.source is not None and node.tag == NULL and not node.value and short is None:
            return
    text = _quote(node)
    try:
        value = construct(reader.loader, node)
    except ValueError as error:
        reader.problems.append(problem(reader.where(node), ".".join(name), text, f"cannot be read ({error}): quote it"))
        return
    yield name, Setting(value=value, text=text, where=reader.where(node))


def _flatten_list(
    reader: _Reader, node: yaml.Node, annotation: object, name: NamePath
) -> Iterator[tuple[NamePath, Setting]]:
    """Yield the leaves of records that are listed, or of the one that is written alone, instead of those of before."""
    yield name, Setting(value={}, text=_quote(node), where=reader.where(node), is_clearing=True)
    if not isinstance(node, yaml.SequenceNode):
        yield from _flatten(reader, node, child_annotation(annotation, ONLY_TASK), (*name, ONLY_TASK))
        return
    seen: set[str] = set()
    for item in node.value:
        key, record = _named_record(item, str(shorthand_of(child_annotation(annotation, ""))))
        if key in seen:
            sentence = f"{'.'.join(name)} lists two records called {key}: give one of them another `name:`"
            reader.problems.append(ConfigProblem(name=".".join(name), where=reader.where(item), sentence=sentence))
        seen.add(key)
        yield from _flatten(reader, record, child_annotation(annotation, key), (*name, key))


def _named_record(item: yaml.Node, short: str) -> tuple[str, yaml.Node]:
    """Return the name of a listed record, by its `name:` or else after its file, and the record without it."""
    if not isinstance(item, yaml.MappingNode):
        return _name_after(_key_text(item)), item
    fields = {_key_text(key): value for key, value in item.value}
    named = _key_text(fields["name"]) if "name" in fields else _name_after(_key_text(fields.get(short, item)))
    others = [(key, value) for key, value in item.value if _key_text(key) != "name"]
    return named, yaml.MappingNode(item.tag, others, item.start_mark, item.end_mark)


def _name_after(path: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", Path(path).stem)


def _key_problems(root: yaml.Node, name: NamePath, source: str | None) -> Iterator[ConfigProblem]:
    """Yield errors of the keys below a node: duplicates and merges."""
    waiting: list[tuple[NamePath, yaml.Node]] = [(name, root)]
    visited: set[int] = set()
    while waiting:
        name, node = waiting.pop()
        if id(node) in visited:
            continue
        visited.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += [(name, item) for item in node.value]
        if not isinstance(node, yaml.MappingNode):
            continue
        first_lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = _key_text(key_node), key_node.start_mark.line + 1
            dotted = ".".join((*name, key))
            if key in first_lines:
                sentence = f"{dotted} is set twice (first on line {first_lines[key]}): keep one"
                yield ConfigProblem(name=dotted, where=_where(source, key_node), sentence=sentence)
            if _is_merge(key_node):
                sentence = f"{dotted}: YAML 1.2 has no merge: write the settings out, or share a file with `base:`"
                yield ConfigProblem(name=dotted, where=_where(source, key_node), sentence=sentence)
            first_lines.setdefault(key, line)
            waiting.append(((*name, key), value_node))


def problem(where: str, name: str, text: str, rule: str) -> ConfigProblem:
    """Return the problem that the setting `name`, written as `text`, breaks `rule` (which ends with the remedy)."""
    return ConfigProblem(name=name, where=where, sentence=f"{name}={text} {rule}")


def _override_path(dotted: str) -> NamePath:
    """Split at the dots; below a mapping field the rest is one key, dots included, unless the mapping holds records."""
    parts = tuple(dotted.split("."))
    for depth in range(1, len(parts)):
        annotation = annotation_at(parts[:depth])
        if is_mapping(annotation) and record_of(annotation) is None:
            return (*parts[:depth], ".".join(parts[depth:]))
    return parts


def annotation_at(name: NamePath) -> object:
    """Return the type of a setting, None when there is no such setting."""
    annotation: object = Config
    for part in name:
        annotation = child_annotation(annotation, part)
    return annotation


def _is_merge(key: yaml.Node) -> bool:
    """Whether YAML 1.1 takes a key for a merge of mappings. In quotes it is text."""
    return isinstance(key, yaml.ScalarNode) and key.value == "<<" and key.style is None


def _key_text(node: yaml.Node) -> str:
    """Return a key as written, so that `on:` is not read as a boolean."""
    return str(node.value) if isinstance(node, yaml.ScalarNode) else _quote(node)


def shown(text: str, limit: int = 80) -> str:
    """Return how messages show a text: its beginning."""
    return text if len(text) <= limit else text[:limit] + "..."


def _quote(node: yaml.Node) -> str:
    """Return how messages show a value."""
    if isinstance(node, yaml.ScalarNode):
        return shown(str(node.value))
    return "(a mapping)" if isinstance(node, yaml.MappingNode) else "(a list)"
