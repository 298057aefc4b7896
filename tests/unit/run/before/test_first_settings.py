"""`p2o init`: the settings it writes are those that the dry run has passed."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_p2o.cli import BAD_INPUT, main
from megatron_p2o.config.read import load_config
from megatron_p2o.config.source import ConfigError
from megatron_p2o.run.before.draft import (
    DraftLine,
    drafted_config,
    given_settings,
    reward_lines,
    settings_text,
    size_lines,
)
from megatron_p2o.run.before.first_settings import TASKS, Wanted, completed, head_of, place_lines
from megatron_p2o.run.before.look import FileFacts, ModelFacts
from megatron_p2o.testing.tiny_model import write_tiny_qwen3

ROOT = Path(__file__).parents[4]

SUM = {"question": "What is 1+1?", "answer": "2"}
ROWS: Mapping[str, Mapping[str, Any]] = {
    "math": SUM,
    "exact": {"instruction": "Big Apple?", "gold": "New York"},
    "regex": {"question": "Which year?", "pattern": r"\d{4}"},
    "json_schema": {"question": "Ann is three.", "schema": {"type": "object"}, "expected": {"age": 3}},
    "python": {"question": "Write add.", "entry_point": "add", "tests": [{"args": [2, 3], "expected": 5}]},
    "reasoning_gym": {
        **{"question": "4 + 3 =", "answer": "7", "source": "chain_sum", "settings": {}},
        "metadata": {"source_dataset": "chain_sum", "source_index": 0},
    },
}
"""A row of each task."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("models") / "tiny", max_positions=1024)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_rows(path: Path, row: Mapping[str, Any], number: int = 40) -> Path:
    """Write `number` rows like `row`, each with an id of its own."""
    path.write_text("".join(json.dumps({"id": f"p{index}", **row}) + "\n" for index in range(number)))
    return path


@pytest.mark.parametrize("task", ROWS)
def test_what_is_written_for_a_task_passes_the_dry_run(
    task: str, model: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = write_rows(here / "problems.jsonl", ROWS[task])
    # Where bubblewrap is not installed, too.
    own = ["--set", "grading.arguments.sandbox=limits"] if task == "python" else []
    assert main(["init", "--model", str(model), "--problems", str(problems), "--task", task, *own]) == 0
    text = (here / "config.yaml").read_text()
    assert text.startswith("# ") and "40 in " in text and "2 layers, 1024 positions" in text
    config = load_config(here / "config.yaml")
    assert config.grading.function == task
    assert config.schedule.problems_per_step == 4 and config.hard.min_problems == 10
    assert config.rollout.max_new_tokens + config.evolution.max_template_tokens < 1024
    first = capsys.readouterr().out
    assert main(["train", "config.yaml", "--dry-run"]) == 0
    assert capsys.readouterr().out == first.partition("config.yaml written")[0]
    assert "not on this machine" not in first


def test_a_function_of_one_s_own_rewards_answers(model: Path, here: Path) -> None:
    (here / "reward.py").write_text("def length(problem, response, finish_reason):\n    return 0.5\n")
    problems = write_rows(here / "problems.jsonl", {"question": "Write a haiku."})
    given = ["--task", "reward.py:length", "--set", "run.name=haiku", "--set", "schedule.epochs=3"]
    assert main(["init", "--model", str(model), "--problems", str(problems), *given, "--output", "mine.yaml"]) == 0
    config = load_config(here / "mine.yaml")
    assert (config.run.name, config.schedule.epochs, config.data.answer_field) == ("haiku", 3, None)
    assert config.data.question_format == "{question}"


@pytest.mark.parametrize(
    ("row", "task", "message"),
    [
        (
            {"riddle": "?", "answer": "2"},
            "math",
            r"columns: id, riddle, answer\).*--set data.question_field=COLUMN",
        ),
        ({"question": "?"}, "math", r"no column that looks like a gold answer.*--set data.answer_field=COLUMN"),
        ({"question": "?"}, "regex", r"--set grading.arguments.pattern=... or --set grading.arguments.pattern_column"),
        (SUM, "judge", "--task judge needs --set grading.arguments.base_url="),
        (SUM, "no_such.py:reward", "no_such.py"),
        ({"question": "", "answer": "2"}, "math", "problems.jsonl:1: question is blank"),
    ],
    ids=["question", "answer", "pattern", "judge", "function", "blank"],
)
def test_what_is_missing_is_named_with_what_gives_it_and_nothing_is_written(
    row: Mapping[str, Any], task: str, message: str, model: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = write_rows(here / "problems.jsonl", row)
    assert main(["init", "--model", str(model), "--problems", str(problems), "--task", task]) == BAD_INPUT
    assert re.search(message, capsys.readouterr().err)
    assert not (here / "config.yaml").exists()


def test_a_column_that_is_named_is_taken(model: Path, here: Path) -> None:
    problems = write_rows(here / "problems.jsonl", {"riddle": "1+1?", "result": "2"})
    named = ["--set", "data.question_field=riddle", "--set", "data.answer_field=result"]
    assert main(["init", "--model", str(model), "--problems", str(problems), *named]) == 0
    assert load_config(here / "config.yaml").data.question_field == "riddle"


def test_settings_that_are_there_are_not_written_over(model: Path, here: Path) -> None:
    (here / "config.yaml").write_text("mine")
    problems = write_rows(here / "problems.jsonl", SUM)
    assert main(["init", "--model", str(model), "--problems", str(problems)]) == BAD_INPUT
    assert (here / "config.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("folder", "message"),
    [("models/Qwen3-0.6B", "hf download Qwen/Qwen3-0.6B --local-dir models/Qwen3-0.6B"), (".", "has no config.json")],
)
def test_a_model_that_is_not_there_is_named_with_the_command_that_gets_one(
    folder: str, message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = write_rows(here / "problems.jsonl", SUM)
    assert main(["init", "--model", folder, "--problems", str(problems)]) == BAD_INPUT
    assert message in capsys.readouterr().err


def test_what_is_open_is_asked_for_on_a_terminal_and_only_there(here: Path) -> None:
    (here / "models" / "tiny").mkdir(parents=True)
    (here / "models" / "tiny" / "config.json").touch()
    questions: list[str] = []

    def ask(question: str) -> str:
        questions.append(question)
        return replies[len(questions) - 1]

    replies = ["", "sums.jsonl", "", "exact"]
    found = completed(Wanted(), ask)
    assert found == Wanted(model="models/tiny", problems="sums.jsonl", task="exact")
    assert "[models/tiny]" in questions[0]
    assert completed(Wanted(model="m", problems="p"), None) == Wanted(model="m", problems="p", task="math")
    with pytest.raises(ValueError, match=r"needs --problems where there is no terminal"):
        completed(Wanted(model="m"), None)
    replies, questions = ["m", " ", "", ""], []
    with pytest.raises(ValueError, match="needs a model and problems"):
        completed(Wanted(), ask)


def test_what_an_option_gives_is_not_set_twice() -> None:
    with pytest.raises(ConfigError, match=r"data\.train is what --problems gives"):
        given_settings(["data.train=other.jsonl"])


def facts(num_positions: int) -> ModelFacts:
    return ModelFacts(
        path="models/Qwen3-4B",
        model_type="qwen3",
        num_parameters=4_022_468_096,
        num_layers=36,
        num_positions=num_positions,
        switches_thinking=True,
    )


@pytest.mark.parametrize(
    ("num_positions", "num_problems", "has_gpu", "expected"),
    [
        (40960, 5000, True, {}),
        (40960, 5000, False, {"rollout.max_new_tokens": 512}),
        (8192, 5000, True, {"rollout.max_new_tokens": 8192 - 100 - 1024}),
        (
            *(40960, 300, True),
            {"schedule.problems_per_step": 32, "schedule.problems_per_update": 32, "hard.min_problems": 72},
        ),
        (
            *(40960, 1, True),
            {"schedule.problems_per_step": 1, "schedule.problems_per_update": 1, "hard.min_problems": 2},
        ),
    ],
)
def test_sizes_follow_from_model_and_problems_where_the_defaults_do_not_fit(
    num_positions: int, num_problems: int, has_gpu: bool, expected: Mapping[str, int]
) -> None:
    lines = size_lines(facts(num_positions), num_problems, 100, {}, has_gpu=has_gpu)
    assert {".".join(line.name): line.value for line in lines} == expected


def test_a_model_without_room_for_a_response_is_refused() -> None:
    with pytest.raises(ValueError, match=r"longest prompt has about 500 tokens, and the 512 positions of model\.path"):
        size_lines(facts(512), 100, 500, {}, has_gpu=True)


def lines_of(file: FileFacts) -> Sequence[DraftLine]:
    places = place_lines(Wanted(model="models/Qwen3-4B", problems=file.path, heldout="heldout.jsonl"), has_gpu=True)
    return [*places, *reward_lines("math", file, {}), *size_lines(facts(40960), 640, 212, {}, has_gpu=True)]


def test_the_readme_shows_what_is_written() -> None:
    columns = ("id", "question", "answer")
    file = FileFacts(path="problems.jsonl", columns=columns, listed=(), question="question", answer="answer")
    text = settings_text(head_of(facts(40960), file, 640), lines_of(file))
    part = (ROOT / "README.md").read_text().partition("## Train your own")[2]
    assert part.partition("```yaml\n")[2].partition("```")[0] == text
    assert drafted_config(lines_of(file)).run.name == "Qwen3-4B-problems"


def test_the_help_names_every_task(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["init", "--help"])
    shown = capsys.readouterr().out
    assert not [task for task in TASKS if task not in shown]
