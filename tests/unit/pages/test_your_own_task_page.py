"""What docs/your_own_task.md shows is what `p2o init` writes and offers."""

import re
from pathlib import Path

import pytest
import torch

from megatron_p2o.cli import main
from megatron_p2o.run.before.draft import TASKS, drafted_config, reward_lines, settings_text, size_lines
from megatron_p2o.run.before.first_settings import Wanted, head_of, place_lines
from megatron_p2o.run.before.look import FileFacts, ModelFacts, look_at_file
from megatron_p2o.testing.tiny_model import write_tiny_qwen3

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "your_own_task.md").read_text(encoding="utf-8")

SMOLLM2 = ModelFacts(
    path="models/SmolLM2-135M-Instruct",
    model_type="llama",
    num_parameters=134_515_008,
    num_layers=30,
    num_positions=8192,
    switches_thinking=False,
)
"""What is read of the folder that tools/fetch_smollm2.py writes."""

NUM_PROBLEMS, LONGEST_PROMPT = 24, 57
TRAIN, HELDOUT = "examples/smollm2_cpu/train.jsonl", "examples/smollm2_cpu/heldout.jsonl"


def test_the_page_shows_what_its_command_writes() -> None:
    found = look_at_file(str(ROOT / TRAIN))
    file = FileFacts(path=TRAIN, columns=found.columns, listed=(), question=found.question, answer=found.answer)
    wanted = Wanted(model=SMOLLM2.path, problems=TRAIN, heldout=HELDOUT)
    lines = [
        *place_lines(wanted, has_gpu=False),
        *reward_lines("math", file, {}),
        *size_lines(SMOLLM2, NUM_PROBLEMS, LONGEST_PROMPT, {}, has_gpu=False),
    ]
    assert PAGE.partition("```yaml\n")[2].partition("```")[0] == settings_text(
        head_of(SMOLLM2, file, NUM_PROBLEMS), lines
    )
    assert f"p2o view runs/{drafted_config(lines).run.name}\n" in PAGE


def test_the_page_names_every_task() -> None:
    table = PAGE.partition("| your answers | `--task` |")[2].partition("\n\n")[0]
    assert re.findall(r"^\|[^|]*\| `([\w.:]+)`", table, flags=re.MULTILINE) == [*TASKS, "my_reward.py:reward"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the page shows a machine without a GPU")
def test_the_page_shows_every_line_of_the_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def subjects(printed: str) -> list[str]:
        return re.findall(r"^  (\S.*?)  +\S", printed, flags=re.MULTILINE)

    (tmp_path / "config.yaml").write_text(PAGE.partition("```yaml\n")[2].partition("```")[0])
    model = write_tiny_qwen3(tmp_path / "model", max_positions=8192)
    sets = {"model.path": model, "data.train": ROOT / TRAIN, "data.evaluation.heldout": ROOT / HELDOUT}
    overrides = [part for name, value in sets.items() for part in ("--set", f"{name}={value}")]
    assert main(["train", str(tmp_path / "config.yaml"), "--dry-run", *overrides]) == 0
    shown = PAGE.partition("problems and plan:\n")[2].partition("```")[0]
    assert subjects(capsys.readouterr().out) == subjects(shown)
