"""Callables that settings name: a built-in one, an installed package's, or one of the user's own code.

A name is a short one (built in, or an entry point of the setting's group), `package.module:callable`, or
`path/to/file.py:callable`.
"""

import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, cast


@dataclass(frozen=True, kw_only=True, slots=True)
class CallableKind:
    """What a setting may name."""

    parameters: tuple[str, ...]
    """What it is called with, beside the arguments that settings give."""
    built_in: Mapping[str, str] = field(default_factory=dict[str, str])
    """Short name to the callable it stands for, as `package.module:callable`."""
    other_names: tuple[str, ...] = ()
    """Short names that the setting may have beside, for messages."""
    entry_points: str | None = None
    """Group of entry points by which an installed package gives its callables short names."""

    @property
    def signature(self) -> str:
        """How it is called, for messages: `(problem, response, finish_reason)`."""
        return f"({', '.join(self.parameters)})"

    def entries(self) -> dict[str, str]:
        """Return the short names of installed packages, and the callables they stand for."""
        if self.entry_points is None:
            return {}
        found = importlib.metadata.entry_points(group=self.entry_points)
        return {entry.name: f"{entry.module}:{entry.attr}" for entry in found}


ROWS = CallableKind(parameters=())
"""What a data source is: it is called without arguments and yields the same mappings each time."""


def is_own(name: str) -> bool:
    """Whether a name is that of a callable, `package.module:callable` or `path/to/file.py:callable`."""
    place, _, attribute = name.rpartition(":")
    return bool(place and attribute)


def names_code(file: str) -> bool:
    """Whether what a setting names is a callable and no file: a file's path may hold a colon."""
    return is_own(file) and not Path(file).is_file()


def rows_of(name: str) -> Iterator[object]:
    """Yield what a callable of the user's yields when it is called without arguments: the rows of a data source.

    Raises:
        ValueError: as `load_callable`; or it raises, or returns nothing that can be iterated.
    """
    found = load_callable(name, ROWS, name)
    check_call(found, (), {}, subject=name, rule=f"be callable as {ROWS.signature}")
    try:
        yield from found()
    except Exception as error:  # whatever code of others does
        raise ValueError(f"{name} cannot be read ({type(error).__name__}: {error})") from error


def load_callable(name: str, kind: CallableKind, subject: str) -> Callable[..., Any]:
    """Return the callable of a name. Imports the code that holds it.

    Args:
        name: see the module.
        kind: what the setting may name.
        subject: begins the messages, `grading.function=NAME`.

    Raises:
        ValueError: it is not found, cannot be imported or is not callable.
    """
    target = kind.built_in.get(name) or (name if is_own(name) else kind.entries().get(name, ""))
    if not target:
        known = ", ".join(dict.fromkeys([*kind.built_in, *kind.other_names, *kind.entries()]))
        choices = f"is none of {known}, nor" if known else "must be"
        group = f" (packages add names by the entry points {kind.entry_points})" if kind.entry_points else ""
        raise ValueError(f"{subject} {choices} package.module:callable or path/to/file.py:callable{group}")
    place, _, attribute = target.rpartition(":")
    try:
        found: Any = _module(place)
        for part in attribute.split("."):
            found = _attribute(found, part, place)
    except (Exception, SystemExit) as error:  # whatever code of others does when it is imported
        raise ValueError(f"{subject} cannot be imported ({type(error).__name__}: {error})") from error
    if not callable(found):
        raise ValueError(f"{subject} is {type(found).__name__}, and must be callable as {kind.signature}")
    return found


def check_call(
    function: Callable[..., Any], given: Sequence[object], arguments: Mapping[str, Any], *, subject: str, rule: str
) -> None:
    """Raise `ValueError` unless a callable takes what it is given, and keyword arguments.

    `subject` begins the message and `rule` says what it must be able to do: "be callable as (problem, response)".
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # a callable of C that does not say
        return
    try:
        signature.bind(*given, **arguments)
    except TypeError as error:
        raise ValueError(f"{subject} has the signature {signature} and must {rule} ({error})") from error


def check_callable(
    found: Callable[..., Any], kind: CallableKind, subject: str, arguments: Mapping[str, Any], arguments_setting: str
) -> None:
    """Raise `ValueError` unless a function takes the kind's parameters and the arguments, or a class can be made so.

    The arguments of a class are those of its `__init__`, and its instances take the parameters: `made_callable`.
    `arguments_setting` is the name of what holds them. The message has the signature expected.
    """
    if not inspect.isclass(found):
        rule = f"be callable as {kind.signature}"
        check_call(found, kind.parameters, arguments, subject=subject, rule=rule)
        return
    check_call(found, (), arguments, subject=subject, rule=f"be made with {arguments_setting}")
    method = f"__call__(self, {kind.signature[1:]}"
    if not any("__call__" in vars(base) for base in found.__mro__):
        raise ValueError(f"{subject} has no method {method}")
    check_call(found.__call__, ("self", *kind.parameters), {}, subject=subject, rule=f"have a {method}")


def made_callable(found: Callable[..., Any], arguments: Mapping[str, Any], subject: str) -> Callable[..., Any]:
    """Return a function with its arguments bound, or an instance of a class. Raises `ValueError` when that raises."""
    if not inspect.isclass(found):
        return partial(found, **arguments) if arguments else found
    try:
        return cast(Callable[..., Any], found(**arguments))
    except (Exception, SystemExit) as error:  # whatever code of others does
        raise ValueError(f"{subject} cannot be made ({type(error).__name__}: {error})") from error


def _attribute(holder: object, name: str, place: str) -> object:
    """Return an attribute. Raises `AttributeError`, with the place as the user wrote it."""
    if hasattr(holder, name):
        return getattr(holder, name)
    near = get_close_matches(name, dir(holder), 1)
    raise AttributeError(f"{place} has no {name}" + (f", did you mean {near[0]}?" if near else ""))


def _module(place: str) -> ModuleType:
    """Import a module by name, or a file by its path; a file is imported once, under a name of its own."""
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place).resolve()
    name = f"p2o_file_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name not in sys.modules:
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))  # for the files beside it
        module_spec = importlib.util.spec_from_file_location(name, path)
        assert module_spec is not None and module_spec.loader is not None, "a path that ends in .py has a loader"
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[name] = module  # dataclasses of the file look themselves up there
        try:
            module_spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
