"""Rows in the schemas that data sets are published in."""

import csv
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_p2o.config.tree import DataConfig, EvaluationSetConfig, TaskConfig, one_task
from megatron_p2o.data.columns import field_at
from megatron_p2o.data.problems import load_problems
from megatron_p2o.data.tasks import column_lines, set_problems, task_problems
from megatron_p2o.types import Problem

DATA = DataConfig(train=one_task("unused"))

VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "user", "content": "What is 6 x 7?"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "42"},
    "extra_info": {"split": "train", "index": 7},
}
"""A row as verl's and DAPO's preparation scripts write it."""


def write(directory: Path, *rows: dict[str, Any], name: str = "rows.jsonl") -> Path:
    path = directory / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def only(path: Path, data: DataConfig = DATA) -> Problem:
    (problem,) = load_problems(path, data)
    return problem


@pytest.mark.parametrize(
    ("row", "asked", "answer"),
    [
        (VERL, ("", "What is 6 x 7?"), "42"),
        ({"problem": "1+1", "final_answer": 2}, ("", "1+1"), "2"),
        ({"question": "1+1", "problem": "no", "answer": "2", "final_answer": "no"}, ("", "1+1"), "2"),
        ({"question": "clips?", "answer": "48/2 = 24\n#### 72"}, ("", "clips?"), "72"),
        ({"prompt": "1+1", "answer": "2"}, ("", "1+1"), "2"),
        ({"prompt": json.dumps([{"role": "user", "content": "1+1"}], indent=1), "answer": "2"}, ("", "1+1"), "2"),
        ({"prompt": "[{1}, {2}]: how many sets?", "answer": "2"}, ("", "[{1}, {2}]: how many sets?"), "2"),
        (
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1"}]},
                    {"role": "assistant", "content": "two"},
                ],
                "answer": "2",
            },
            ("Be brief.", "1+1"),
            "2",
        ),
    ],
)
def test_published_schemas_are_read_without_settings(
    tmp_path: Path, row: dict[str, Any], asked: tuple[str, str], answer: str
) -> None:
    problem = only(write(tmp_path, row))
    assert ((problem.system_prompt, problem.question), problem.answer) == (asked, answer)
    assert problem.columns == row


def test_dotted_names_lead_into_nested_columns(tmp_path: Path) -> None:
    settings = replace(DATA, id_field="extra_info.index", answer_field="extra_info.split")
    problem = only(write(tmp_path, VERL), settings)
    assert (problem.id, problem.answer, problem.source) == ("7", "train", "openai/gsm8k")


@pytest.mark.parametrize(
    ("row", "name", "expected"),
    [
        ({"a.b": 1, "a": {"b": 2}}, "a.b", 1),
        ({"a": {"b": {"c": 3}}}, "a.b.c", 3),
        ({"a": '{"b": 4}'}, "a.b", 4),
        ({"a": '{"b": 4'}, "a.b", None),
        ({"a": [1]}, "a.0", None),
        ({}, "a.b", None),
    ],
)
def test_value_of_a_dotted_column(row: dict[str, Any], name: str, expected: object) -> None:
    assert field_at(row, name) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"q": 1}, "has no 'question' (data.question_field); its fields are q"),
        ({"question": "q"}, "has no 'answer' (data.answer_field, null where there is none); its fields are question"),
        ({"messages": [], "answer": 1}, "messages holds 0 user and 0 system messages, must hold one question"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "answer": 1},
            "messages holds 2 user and 0 system messages, must hold one question",
        ),
        ({"messages": [{"role": "user", "content": " "}], "answer": 1}, "messages asks nothing"),
        (
            {"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}], "answer": 1},
            "messages holds a message of the assistant before the question",
        ),
        ({"prompt": "[{'role': 'user', 'content': '1+1'}]", "answer": 1}, "conversation which is not JSON"),
        ({"messages": [{"role": "user"}], "answer": 1}, "must hold messages like"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "x"}]}], "answer": 1},
            "must hold messages like",
        ),
    ],
)
def test_a_row_that_asks_nothing_is_bad(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        load_problems(write(tmp_path, row), DATA)
    assert message in str(error.value)


def test_the_same_rows_as_csv_parquet_and_arrow(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is optional: pip install pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is optional: pip install pyarrow")
    rows = [{**VERL, "extra_info": {"split": "train", "index": number}} for number in range(3)]
    settings = replace(DATA, id_field="extra_info.index")
    expected = load_problems(write(tmp_path, *rows), settings)
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pyarrow.ipc.new_file(tmp_path / "rows.feather", table.schema) as writer:
        writer.write_table(table)
    with pyarrow.ipc.new_stream(tmp_path / "rows.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("rows.parquet", "rows.feather", "rows.arrow"):
        assert load_problems(tmp_path / name, settings) == expected, name
    with (tmp_path / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(VERL)
        writer.writerows(
            [json.dumps(cell) if isinstance(cell, dict | list) else cell for cell in row.values()] for row in rows
        )
    as_text = load_problems(tmp_path / "rows.csv", settings)
    assert [replace(problem, columns={}) for problem in as_text] == [replace(each, columns={}) for each in expected]


@pytest.mark.parametrize("name", ["rows.feather", "rows.arrow"])
def test_a_damaged_arrow_file_is_named(tmp_path: Path, name: str) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is optional: pip install pyarrow")
    begin = b"ARROW1\0\0" if name == "rows.feather" else b"\xff\xff\xff\xff"
    (tmp_path / name).write_bytes(begin + b"x" * 50)
    with pytest.raises(ValueError, match=rf"{name} is a damaged Arrow file"):
        load_problems(tmp_path / name, DATA)


def test_rows_of_a_table_of_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('\ufeffid,question,answer,level\n1,"a, ""b""\nc",2,\n\n2,q,3,hard\n')
    first, second = load_problems(path, DATA)
    assert (first.id, first.question, first.answer, first.level) == ("1", 'a, "b"\nc', "2", "")
    assert (second.id, second.level) == ("2", "hard")
    (tmp_path / "rows.tsv").write_text("question\tanswer\nq, r\t3\n")
    assert only(tmp_path / "rows.tsv").question == "q, r"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("question,answer\nq\n", "rows.csv:2: has 1 cells under 2 column names"),
        ("question,answer\na,b,c\n", "rows.csv:2: has 3 cells under 2 column names"),
        ("question,question\nq,a\n", "two columns have the same name"),
        ('question,answer\n"q,a\n', "is no table of text"),
        ("question,answer\n,a\n", "rows.csv:2: has no 'question'"),
    ],
)
def test_a_bad_table_of_text_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(ValueError) as error:
        load_problems(tmp_path / "rows.csv", DATA)
    assert message in str(error.value)


def test_a_task_has_columns_of_its_own_and_a_set_those_of_its_task(tmp_path: Path) -> None:
    math = write(tmp_path, {"id": "m", "question": "1+1", "answer": "2"}, name="math.jsonl")
    code = write(tmp_path, {"uid": "c", "task": "sort", "tests": ["t"]}, name="code.jsonl")
    own = TaskConfig(
        file=str(code), id_field="uid", question_field="task", answer_field="", system_prompt="Write code."
    )
    data = DataConfig(
        train={"math": TaskConfig(file=str(math)), "code": own},
        evaluation={
            "held": EvaluationSetConfig(file=str(code), task="code"),
            "aime": EvaluationSetConfig(file=str(math)),
        },
        system_prompt="Think.",
    )
    found = {name: problems[0] for name, problems in task_problems(data).items()}
    assert (found["math"].task, found["math"].system_prompt, found["math"].answer) == ("math", "Think.", "2")
    assert (found["code"].id, found["code"].question, found["code"].answer) == ("c", "sort", None)
    assert (found["code"].task, found["code"].system_prompt) == ("code", "Write code.")
    assert set_problems(data, "held") == [found["code"]]
    assert set_problems(data, "aime") == [replace(found["math"], task="")]
    assert column_lines(data) == [
        "data.train.math: question `question`, gold answer `answer`, id `id` or a hash of the question",
        "data.train.code: question `task`, gold answer none, id `uid` or a hash of the question",
        "data.evaluation.held: question `task`, gold answer none, id `uid` or a hash of the question",
        "data.evaluation.aime: question `question`, gold answer `answer`, id `id` or a hash of the question",
    ]


@pytest.mark.parametrize(
    ("cell", "hints"),
    [
        ("Look twice. ", ("Look twice.",)),
        (["weak", " strong\n"], ("weak", "strong")),
        ('["weak", "strong"]', ("weak", "strong")),
        ("[Look] twice", ("[Look] twice",)),
        *((nothing, ()) for nothing in (None, "", " ", [], "[]")),
    ],
)
def test_hints_are_a_text_or_a_list_of_texts(cell: object, hints: tuple[str, ...], tmp_path: Path) -> None:
    path = write(tmp_path, {"question": "q", "answer": "2", "hints": cell})
    assert only(path, replace(DATA, hints_field="hints")).hints == hints
    assert only(path).hints == only(path, replace(DATA, hints_field="clues")).hints == ()
    nested = write(tmp_path, {"question": "q", "answer": "2", "extra_info": {"hints": cell}}, name="nested.jsonl")
    assert only(nested, replace(DATA, hints_field="extra_info.hints")).hints == hints
    task = DataConfig(train={"own": TaskConfig(file=str(path), hints_field="hints")})
    assert load_problems(path, task, "own")[0].hints == hints
    assert column_lines(task)[0].endswith("hash of the question, hints `hints`")
    shown = DataConfig(
        train={"own": TaskConfig(file=str(path), demonstrations_field="hints")},
        evaluation={"set": EvaluationSetConfig(file=str(path))},
    )
    problem = load_problems(path, shown, "own")[0]
    assert tuple(text.strip() for text in problem.demonstrations) == hints and problem.hints == ()
    assert [line.rpartition(", ")[2] for line in column_lines(shown)] == [
        "demonstrations `hints`",
        "id `id` or a hash of the question",
    ]
    assert set_problems(shown, "set")[0].demonstrations == (), "it is asked plainly"


def test_the_first_blanks_of_a_demonstration_stay(tmp_path: Path) -> None:
    path = write(tmp_path, {"question": "q", "answer": "2", "shown": ["    return 2"]})
    assert only(path, replace(DATA, demonstrations_field="shown")).demonstrations == ("    return 2",)
    assert only(path, replace(DATA, hints_field="shown")).hints == ("return 2",)


def test_what_an_evaluation_set_brings_beside_its_questions_cannot_refuse_it(tmp_path: Path) -> None:
    path = write(tmp_path, {"question": "q", "answer": "2", "shown": [{"role": "assistant"}]})
    sets = {"set": EvaluationSetConfig(file=str(path))}
    for column in ("hints_field", "demonstrations_field"):
        data = replace(DATA, evaluation=sets, **{column: "shown"})
        assert [problem.question for problem in set_problems(data, "set")] == ["q"]
        with pytest.raises(ValueError, match="must be a text, or a list of texts"):
            load_problems(path, data)


@pytest.mark.parametrize("cell", [7, {"weak": "look"}, ["look", ""], ["look", 7], [["look"]], '["look", null]'])
def test_hints_that_are_no_texts_make_a_bad_row(cell: object, tmp_path: Path) -> None:
    path = write(tmp_path, {"question": "q", "answer": "2", "hints": cell})
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: hints=.* must be a text, or a list of texts"):
        load_problems(path, replace(DATA, hints_field="hints"))


def test_ids_that_two_tasks_share_are_an_error_that_names_both_files(tmp_path: Path) -> None:
    files = [write(tmp_path, {"id": "same", "question": name, "answer": "2"}, name=f"{name}.jsonl") for name in "ab"]
    data = DataConfig(train={path.stem: TaskConfig(file=str(path)) for path in files})
    with pytest.raises(
        ValueError, match=r"data\.train\.b\.file=.*b\.jsonl has 1 ids that .*a\.jsonl has, too \(same\)"
    ):
        task_problems(data)


def test_a_long_gold_answer_is_warned_of_in_any_schema(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    long = {**VERL, "reward_model": {"ground_truth": "first\nsecond"}}
    with caplog.at_level(logging.WARNING):
        load_problems(write(tmp_path, long), DATA)
    assert "or several lines" in caplog.text and "rows 1" in caplog.text
