"""What README and docs claim and a program can check: names, commands, files and counts are those of the code."""

import ast
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from megatron_p2o.config.names import RENAMED
from megatron_p2o.config.source import annotation_at
from megatron_p2o.config.tree import Config
from megatron_p2o.data.chat import MAX_REPORTED_PROBLEMS
from megatron_p2o.evolve.search.publish import RoundStats
from megatron_p2o.metrics.compute import PREFIX, ComputeAccount, compute_metrics
from megatron_p2o.metrics.memory import ProcessMemory
from megatron_p2o.processes import HostMemory, RankMemory
from megatron_p2o.run.trials import round_statistics
from megatron_p2o.tiny.model import build_tokenizer, new_policy

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
        *(ROOT / "kernels").rglob("*.md"),
    ]
)
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
README = TEXTS["README.md"]
SOURCES = sorted((ROOT / "megatron_p2o").rglob("*.py"))

FILE_ENDINGS = ("py", "sh", "yaml", "md", "txt", "toml")


def quoted(text: str) -> list[str]:
    """Return what stands in backticks on one line, outside blocks of code."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def settings(text: str) -> set[str]:
    """Return what looks like a setting: `section.name`, alone or with a value, also of sections that were renamed."""
    sections = "|".join({*Config.__dataclass_fields__, *(name.partition(".")[0] for name in RENAMED)})
    pattern = re.compile(rf"((?:{sections})(?:\.[a-z_0-9A-Z]+)+)(?:[=: ].*)?$")
    return {found[1] for name in quoted(text) if (found := pattern.match(name)) and not is_file(found[1])}


def is_file(name: str) -> bool:
    return name.rpartition(".")[2] in (*FILE_ENDINGS, "jsonl", "json")


@pytest.mark.parametrize("page", TEXTS)
def test_every_setting_that_is_named_exists(page: str) -> None:
    unknown = {name for name in settings(TEXTS[page]) if annotation_at(tuple(name.split("."))) is None}
    assert not unknown


NO_METRICS = {"policy": "the files of a checkpoint", "run": "addresses of the page of `p2o view`"}
"""What other keys of mappings begin with, and what they name."""

ANYTHING = r"[\w<>]+"
"""Whatever is filled into a key."""


def pattern_of(node: ast.expr | None, constants: Mapping[str, str]) -> str:
    """Return a pattern for a string of the code, in which names of constants stand for their text; "" for no string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.escape(node.value)
    if isinstance(node, ast.Name):
        return re.escape(constants.get(node.id, ""))
    if isinstance(node, ast.FormattedValue):
        return pattern_of(node.value, constants) or ANYTHING
    if isinstance(node, ast.JoinedStr):
        return "".join(pattern_of(part, constants) for part in node.values)
    return ""


def key_patterns(source: str) -> set[str]:
    """Return a pattern for every key with a "/" of a mapping that a module makes."""
    tree = ast.parse(source)
    constants = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    keys: list[ast.expr | None] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            keys += node.keys
        elif isinstance(node, ast.DictComp):
            keys.append(node.key)
        elif isinstance(node, ast.Subscript):
            keys.append(node.slice)
    return {found for key in keys if re.match(r"[a-z]+/.", found := pattern_of(key, constants))}


ROUND = RoundStats(
    epoch=0, library_version=1, ended_by="budget", num_hard=2, plain_coverage=0.5, outcomes={}, task="<task>"
)

NAMED = {
    *compute_metrics(ComputeAccount()),
    *(f"task/{name}" if "/" in name else f"evolution/{name}" for name in round_statistics([ROUND])),
}
"""Keys that the code makes of other names."""


def written_keys() -> list[re.Pattern[str]]:
    """Return patterns of the metrics that the code writes."""
    found = {key for source in SOURCES for key in key_patterns(source.read_text(encoding="utf-8"))}
    made = {f"compute/{ANYTHING}", f"evolution/{ANYTHING}", f"task/{ANYTHING}/{ANYTHING}"}
    assert made <= found, made - found
    assert all(any(key.startswith(f"{area}/") for key in found) for area in NO_METRICS)
    named = {re.escape(key) for key in NAMED}
    return [re.compile(key) for key in sorted((found - made) | named) if key.partition("/")[0] not in NO_METRICS]


KEYS = written_keys()

AREAS = sorted({key.pattern.partition("/")[0] for key in KEYS})
"""What a metric's key begins with."""


METRIC = re.compile(rf"(?:{'|'.join(AREAS)})/[a-zA-Z_0-9<>]+(?:/[a-zA-Z_0-9<>]+)?")


def metrics(text: str) -> set[str]:
    return {name for name in quoted(text) if METRIC.fullmatch(name)}


def entries(text: str) -> dict[str, list[str]]:
    """Return the cells after the first by each name in it, of all tables whose first column is headed `key`."""
    found: dict[str, list[str]] = {}
    for table in re.findall(r"^\| key \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, flags=re.MULTILINE):
        for line in table.splitlines():
            first, *cells = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
            found |= dict.fromkeys(quoted(first), cells)
    return found


ENTRIES = entries(TEXTS["docs/metrics.md"])


def test_names_are_found_where_they_stand() -> None:
    text = "`train/loss` and `optimizer.lr=1e-6`, `tools/x.py`, `config.py`, `compute/gpu_h`"
    assert (metrics(text), settings(text)) == ({"train/loss", "compute/gpu_h"}, {"optimizer.lr"})
    for unknown in ("train/lost", "compute/lost", "evolution/lost", "task/<task>/lost", "hint/lost", "template/lost"):
        assert metrics(f"`{unknown}`") and not any(pattern.fullmatch(unknown) for pattern in KEYS), unknown
    table = "| key | is | healthy |\n|---|---|---|\n| `a/b`, `a/c` | π(y\\|x) | |\n\n| key |\n|---|\n| `a/d` |\n"
    assert entries(table) == {"a/b": [r"π(y\|x)", ""], "a/c": [r"π(y\|x)", ""], "a/d": []}
    everywhere = "\n".join(TEXTS.values())
    assert len(metrics(everywhere)) > 5 and len(settings(everywhere)) > 50


@pytest.mark.parametrize("page", TEXTS)
def test_every_metric_that_is_named_is_written_by_the_code(page: str) -> None:
    # `eval/<set>` is what the console calls `eval/<set>/avg`.
    written = {
        name for name in metrics(TEXTS[page]) for key in KEYS if key.fullmatch(name) or key.fullmatch(f"{name}/avg")
    }
    assert not metrics(TEXTS[page]) - written


def test_every_metric_is_explained() -> None:
    page = set(ENTRIES)
    keys = {pattern.pattern for pattern in KEYS}
    assert {key for key in keys if "[" not in key} <= {re.escape(name) for name in page}
    # A key with a part that is filled in is explained by a name, or by all the names it becomes.
    filled = {key for key in keys if "[" in key}
    assert not {key for key in filled if not any(re.fullmatch(key, name) for name in page)}
    memory = RankMemory(host=HostMemory(resident_bytes=1, peak_bytes=1), gpu_peak_bytes=1)
    others = {"graders": memory.host, "evolution": memory.host}
    of_memory = ProcessMemory().metrics([memory], [memory.host], others, {})
    assert {re.sub(r"_\d+_", "_<i>_", key) for key in of_memory} <= page


def test_every_metric_says_what_is_healthy_and_what_to_do() -> None:
    for name, cells in ENTRIES.items():
        # What a run has spent is neither healthy nor ill; a sentence above their table says so.
        assert len(cells) == (1 if name.startswith(PREFIX) else 3) and all(cells), name


@pytest.mark.parametrize("page", TEXTS)
def test_every_file_of_the_repository_that_is_named_exists(page: str) -> None:
    folders = ("megatron_p2o", "kernels", "docs", "examples", "tools", "tests", "requirements")
    text = re.sub(r"```.*?```", "", TEXTS[page], flags=re.DOTALL)
    linked = {target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target}
    missing = {target for target in linked - {""} if not (ROOT / page).parent.joinpath(target).exists()}
    named = {name.split()[0] for name in quoted(text) if name.startswith(tuple(f"{folder}/" for folder in folders))}
    plain = {name for name in named if re.fullmatch(r"[\w./-]+", name)}
    missing |= {name for name in plain if not ((ROOT / name).exists() or (ROOT / page).parent.joinpath(name).exists())}
    assert not missing


def test_the_files_of_a_run_are_called_as_the_readme_says() -> None:
    (paragraph,) = re.findall(r"A run directory holds.*?\n\n", README, flags=re.DOTALL)
    names = [name.rstrip("/") for name in re.findall(r"`([\w.-]+/?)`", paragraph)]
    assert len(names) >= 8
    strings = {
        node.value.split("/")[0]
        for source in SOURCES
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert set(names) <= strings


def test_the_dry_run_names_as_many_problems_as_the_data_page_says() -> None:
    assert f"names the first {MAX_REPORTED_PROBLEMS} problems whose prompt exceeds" in TEXTS["docs/data.md"]


def test_the_tiny_policy_has_as_many_parameters_as_is_said() -> None:
    said = f"{new_policy(build_tokenizer(), seed=1).num_parameters():,} parameters"
    for path in (
        ROOT / "README.md",
        ROOT / "examples" / "tiny_cpu" / "base.yaml",
        ROOT / "megatron_p2o" / "tiny" / "model.py",
    ):
        assert said in " ".join(path.read_text(encoding="utf-8").split()), path
