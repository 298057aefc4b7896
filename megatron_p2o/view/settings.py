"""Settings of runs against the defaults and against one another."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from megatron_p2o.config.shape import is_optional, is_section
from megatron_p2o.config.tree import Config
from megatron_p2o.config.yaml_reader import load_yaml
from megatron_p2o.metrics.jsonl import JsonObject
from megatron_p2o.view.followed import FileState, file_state

UNSET = "(not set)"


class SettingsFile:
    """The resolved settings of a run, parsed once for each state of their file."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "config.yaml"
        self._parsed: tuple[FileState, Mapping[str, Any]] | None = None
        """The file's state, and what it held."""

    def read(self) -> Mapping[str, Any]:
        """Return the settings by dotted name; none before they are written.

        Raises:
            ValueError: config.yaml is damaged.
        """
        try:
            state = file_state(self._path)
            if state is None:
                return {}
            if self._parsed is None or self._parsed[0] != state:
                tree = load_yaml(self._path.read_text(encoding="utf-8"))
                self._parsed = state, _flat(tree, "") if isinstance(tree, dict) else {}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise ValueError(f"{self._path} cannot be read ({error}): restore it") from error
        return self._parsed[1]


def differences(of_runs: Sequence[Mapping[str, Any]]) -> list[JsonObject]:
    """Return the settings that one of the runs has otherwise than the default, or than another run.

    Each has its `name`, the `default`, the runs' `values` as text, and `differs` between the runs.
    """
    defaults = default_settings()
    rows: list[JsonObject] = []
    for name in dict.fromkeys([*defaults, *(name for settings in of_runs for name in settings)]):
        values = [_text(settings, name) for settings in of_runs if settings]
        default = _text(defaults, name)
        if any(value != default for value in values):
            shown = [_text(settings, name) if settings else "" for settings in of_runs]
            rows.append({"name": name, "default": default, "values": shown, "differs": len(set(values)) > 1})
    return rows


def default_settings(section: type = Config, prefix: str = "") -> dict[str, Any]:
    """Return every setting that has a default, by dotted name, without the presets."""
    hints = get_type_hints(section, include_extras=True)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        name, kind = prefix + field.name, hints[field.name]
        if is_section(kind) and not is_optional(kind):
            found |= default_settings(kind, f"{name}.")
        elif field.default is not dataclasses.MISSING:
            found[name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[name] = field.default_factory()
    return found


def _flat(tree: Mapping[Any, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        found |= _flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return found


def _text(settings: Mapping[str, Any], name: str) -> str:
    if name not in settings:
        return UNSET
    value = settings[name]
    if value is None or value == {} or value == () or value == []:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.12g}"
    return str(list(value)) if isinstance(value, list | tuple) else str(value)
