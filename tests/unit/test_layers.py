"""Who may import whom is part of the design: checked on the syntax tree of every file, imports inside functions too."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE_ROOTS = (ROOT, ROOT / "kernels")
"""Folders whose packages are importable by name."""

CONTRACT = tuple(
    f"megatron_p2o.{name}"
    for name in (
        *("types", "config", "config_yaml", "interfaces", "files", "host_memory"),
        *("processes", "seeds", "suggestions", "terminal"),
    )
)
"""What everybody may see."""

ROOMS = ("policy", "rollout", "rewards", "evolve", "data", "metrics")
"""Packages that know the contract and `rl`, and never each other: `train` brings them together."""

ALLOWED = {
    "p2o_kernels": (),
    "megatron_p2o.types": (),
    "megatron_p2o.config_ranges": (),
    "megatron_p2o.config": ("megatron_p2o.config_ranges",),
    "megatron_p2o.interfaces": ("megatron_p2o.types", "megatron_p2o.files"),
    "megatron_p2o.files": (),
    "megatron_p2o.host_memory": (),
    "megatron_p2o.processes": (),
    "megatron_p2o.seeds": (),
    "megatron_p2o.terminal": (),
    "megatron_p2o.errors": (),
    "megatron_p2o.suggestions": (),
    "megatron_p2o.config_yaml": (),
    "megatron_p2o.config_source": ("megatron_p2o.config", "megatron_p2o.config_yaml"),
    "megatron_p2o.config_names": ("megatron_p2o.config", "megatron_p2o.config_source", "megatron_p2o.suggestions"),
    "megatron_p2o.config_file": tuple(
        f"megatron_p2o.{name}" for name in ("config", "config_names", "config_source", "config_yaml", "suggestions")
    ),
    "megatron_p2o.rl": (*CONTRACT, "p2o_kernels"),
    "megatron_p2o.algorithm": (*CONTRACT, "megatron_p2o.rl"),
    **{f"megatron_p2o.{room}": (*CONTRACT, "megatron_p2o.rl") for room in ROOMS},
}
"""Module or package to what it may import of our own, besides itself. Files not listed are at the top, or test support:
they may import anything, and nothing listed may import them."""

ALLOWED["megatron_p2o.policy"] += ("p2o_kernels",)

ONLY_IN = {"megatron": "megatron_p2o.policy", "sglang": "megatron_p2o.rollout", "math_verify": "megatron_p2o.rewards"}
"""Third-party package to the only package of ours that may import it."""

KERNELS_MAY_IMPORT = {"torch", "triton", *sys.stdlib_module_names}

TEST_SUPPORT = "megatron_p2o.testing"

BELOW = {
    "megatron_p2o.train": ("megatron_p2o.cli",),
    "megatron_p2o.launch": ("megatron_p2o.cli",),
    "megatron_p2o.evaluate": ("megatron_p2o.cli", "megatron_p2o.launch", "megatron_p2o.train"),
    "megatron_p2o.run_state": ("megatron_p2o.cli", "megatron_p2o.launch", "megatron_p2o.train"),
    "megatron_p2o.checkpoints": ("megatron_p2o.cli", "megatron_p2o.launch", "megatron_p2o.train"),
}
"""Module at the top to those above it."""


def module_name(path: Path) -> str:
    root = max((root for root in SOURCE_ROOTS if root in path.parents), key=lambda root: len(root.parts))
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def imported_names(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Yield the full dotted name of everything a file imports, anywhere in it, in whatever way can be read off."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package.split(".")[: len(package.split(".")) + 1 - node.level]]) if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__"):
                yield str(node.args[0].value)


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """Return one sentence for each import the design forbids."""
    if is_in(module, TEST_SUPPORT):
        return []
    layer = next((layer for layer in ALLOWED if is_in(module, layer)), None)
    found: list[str] = []
    for name in sorted(set(imported_names(source, module, is_package))):
        root = name.split(".")[0]
        if root in ("megatron_p2o", "p2o_kernels"):
            may_import = layer is None or any(is_in(name, own) for own in (layer, *ALLOWED[layer]))
            if not may_import or any(is_in(name, above) for above in BELOW.get(module, ())):
                found.append(f"{module} must not import {name}")
        elif root in ONLY_IN and not is_in(module, ONLY_IN[root]):
            found.append(f"{module} must not import {name}: only {ONLY_IN[root]} may")
        elif layer == "p2o_kernels" and root not in KERNELS_MAY_IMPORT:
            found.append(f"{module} must not import {name}: kernels know torch and triton only")
    return found


def source_files() -> list[Path]:
    return sorted([*(ROOT / "megatron_p2o").rglob("*.py"), *(ROOT / "kernels" / "p2o_kernels").rglob("*.py")])


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_file_imports_only_what_its_layer_allows(path: Path) -> None:
    assert violations(path.read_text(), module_name(path), path.name == "__init__.py") == []


def test_every_listed_layer_exists() -> None:
    names = {module_name(path) for path in source_files()}
    assert [layer for layer in (*ALLOWED, *BELOW) if layer not in names] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("megatron_p2o.rewards.pool", "from megatron_p2o.data.chat import ChatRenderer"),
        ("megatron_p2o.rewards.pool", "from megatron_p2o import data"),
        ("megatron_p2o.rewards.pool", "def later():\n    import megatron_p2o.policy"),
        ("megatron_p2o.rewards.pool", "from ..data import chat"),
        ("megatron_p2o.rewards.pool", "if TYPE_CHECKING:\n    from megatron_p2o.evolve.pool import Pool"),
        ("megatron_p2o.rewards.pool", "importlib.import_module('megatron_p2o.train')"),
        ("megatron_p2o.rewards.pool", "from megatron_p2o.testing.fakes import FakePolicy"),
        ("megatron_p2o.rewards.pool", "from p2o_kernels.logprob import linear_logprob"),
        ("megatron_p2o.rewards.pool", "from megatron_p2o.config_file import load_config"),
        ("megatron_p2o.algorithm", "from megatron_p2o.rewards.registry import make_grader"),
        ("megatron_p2o.algorithm", "from megatron_p2o.train import main"),
        ("megatron_p2o.rl.packing", "from megatron_p2o.algorithm import p2o_step"),
        ("megatron_p2o.types", "from megatron_p2o.config import Config"),
        ("megatron_p2o.train", "from megatron_p2o.cli import main"),
        ("megatron_p2o.evaluate", "from megatron_p2o.train import main"),
        ("megatron_p2o.train", "from megatron.core import parallel_state"),
        ("megatron_p2o.policy.model", "import sglang"),
        ("megatron_p2o.rollout.client", "from megatron import core"),
        ("megatron_p2o.doctor", "def probe():\n    import sglang.srt"),
        ("p2o_kernels.logprob.op", "import numpy"),
        ("p2o_kernels.logprob.op", "from megatron_p2o.types import Logprobs"),
    ],
)
def test_forbidden_import_is_found_however_it_is_written(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("megatron_p2o.rewards.pool", "from megatron_p2o.types import Grade\nfrom . import extract\nimport sympy"),
        ("megatron_p2o.policy.head", "from p2o_kernels.logprob import linear_logprob\nimport megatron.core"),
        ("megatron_p2o.rollout.server", "import sglang\nfrom megatron_p2o.rl.packing import pack"),
        (
            "megatron_p2o.train",
            "from megatron_p2o.policy.ranks import build_policy\nimport megatron_p2o.data",
        ),
        ("megatron_p2o.testing.fakes", "import megatron.core, sglang, megatron_p2o.evolve"),
        ("p2o_kernels.logprob.op", "import math, torch, triton.language\nfrom p2o_kernels.logprob import reference"),
    ],
)
def test_allowed_import_is_let_pass(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_folder_of_the_kernels_is_no_package_of_that_name() -> None:
    # `kernels` is a package on PyPI that transformers imports: ours must never be found under that name.
    assert not (ROOT / "kernels" / "__init__.py").exists()
