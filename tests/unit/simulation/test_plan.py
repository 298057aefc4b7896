"""`p2o plan`: from a settings file to lines of memory and time."""

import json
import re
from pathlib import Path

import pytest

from megatron_p2o.cli import main
from megatron_p2o.testing.tiny_model_types import QWEN3_4B

SETTINGS = """
run: {{name: planned}}
model: {{path: {model}, dtype: bfloat16}}
parallel: {{distributed_optimizer: true}}
data: {{train: {problems}}}
rollout: {{num_engines: 8, group_size: 4, max_new_tokens: 512}}
schedule: {{problems_per_step: 8, problems_per_update: 8, epochs: 3}}
hard: {{min_problems: 2}}
megatron: {{recompute_granularity: full, recompute_method: uniform, recompute_num_layers: 1}}
evolution:
  max_rollouts: 100
  dev_size: 10
  num_lineages: 2
  reflection: {{backend: openai, base_url: http://localhost/v1, model: m}}
"""


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(QWEN3_4B))
    rows = [json.dumps({"question": f"q {index}", "answer": "1"}) for index in range(40)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    path = tmp_path / "run.yaml"
    path.write_text(SETTINGS.format(model=tmp_path / "model", problems=tmp_path / "train.jsonl"))
    return path


def test_a_plan_tells_memory_the_seconds_of_a_step_and_the_hours_of_the_run(
    settings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(settings), "--gpus", "8x80", "--response-tokens", "100", "--steps", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    text = "\n".join(lines)
    assert "memory of a GPU, sampling: parameters 7.5" in text
    found = re.search(r"step without evolution: (\d+) s = generation (\d+) \+ update (\d+) \+ refresh (\d+);", text)
    assert found is not None
    step, *phases = map(int, found.groups())
    assert abs(step - sum(phases)) <= 2, "each is rounded"
    assert re.search(r"step beside a round: .* training tokens/s a GPU; engines idle \d+% of the generation", text)
    assert re.search(r"price -?\d+\.\d\d \(1: training waits for it\)", text)
    # 40 problems in steps of 8, three times.
    assert re.search(r"run without evolution: 15 steps, \d+\.\d h, \d+ GPU-hours", text)
    assert re.search(r"run, rounds beside training \(evolution.beside_training\): 15 steps", text)


def test_a_plan_without_evolution_has_one_kind_of_step(settings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", str(settings), "--gpus", "8x80", "--response-tokens", "100", "--set", "evolution.enabled=false"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "beside" not in text and "price" not in text
    assert re.search(r"^run: 15 steps, ", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--gpus", "many"], "--gpus=many must be GPUS-OF-A-NODExGIB-OF-EACH"),
        (["--gpus", "8x24"], "does not fit a GPU"),
        (["--gpus", "8x160"], "no speed is known of a GPU of 160 GiB"),
        (["--gpus", "8x80", "--problems", "3"], "schedule.problems_per_step=8 exceeds the 3 problems of an epoch"),
        (["--gpus", "8x80", "--steps", "0"], "--steps=0 must be at least 1"),
        (["--gpus", "8x80", "--hard-share", "2"], "hard_share=2.0 must be in [0, 1]"),
        (["--gpus", "8x80", "--hardware", "/nowhere.json"], "/nowhere.json"),
        (
            ["--gpus", "8x80", "--set", "data.train=/nowhere.jsonl"],
            "say how many problems an epoch has with --problems",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused_with_the_remedy(
    settings: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(settings), *arguments]) == 2
    assert told in capsys.readouterr().err
