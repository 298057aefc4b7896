"""Reads the settings of a run from YAML: strict, typed, and with every problem reported at once.

    base: other.yaml            # optional; read first, relative to this file
    preset: reference           # optional; changes defaults only
    run: {name: first}
    optimizer: {lr: 1e-6}

Settings win in this order: `--set`, the file, its base, the preset, the defaults of `config.tree`. Mappings merge key
by key; an empty one (`data.evaluation={}`) takes away what was there. Values are those of YAML 1.2 (`yaml_reader`).
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints
from urllib.parse import parse_qsl, urlsplit

from megatron_p2o.config.callables import names_code
from megatron_p2o.config.names import suggestion
from megatron_p2o.config.ranges import range_of
from megatron_p2o.config.rules import problems_of
from megatron_p2o.config.shape import (
    is_listed,
    is_mapping,
    is_optional,
    is_section,
    record_of,
    section_of,
    shorthand_of,
)
from megatron_p2o.config.source import (
    ConfigError,
    ConfigProblem,
    NamePath,
    Setting,
    Settings,
    annotation_at,
    over,
    problem,
    read_overrides,
    read_with_bases,
)
from megatron_p2o.config.suggestions import did_you_mean, model_command, problems_command
from megatron_p2o.config.tree import PRESETS, Config
from megatron_p2o.config.yaml_reader import dump_yaml

__all__ = [
    "ConfigError",
    "ConfigProblem",
    "config_of",
    "dump_config",
    "load_config",
    "missing_paths",
    "with_template_date",
]

SECRET_KEY = re.compile(r"(^|[._-])(key|token|password|secret)$", re.IGNORECASE)
"""Keys of the pass-through sections that would hold a credential."""


class _RefusedError(Exception):
    """A value breaks the rule of its field; the message is the rule and the remedy."""


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Return the settings of the file at `path`, if any, with `overrides` ("optimizer.lr=1e-6") on top.

    Raises:
        ConfigError: with all problems; only an unreadable file hides the ones behind it.
    """
    problems: list[ConfigProblem] = []
    source = "--set" if path is None else str(path)
    settings = read_overrides(overrides, problems)
    if path is not None:
        settings = over(read_with_bases(path, problems), settings)
    return config_of(settings, problems, source)


def config_of(settings: Settings, problems: list[ConfigProblem], source: str) -> Config:
    """Return the settings that were read from `source`, with their preset and the defaults.

    Raises:
        ConfigError: with all problems, and those that were found before.
    """
    preset = settings.get(("preset",))
    if preset is not None:
        settings = over(_preset_settings(preset.value), settings)
    problems += _unknown_names(settings)
    config = _build(Config, (), settings, problems, source=source)
    refused = {problem.name for problem in problems if annotation_at(tuple(problem.name.split("."))) is not None}
    for sentence in [*_secrets_in(config), *problems_of(config)]:
        if not any(_names(sentence, name) for name in refused):
            problems.append(_located(sentence, settings, source=source))
    if problems:
        raise ConfigError(problems)
    return config


def dump_config(config: Config) -> str:
    """Return all settings as YAML that `load_config` reads back to an equal tree.

    Raises:
        ValueError: a setting holds a credential, which `load_config` refuses too.
    """
    secrets = _secrets_in(config)
    if secrets:
        raise ValueError("; ".join(secrets))
    return dump_yaml(dataclasses.asdict(config))


def missing_paths(config: Config, *, for_training: bool = True) -> list[str]:
    """Return one sentence for each file or directory the settings name that is not there.

    Relative paths count from the current directory. What only training reads does not count without `for_training`.
    """
    files = {**(config.data.training_files if for_training else {}), **config.data.evaluation_files}
    if for_training and config.evolution.reflection.phrases is not None:
        files["evolution.reflection.phrases"] = config.evolution.reflection.phrases
    if for_training and config.evolution.templates_file is not None:
        files["evolution.templates_file"] = config.evolution.templates_file
    missing = [
        f"{name}={file} must be an existing file: correct the path (relative to {Path.cwd()}){_made_by(file)}"
        for name, file in files.items()
        if not names_code(file) and not Path(file).is_file()
    ]
    if not Path(config.model.path).is_dir():
        missing.insert(
            0,
            f"model.path={config.model.path} must be an existing Hugging Face directory: "
            f"correct the path (relative to {Path.cwd()}), or {model_command(config.model.path)}",
        )
    return missing


def _made_by(file: str) -> str:
    """Return which command makes a file of problems, for the end of a sentence; "" where none does."""
    command = problems_command(file)
    return f", or {command}" if command else ""


def with_template_date(config: Config, recorded: Path) -> Config:
    """Return `config` with a date for chat templates: its own, else that of `recorded`, else today's.

    Args:
        recorded: resolved settings of an earlier start of the run; need not exist.
    """
    if config.model.template_date is not None:
        return config
    day = _recorded_date(recorded) or date.today().isoformat()
    return dataclasses.replace(config, model=dataclasses.replace(config.model, template_date=day))


def _recorded_date(path: Path) -> str | None:
    if not path.exists():
        return None
    try:
        found = read_with_bases(path, []).get(("model", "template_date"))
    except ConfigError:
        return None  # it is about to be written anew
    return found.value if found is not None and isinstance(found.value, str) else None


def _preset_settings(preset: object) -> Settings:
    """Return what a preset sets; one that there is not sets nothing, and is refused where it is read."""
    values = PRESETS[preset] if isinstance(preset, str) and preset in PRESETS else {}
    return {
        tuple(name.split(".")): Setting(value=value, text=str(value), where=f"preset: {preset}")
        for name, value in values.items()
    }


def _build(cls: type, name: NamePath, settings: Settings, problems: list[ConfigProblem], source: str) -> Any:
    """Return the section `cls` from the settings under `name`.

    A field that is missing or refused is reported and keeps its default ("" where there is none), so that the
    remaining rules can still be checked.
    """
    values: dict[str, object] = {}
    for field in dataclasses.fields(cls):
        field_name = (*name, field.name)
        annotation = get_type_hints(cls)[field.name]
        own = settings.get(field_name)
        if is_section(annotation) or is_mapping(annotation):
            values[field.name] = _nested(annotation, field_name, settings, problems, source)
        elif own is not None:
            try:
                values[field.name] = _typed(_unnamed(own.value, _names_of(cls, field.name)), annotation)
            except _RefusedError as error:
                problems.append(problem(own.where, ".".join(field_name), own.text, str(error)))
        elif _is_required(field):
            problems.append(_missing(field_name, source))
        if not values.get(field.name) and is_mapping(annotation) and _is_required(field):
            problems.append(_missing(field_name, source))
        if field.name not in values and _is_required(field):
            values[field.name] = ""
    return cls(**values)


def _missing(name: NamePath, source: str) -> ConfigProblem:
    dotted = ".".join(name)
    return ConfigProblem(name=dotted, where=source, sentence=f"{dotted} is missing: it has no default, set it")


def _nested(
    annotation: object, name: NamePath, settings: Settings, problems: list[ConfigProblem], source: str
) -> object:
    """Return the section or mapping under `name`."""
    own = settings.get(name)
    depth = len(name)
    has_own = any(len(path) > depth and path[:depth] == name for path in settings)
    if is_optional(annotation) and not has_own and (own is None or own.value is None):
        return None
    if own is not None and not own.is_clearing:
        rule = _rule_of(annotation)
        problems.append(problem(own.where, ".".join(name), own.text, rule))
        problems = [] if shorthand_of(annotation) else problems
    section = section_of(annotation)
    if section is not None:
        return _build(section, name, settings, problems, source)
    if record_of(annotation) is None:
        return _build_mapping(annotation, name, settings, problems)
    places: dict[str, str] = {}
    for path, setting in settings.items():
        if len(path) > depth and path[:depth] == name and not setting.is_clearing:
            places.setdefault(path[depth], setting.where)
    value = get_args(annotation)[1]
    return {key: _nested(value, (*name, key), settings, problems, where) for key, where in places.items()}


def _build_mapping(
    annotation: object, name: NamePath, settings: Settings, problems: list[ConfigProblem]
) -> dict[str, object]:
    values: dict[str, object] = {}
    for key_name, setting in settings.items():
        if key_name[:-1] == name:
            try:
                values[key_name[-1]] = _typed(setting.value, get_args(annotation)[1])
            except _RefusedError as error:
                problems.append(problem(setting.where, ".".join(key_name), setting.text, str(error)))
    return values


def _typed(value: object, annotation: object) -> object:
    """Return `value` as the field's type or raise `_RefusedError`. A boolean is no number, whole numbers are floats."""
    origin, options = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        others = [option for option in options if option is not type(None)]
        assert len(others) == 1, f"{annotation}: a union of two types has no single rule"
        return None if value is None else _typed(value, others[0])
    if annotation is Any:
        return value
    if value is None:
        raise _RefusedError("is empty: give a value or delete the line")
    if origin is Literal:
        return _choice(value, options)
    if annotation is bool and isinstance(value, bool):
        return value
    if annotation is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if annotation is float and isinstance(value, int | float) and not isinstance(value, bool):
        return _float(value)
    if annotation is str and isinstance(value, str):
        return value
    raise _RefusedError(_TYPE_RULES[cast(type, annotation)])


def _names_of(cls: type, field_name: str) -> Mapping[str, float]:
    """Return the words that a field accepts instead of numbers."""
    bounds = range_of(get_type_hints(cls, include_extras=True)[field_name])
    return dict(bounds.names) if bounds is not None else {}


def _unnamed(value: object, names: Mapping[str, float]) -> object:
    """Return the number for such a word; any other value unchanged."""
    if not names or not isinstance(value, str):
        return value
    if value not in names:
        hint = did_you_mean(value, list(names)) or ": choose one"
        raise _RefusedError(f"must be a whole number or one of {', '.join(names)}{hint}")
    return names[value]


def _rule_of(annotation: object) -> str:
    """Return what a section or mapping may be written as."""
    if is_listed(annotation):
        return "must be a path, a list of paths or of records with `name:`, or a mapping of records by name"
    short = shorthand_of(annotation)
    if short is not None:
        return f"must be a {short}, or a mapping: write `{short}:` below it, indented"
    return "must be a mapping: write its settings below it, indented"


_TYPE_RULES: Mapping[type, str] = {
    bool: "must be true or false",
    int: "must be a whole number: write it in digits",
    float: "must be a number: write it like 0.5 or 1e-6",
    str: "is no text in YAML: put it in quotes",
}


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError as error:
        raise _RefusedError("must be below 1e308 in size: write it like 0.5 or 1e-6") from error


def _choice(value: object, choices: tuple[object, ...]) -> object:
    if value in choices and not isinstance(value, bool):
        return value
    hint = did_you_mean(str(value), [str(choice) for choice in choices]) or ": choose one"
    raise _RefusedError(f"must be one of {', '.join(map(str, choices))}{hint}")


def _unknown_names(settings: Settings) -> Iterator[ConfigProblem]:
    for name, setting in settings.items():
        if annotation_at(name) is None:
            dotted = ".".join(name)
            yield ConfigProblem(
                name=dotted, where=setting.where, sentence=f"{dotted} is not a setting: {suggestion(name)}"
            )


def _secrets_in(config: Config) -> list[str]:
    """Return a sentence, without the value, for every setting that holds a credential."""
    reflection = config.evolution.reflection
    remedy = "keep it out of the settings, they are written beside every run"
    found = [
        f"{section}.{key} is a credential: {remedy}"
        for section, mapping in (("sglang", config.sglang), ("megatron", config.megatron))
        for key in mapping
        if SECRET_KEY.search(key)
    ]
    found += [
        f"evolution.reflection.extra_body.{key} is a credential: {remedy}"
        for key in _keys_of(reflection.extra_body)
        if SECRET_KEY.search(key)
    ]
    address = urlsplit(reflection.base_url or "")
    if "@" in address.netloc:
        found.append(f"evolution.reflection.base_url holds a user or password: {remedy}")
    if any(SECRET_KEY.search(key) for key, _ in parse_qsl(address.query)):
        found.append(f"evolution.reflection.base_url holds a credential in its query: {remedy}")
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", reflection.api_key_env):
        found.append(
            "evolution.reflection.api_key_env must be the name of an environment variable: "
            "letters, digits and underscores; the key itself stays in the environment"
        )
    return found


def _keys_of(value: object) -> Iterator[str]:
    """Yield the keys of a mapping and of all that it holds, with the path to each."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from (f"{key}.{below}" for below in _keys_of(inner))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _keys_of(inner)


def _located(sentence: str, settings: Settings, source: str) -> ConfigProblem:
    """Return a broken cross-check with the places of the settings it names."""
    named = [
        name
        for name in settings
        if _names(sentence, ".".join(name)) or (_is_of_record(name) and _names(sentence, ".".join(name[:-1])))
    ]
    where = ", ".join(dict.fromkeys(settings[name].where for name in named)) or source
    return ConfigProblem(name=".".join(named[0]) if named else "", where=where, sentence=sentence)


def _is_of_record(name: NamePath) -> bool:
    return shorthand_of(annotation_at(name[:-1])) is not None


def _names(sentence: str, name: str) -> bool:
    return re.search(rf"(?<!\w)(?<!\w\.){re.escape(name)}(?!\w)", sentence) is not None


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
