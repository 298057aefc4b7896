"""The sinks that settings can ask for beside `metrics.jsonl`: one table, and those that packages add."""

import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_p2o.config.callables import CallableKind, check_call, load_callable
from megatron_p2o.config.tree import LoggingConfig
from megatron_p2o.files import write_whole
from megatron_p2o.metrics.sinks.record import MetricSink, SinkContext
from megatron_p2o.metrics.sinks.services import MlflowSink, TensorBoardSink, TrackioSink, WandbSink
from megatron_p2o.processes import PROXY_VARIABLES, keys_named_in, variables_named_in

OWN = CallableKind(parameters=("context",), entry_points="megatron_p2o.sinks")
"""What `logging.sinks` may name."""

RUN_ID_FILE = "run_id"
RUN_ID = re.compile(r"[0-9a-f]{12}")

OpenSink = Callable[[SinkContext], MetricSink]


@dataclass(frozen=True, kw_only=True, slots=True)
class SinkKind:
    """A sink of the table. Its key there is the package it needs."""

    setting: str
    """Dotted name of the setting that asks for it."""
    value: Callable[[LoggingConfig], str | bool | None]
    """Returns the setting's value, which goes to `open`."""
    off: str
    """The setting's value, as a file writes it, that asks for none."""
    open: Callable[[Any, SinkContext], MetricSink]
    secrets: tuple[str, ...] = ()
    """Environment variables that may hold secrets and that it needs."""


KINDS: Mapping[str, SinkKind] = {
    "tensorboard": SinkKind(
        setting="logging.tensorboard", value=lambda logging: logging.tensorboard, off="false", open=TensorBoardSink
    ),
    "wandb": SinkKind(
        setting="logging.wandb_project",
        value=lambda logging: logging.wandb_project,
        off="null",
        open=WandbSink,
        secrets=("WANDB_API_KEY", *PROXY_VARIABLES),
    ),
    "mlflow": SinkKind(
        setting="logging.mlflow_experiment",
        value=lambda logging: logging.mlflow_experiment,
        off="null",
        open=MlflowSink,
        secrets=(
            *("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
            *PROXY_VARIABLES,
        ),
    ),
    "trackio": SinkKind(
        setting="logging.trackio_project",
        value=lambda logging: logging.trackio_project,
        off="null",
        open=TrackioSink,
        secrets=("HF_TOKEN", "TRACKIO_WRITE_TOKEN", "TRACKIO_SERVER_URL", *PROXY_VARIABLES),
    ),
}


def wanted_sinks(settings: LoggingConfig) -> dict[str, OpenSink]:
    """Return the name of each sink that is asked for, and what opens it.

    Raises:
        ValueError: one cannot be had; the message has all sentences of `sink_problems`.
    """
    problems = sink_problems(settings)
    if problems:
        raise ValueError("; ".join(problems))
    built_in = {package: partial(kind.open, value) for package, kind, value in _wanted_kinds(settings)}
    own = {name: _own_sink(name, arguments) for name, arguments in settings.sinks.items()}
    return {**built_in, **own}


def sink_problems(settings: LoggingConfig) -> list[str]:
    """Return one sentence for each sink that is asked for and cannot be had: no package, or no such callable."""
    return [*missing_sink_packages(settings), *own_sink_problems(settings)]


def missing_sink_packages(settings: LoggingConfig) -> list[str]:
    """Return one sentence for each built-in sink that is asked for and whose package this machine lacks."""
    return [
        f"{kind.setting}={str(value).lower() if value is True else value} needs the package {package}: "
        f"pip install {package}, or set {kind.setting} to {kind.off}"
        for package, kind, value in _wanted_kinds(settings)
        if not _is_installed(package)
    ]


def own_sink_problems(settings: LoggingConfig) -> list[str]:
    """Return one sentence for each sink of the user's own that cannot be made."""
    problems: list[str] = []
    for name, arguments in settings.sinks.items():
        try:
            _own_sink(name, arguments)
        except ValueError as error:
            problems.append(str(error))
    return problems


def sink_secrets(settings: LoggingConfig) -> tuple[str, ...]:
    """Return the environment variables that may hold secrets and that the sinks asked for need.

    For a sink of one's own they are what its arguments called `..._env` name.
    """
    built_in = [name for _, kind, _ in _wanted_kinds(settings) for name in kind.secrets]
    own = [name for arguments in _own_arguments(settings) for name in variables_named_in(arguments)]
    return tuple(dict.fromkeys((*built_in, *own)))


def sink_keys(settings: LoggingConfig) -> set[str]:
    """Return the environment variables that arguments called `api_key_env` say hold a key, whatever their names."""
    return {name for arguments in _own_arguments(settings) for name in keys_named_in(arguments)}


def _own_arguments(settings: LoggingConfig) -> Iterator[Mapping[str, object]]:
    """Yield the arguments of each sink of one's own; what is no mapping is refused elsewhere."""
    yield from (arguments for arguments in settings.sinks.values() if isinstance(arguments, Mapping))


def run_id_of(run_directory: Path) -> str:
    """Return the id of the run in a folder, which `run_id` there holds; the first call makes it.

    Raises:
        ValueError: the file holds no id.
    """
    path = run_directory / RUN_ID_FILE
    if not path.exists():
        write_whole(path, uuid.uuid4().hex[:12] + "\n")
    run_id = path.read_text("utf-8", errors="replace").strip()
    if not RUN_ID.fullmatch(run_id):
        raise ValueError(f"{path} must hold twelve hexadecimal digits: restore it, or remove it to have another id")
    return run_id


def _wanted_kinds(settings: LoggingConfig) -> Iterator[tuple[str, SinkKind, Any]]:
    for package, kind in KINDS.items():
        value = kind.value(settings)
        if value not in (None, False):
            yield package, kind, value


def _is_installed(package: str) -> bool:
    try:
        found = find_spec(package)
    except ValueError:  # a module that was made by hand has no spec
        return False
    return found is not None and found.origin is not None  # a folder of that name is no package


def _own_sink(name: str, arguments: object) -> OpenSink:
    """Return what opens a sink of `logging.sinks`. Raises `ValueError` unless it is there and takes the arguments."""
    if not isinstance(arguments, Mapping):
        raise ValueError(f"logging.sinks.{name}={arguments} must be a mapping of arguments: write {{}} for none")
    subject = f"logging.sinks.{name}"
    sink = load_callable(name, OWN, subject)
    check_call(sink, OWN.parameters, arguments, subject=subject, rule=f"be callable as {OWN.signature}")
    return partial(sink, **arguments)
