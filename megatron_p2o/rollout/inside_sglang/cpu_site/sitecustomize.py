"""Lets an unmodified PyPI wheel of SGLang start on a machine without CUDA.

Python imports this module at start-up when its directory is on PYTHONPATH. `servers.server` puts it there for the
engine process only (its spawned children inherit it), and it does nothing unless SGLANG_USE_CPU_ENGINE=1.

SGLang imports three packages at module scope that cannot be had on such a machine, and calls none of them on the CPU
path. A package that is really installed always wins; for a missing one a stand-in is imported:

    sgl_kernel    CUDA wheels only; a few names of it are imported for speculative decoding. Calling one raises.
    triton        CUDA wheels, 700 MB on disk; `@triton.jit` functions are defined but never launched.
    torchvision   the PyPI wheel does not load beside a CPU build of torch; SGLang only needs the import to succeed.
"""

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

STAND_IN_PACKAGES = ("triton", "torchvision")
"""Submodules of these are stood in for as well."""

STAND_IN_MODULES = ("sgl_kernel",)
"""Not a package: SGLang probes submodules of it and must see them fail."""


class StandInClass(type):
    """Type of a stand-in class: every attribute exists, as its own dotted name."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class StandIn(ModuleType):
    """A module any attribute of which can be imported: classes for capitalised names, submodules otherwise."""

    __version__ = "0.0.0"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__file__ = __file__
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = self._attribute(name)
        setattr(self, name, value)
        return value

    def _attribute(self, name: str) -> Any:
        if name[0].isupper():
            return StandInClass(name, (), {"__init__": lambda self, *args, **kwargs: None})
        full_name = f"{self.__name__}.{name}"
        return sys.modules.setdefault(full_name, StandIn(full_name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Serve as a decorator, with or without arguments: `@triton.jit`, `@triton.autotune(...)`."""
        if len(args) == 1 and callable(args[0]) and not kwargs:
            return args[0]
        return lambda function: function

    def __contains__(self, item: object) -> bool:
        """torch.compile asks `"cpu" in triton.backends.backends`."""
        return False

    def __iter__(self) -> Iterator[Any]:
        return iter(())


class RaisingStandIn(StandIn):
    """A module whose functions can be imported and raise when called."""

    def _attribute(self, name: str) -> Callable[..., Any]:
        def raise_not_installed(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(f"{self.__name__}.{name}: {self.__name__} is not installed on this machine")

        return raise_not_installed


class StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds stand-ins for the packages of this module that are not installed."""

    def __init__(self) -> None:
        self._is_missing: dict[str, bool] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        root, _, submodule = fullname.partition(".")
        if root not in STAND_IN_PACKAGES and (root not in STAND_IN_MODULES or submodule):
            return None
        if root not in self._is_missing:
            self._is_missing[root] = importlib.machinery.PathFinder.find_spec(root) is None
        if not self._is_missing[root]:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=root in STAND_IN_PACKAGES)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        if spec.name in STAND_IN_MODULES:
            return RaisingStandIn(spec.name)
        module = sys.modules.get(spec.name) or StandIn(spec.name)
        if spec.name == "triton":
            module.cdiv = lambda numerator, denominator: -(numerator // -denominator)  # type: ignore[attr-defined]
            module.next_power_of_2 = lambda n: 1 << max(n - 1, 0).bit_length()  # type: ignore[attr-defined]
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run: a stand-in is complete when it is created."""


if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
    sys.meta_path.insert(0, StandInFinder())
