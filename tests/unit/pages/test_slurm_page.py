"""What docs/slurm.md and docs/install.md say of variables, caches and disk is what scripts and program do."""

import json
import re
from pathlib import Path

import pytest

from megatron_p2o.config.read import load_config
from megatron_p2o.machine.memory.plan import GIB
from megatron_p2o.machine.preflight import checkpoint_bytes, num_checkpoints, rollout_bytes
from megatron_p2o.policy.model.architecture import read_architecture
from megatron_p2o.testing.tiny_model_types import QWEN3_4B

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "slurm.md").read_text(encoding="utf-8")
INSTALL_PAGE = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
VARIABLE = re.compile(r"\bP2O_[A-Z_]*[A-Z]\b")

BETWEEN_PROCESSES = {"P2O_SECRET_NAMES", "P2O_STORE_FILE"}
"""Variables by which the program's own processes talk to one another."""

QWEN3_32B = {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64}
MODELS = {"Qwen3-4B": QWEN3_4B, "Qwen3-32B": QWEN3_4B | QWEN3_32B | {"tie_word_embeddings": False}}
NUM_PROBLEMS = 5000
DISK_HEAD = (
    "| settings | nodes x GPUs | model | steps | its weights | checkpoints | rollouts, at most | a step | a round "
    "| the run, as set |"
)


def variables_in(folder: str, *patterns: str) -> set[str]:
    files = [path for pattern in patterns for path in (ROOT / folder).glob(pattern)]
    assert files
    return {name for path in files for name in VARIABLE.findall(path.read_text(encoding="utf-8"))}


def tabled(page: str, head: str) -> list[list[str]]:
    """Return the cells of the table with this head, by rows."""
    rows = page.partition(f"{head}\n|")[2].partition("\n\n")[0].splitlines()[1:]
    assert rows, head
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_every_variable_that_scripts_and_program_read_is_explained_and_no_other() -> None:
    read = variables_in("examples", "**/*.sh", "**/*.yaml") | variables_in("megatron_p2o", "**/*.py")
    rows = tabled(PAGE, "| variable | what | default |")
    assert {row[0].strip("`") for row in rows} == read - BETWEEN_PROCESSES
    assert all(all(row) for row in rows)


def test_every_variable_of_the_installers_is_explained() -> None:
    rows = tabled(INSTALL_PAGE, "| variable | what | default |")
    assert {row[0].strip("`") for row in rows} == variables_in("tools", "install_*.sh")


def test_the_caches_are_those_that_the_launcher_sets() -> None:
    launcher = (ROOT / "examples" / "slurm" / "launch.sh").read_text(encoding="utf-8")
    assert {row[0].strip("`") for row in tabled(PAGE, "| variable | of |")} == set(
        re.findall(r'\b([A-Z_]+)="\$cache', launcher)
    )


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*_qwen3_*.sh")), ids=lambda path: path.stem)
def test_the_scripts_leave_to_the_user_what_the_page_says(script: Path) -> None:
    header = re.findall(r"^#SBATCH --([a-z-]+)", script.read_text(encoding="utf-8"), flags=re.MULTILINE)
    own = {"account", "partition", "qos", "reservation", "constraint", "gres"}
    assert not own & set(header) and {"gpus-per-node", "exclusive", "mem", "signal"} <= set(header)
    assert {f"--{name}" for name in own} <= set(re.findall(r"`(--[a-z-]+)=", PAGE))


@pytest.mark.parametrize("row", tabled(PAGE, DISK_HEAD), ids=lambda row: row[0].strip("`"))
def test_the_disk_of_an_example_is_that_of_the_preflight(row: list[str], tmp_path: Path) -> None:
    name, _, model, steps, weights, checkpoints, rollouts, *_ = row
    (tmp_path / "config.json").write_text(json.dumps(MODELS[model]))
    config = load_config(ROOT / "examples" / f"{name.strip('`')}.yaml", [f"model.path={tmp_path}"])
    assert Path(load_config(ROOT / "examples" / f"{name.strip('`')}.yaml").model.path).name == model
    architecture = read_architecture(tmp_path)
    num_steps = NUM_PROBLEMS // config.schedule.problems_per_step * config.schedule.epochs
    one = checkpoint_bytes(architecture, config.model.dtype)
    assert steps == str(num_steps)
    assert weights == f"{one / 14 * 2 / GIB:.1f} GiB"
    assert checkpoints == f"{num_checkpoints(config)} x {one / GIB:.0f} GiB"
    assert rollouts == f"{rollout_bytes(config, num_steps) / GIB:.0f} GiB"
