"""What docs/your_own_task.md shows is what `p2o init` writes and offers."""

import re
from pathlib import Path

from megatron_p2o.run.before.draft import TASKS, drafted_config, reward_lines, settings_text, size_lines
from megatron_p2o.run.before.first_settings import Wanted, head_of, place_lines
from megatron_p2o.run.before.look import FileFacts, ModelFacts, look_at_file

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
