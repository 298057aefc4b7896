"""Who may import whom is part of the design: checked on the syntax tree of every file, imports inside functions too."""

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE_ROOTS = (ROOT, ROOT / "kernels")
"""Folders whose packages are importable by name."""

GROUND = ("types", "errors", "files", "processes", "records", "seeds", "terminal", "endpoints", "config")
"""Sees nothing of ours but itself, and everybody sees it."""

CONTRACT = (*GROUND, "interfaces")

ROOMS = ("policy", "rollout", "rewards", "evolve", "data", "metrics")
"""What a run is made of. They see the contract and `rl`, never one another: `run` brings them together."""

READERS = ("report", "view")
"""Show runs."""

ORDER: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(GROUND, ()),
    "config": ("terminal",),
    "endpoints": ("terminal",),
    "config.read": ("config",),
    "interfaces": ("types", "files"),
    "rl": (*CONTRACT, "p2o_kernels"),
    "algorithm": (*CONTRACT, "rl"),
    **dict.fromkeys(ROOMS, (*CONTRACT, "rl")),
    "policy": (*CONTRACT, "rl", "p2o_kernels"),
    "tiny": (*CONTRACT,),
    "run_folder": (*CONTRACT, "rl", "metrics", "policy"),
    "evaluation": (*CONTRACT, "config.read", "rl", "data", "metrics", "rewards", "rollout", "run_folder"),
    "report": (*CONTRACT, "rl", "metrics", "evolve", "evaluation", "run_folder"),
    "view": (*CONTRACT, "rl", "metrics", "evolve", "evaluation", "run_folder", "report"),
    "machine": (*CONTRACT, "policy", "rollout"),
    "simulation": (*CONTRACT, "rollout", "evolve", "policy", "machine"),
    "run": (*CONTRACT, "config.read", *ROOMS, "rl", "algorithm", "run_folder", "evaluation", "machine", "simulation"),
    "experiment": (*CONTRACT, "config.read", "metrics", "evaluation", "run_folder", *READERS),
    "cli": (
        *(*CONTRACT, "config.read", *ROOMS, "machine", "run_folder", "evaluation", "run", *READERS),
        *("experiment", "simulation"),
    ),
}
"""Module or folder to what it may import of our own, besides itself; lowest first. CONTRIBUTING shows the picture."""

ALLOWED = {
    "p2o_kernels": (),
    **{
        f"megatron_p2o.{name}": tuple(seen if seen == "p2o_kernels" else f"megatron_p2o.{seen}" for seen in below)
        for name, below in ORDER.items()
    },
}

ANYBODYS = "megatron_p2o.__version__"

ONLY_IN = {"megatron": "megatron_p2o.policy", "sglang": "megatron_p2o.rollout", "math_verify": "megatron_p2o.rewards"}
"""Third-party package to the only package of ours that may import it."""

KERNELS_MAY_IMPORT = {"torch", "triton", *sys.stdlib_module_names}

TEST_SUPPORT = "megatron_p2o.testing"


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


def layer_of(name: str) -> str | None:
    """Return the layer of a module, or of a name in one: the most particular that holds it."""
    return max((layer for layer in ALLOWED if is_in(name, layer)), key=len, default=None)


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """Return one sentence for each import the design forbids."""
    if is_in(module, TEST_SUPPORT):
        return []
    layer = layer_of(module)
    found: list[str] = []
    for name in sorted(set(imported_names(source, module, is_package))):
        root = name.split(".")[0]
        if root in ("megatron_p2o", "p2o_kernels"):
            if name != ANYBODYS and layer is not None and layer_of(name) not in (layer, *ALLOWED[layer]):
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
    assert [layer for layer in ALLOWED if layer not in names] == []


PICTURE_WIDTH = 52
"""Columns of CONTRIBUTING's picture that hold layers; what they are stands behind."""


def lines_of_the_picture() -> dict[str, int]:
    """Return for each layer of CONTRIBUTING's picture the line it stands on, from the bottom."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("**Layers.**")[2].split("```")[1]
    rows = enumerate(reversed(text.strip().splitlines()))
    return {name.rstrip("/").replace("/", "."): number for number, row in rows for name in row[:PICTURE_WIDTH].split()}


def test_the_picture_in_contributing_is_the_table() -> None:
    lines = lines_of_the_picture()
    assert lines.keys() == {*ORDER, "p2o_kernels"} - {"config.read"}
    upwards = {
        f"{layer} -> {seen}"
        for layer, below in ORDER.items()
        for seen in below
        if "config.read" not in (layer, seen) and seen != layer and lines[seen] >= lines[layer]
    }
    assert upwards == set()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("megatron_p2o.rewards.registry", "from megatron_p2o.data.chat import ChatRenderer"),
        ("megatron_p2o.rewards.registry", "from megatron_p2o import data"),
        ("megatron_p2o.rewards.registry", "def later():\n    import megatron_p2o.policy"),
        ("megatron_p2o.rewards.registry", "from ..data import chat"),
        (
            "megatron_p2o.rewards.registry",
            "if TYPE_CHECKING:\n    from megatron_p2o.evolve.search.candidate_pool import Pool",
        ),
        ("megatron_p2o.rewards.registry", "importlib.import_module('megatron_p2o.run.train')"),
        ("megatron_p2o.rewards.registry", "from megatron_p2o.testing.fakes import FakePolicy"),
        ("megatron_p2o.rewards.registry", "from p2o_kernels.logprob import linear_logprob"),
        ("megatron_p2o.rewards.registry", "from megatron_p2o.config.read import load_config"),
        ("megatron_p2o.algorithm", "from megatron_p2o.rewards.registry import make_grader"),
        ("megatron_p2o.algorithm", "from megatron_p2o.run.train import main"),
        ("megatron_p2o.rl.packing", "from megatron_p2o.algorithm import p2o_step"),
        ("megatron_p2o.types", "from megatron_p2o.config.tree import Config"),
        ("megatron_p2o.run.train", "from megatron_p2o.cli import main"),
        ("megatron_p2o.evaluation.protocol", "from megatron_p2o.run.train import main"),
        ("megatron_p2o.run.train", "from megatron.core import parallel_state"),
        ("megatron_p2o.policy.model.model", "import sglang"),
        ("megatron_p2o.rollout.servers.client", "from megatron import core"),
        ("megatron_p2o.machine.doctor", "def probe():\n    import sglang.srt"),
        ("p2o_kernels.logprob.op", "import numpy"),
        ("p2o_kernels.logprob.op", "from megatron_p2o.types import Logprobs"),
    ],
)
def test_forbidden_import_is_found_however_it_is_written(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "megatron_p2o.rewards.registry",
            "from megatron_p2o.types import Grade\nfrom . import extract\nimport sympy",
        ),
        ("megatron_p2o.policy.model.head", "from p2o_kernels.logprob import linear_logprob\nimport megatron.core"),
        ("megatron_p2o.rollout.servers.server", "import sglang\nfrom megatron_p2o.rl.packing import pack"),
        (
            "megatron_p2o.run.train",
            "from megatron_p2o.policy.training.ranks import build_policy\nimport megatron_p2o.data",
        ),
        ("megatron_p2o.testing.fakes", "import megatron.core, sglang, megatron_p2o.evolve"),
        ("p2o_kernels.logprob.op", "import math, torch, triton.language\nfrom p2o_kernels.logprob import reference"),
    ],
)
def test_allowed_import_is_let_pass(module: str, source: str) -> None:
    assert violations(source, module) == []


def imports_of(paths: dict[str, Path]) -> dict[str, set[str]]:
    """Return for each module those it imports among `paths`."""
    found: dict[str, set[str]] = {}
    for module, path in paths.items():
        names = set(imported_names(path.read_text(), module, path.name == "__init__.py"))
        modules = {name if name in paths else name.rpartition(".")[0] for name in names}
        found[module] = {name for name in modules if name in paths and name != module}
    return found


def circles(imports: dict[str, set[str]]) -> set[str]:
    """Return the modules that are on a circle or lead to one: what is left when those that import nothing go."""
    left = {module: set(imported) for module, imported in imports.items()}
    while free := {module for module, imported in left.items() if not imported}:
        left = {module: imported - free for module, imported in left.items() if module not in free}
    return set(left)


def test_a_circle_of_imports_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set(), "e": {"d"}}) == {"a", "b", "c"}


def test_no_module_imports_itself_over_others() -> None:
    assert circles(imports_of({module_name(path): path for path in source_files()})) == set()


def test_a_folder_holds_at_most_a_dozen_files_and_the_top_ten_modules() -> None:
    counts = Counter(path.parent for path in source_files())
    assert {folder: count for folder, count in counts.items() if count > 12} == {}
    assert counts[ROOT / "megatron_p2o"] <= 11, "ten, and __init__"


def test_functions_and_files_stay_within_the_limits_that_contributing_names() -> None:
    long_functions = {
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in source_files()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or node.lineno) - node.lineno >= 60
        and ROOT / "kernels" not in path.parents
    }
    assert long_functions == set()
    assert {path for path in source_files() if path.read_text(encoding="utf-8").count("\n") > 600} == set()


def test_folder_of_the_kernels_is_no_package_of_that_name() -> None:
    # `kernels` is a package on PyPI that transformers imports: ours must never be found under that name.
    assert not (ROOT / "kernels" / "__init__.py").exists()
