"""One name for one idea: no class and no public function has a namesake, and CONTRIBUTING's words are where it says."""

import ast
import importlib
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = (ROOT / "megatron_p2o", ROOT / "kernels" / "p2o_kernels")

PROGRAMS = ("megatron_p2o/rewards/sandbox/inside/",)
"""Run as files in another process that cannot import the package: their names are of a tree of their own."""

SHARED = {
    "main": "the entry of each program",
    "register": "the entry of each SGLang plugin, named in entry_points.txt",
}
"""Names that several modules may have, and why."""

TABLE = (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition("## Words")[2].partition("\n## ")[0]
PLACES = re.findall(r"`([\w.]+)` in `([\w/]+)\.py`", TABLE)
"""(name, module's path) of each word in CONTRIBUTING's table."""


def names_of_ideas(source: str) -> list[str]:
    """Return the classes that a module defines, and its functions whose names do not begin with an underscore."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [
        node.name
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) or (isinstance(node, functions) and not node.name.startswith("_"))
    ]
    return list(dict.fromkeys(found))


def namesakes(sources: dict[str, str]) -> dict[str, list[str]]:
    """Return each name that more than one of `sources` (path to text) defines, with their paths."""
    places: dict[str, list[str]] = defaultdict(list)
    for path, source in sources.items():
        for name in names_of_ideas(source):
            places[name].append(path)
    return {name: paths for name, paths in places.items() if len(paths) > 1}


def sources_of_the_tree() -> dict[str, str]:
    paths = [path for package in PACKAGES for path in sorted(package.rglob("*.py"))]
    by_name = {str(path.relative_to(ROOT)): path for path in paths}
    return {name: path.read_text("utf-8") for name, path in by_name.items() if not name.startswith(PROGRAMS)}


def test_no_two_classes_and_no_two_public_functions_share_a_name() -> None:
    found = namesakes(sources_of_the_tree())
    unexpected = {name: paths for name, paths in found.items() if name not in SHARED}
    assert not unexpected, "one idea needs one name, and another idea another one"
    assert set(SHARED) <= set(found), "an exception that nothing needs any more"


def test_a_namesake_is_found_whatever_it_is() -> None:
    sources = {"a.py": "class Round: ...\ndef _own(): ...", "b.py": "async def Round(): ...\ndef _own(): ..."}
    assert namesakes(sources) == {"Round": ["a.py", "b.py"]}
    assert namesakes({"a.py": "class _Walk: ...", "b.py": "class _Walk: ..."}) == {"_Walk": ["a.py", "b.py"]}
    assert not namesakes({"a.py": "def one(): ...\ndef one(x): ..."}), "overloads stand in one module"


def test_sandbox_programs_import_nothing_of_the_package() -> None:
    for folder in PROGRAMS:
        for path in (ROOT / folder).glob("*.py"):
            assert "megatron_p2o" not in re.findall(r"^(?:from|import) (\w+)", path.read_text("utf-8"), re.MULTILINE)


@pytest.mark.parametrize(("name", "module"), PLACES)
def test_each_word_of_the_glossary_is_where_the_table_says(name: str, module: str) -> None:
    found = importlib.import_module(f"megatron_p2o.{module.replace('/', '.')}")
    for part in name.split("."):
        found = getattr(found, part)


def test_the_table_of_words_is_read() -> None:
    rows = re.findall(r"^\| .+ in `.+` \|$", TABLE, re.MULTILINE)
    assert len(PLACES) >= len(rows) > 20


def test_no_docstring_is_a_fragment_that_begins_with_of() -> None:
    sources = [path for folder in (*PACKAGES, ROOT / "tools", ROOT / "examples") for path in folder.rglob("*.py")]
    fragments = re.compile(r'^\s*"""Of \w.*', re.MULTILINE)
    assert not {str(path): found for path in sources if (found := fragments.findall(path.read_text("utf-8")))}
