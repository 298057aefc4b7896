"""Reading problems: which rows count, what is said of the others."""

import json
import logging
from pathlib import Path

import pytest

from megatron_p2o.config.tree import DataConfig, one_task
from megatron_p2o.data.problems import load_problems, question_id
from megatron_p2o.types import Problem

DATA = DataConfig(train=one_task("unused"))
SKIPPING = DataConfig(train=one_task("unused"), skip_bad_rows=True)


def write_lines(directory: Path, *lines: str | bytes) -> Path:
    path = directory / "problems.jsonl"
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines) + b"\n")
    return path


def row(number: int, **more: object) -> str:
    return json.dumps({"id": f"p{number}", "question": f"q{number}", "answer": str(number), **more})


def refused(path: Path, settings: DataConfig = DATA) -> list[str]:
    """Return the lines of the error, without the directory and without the remedy at the end."""
    with pytest.raises(ValueError) as error:
        load_problems(path, settings)
    lines = str(error.value).replace(f"{path.parent}/", "").splitlines()
    assert "data.skip_bad_rows=true" in lines[-1]
    return lines[:-1]


def test_rows_become_problems_in_file_order(tmp_path: Path) -> None:
    path = write_lines(tmp_path, row(2, level=3, source="algebra", other=[1]), "", row(1, answer=7))
    second, first = load_problems(path, DATA)
    columns = {"id": "p2", "question": "q2", "answer": "2", "level": 3, "source": "algebra", "other": [1]}
    assert second == Problem(id="p2", question="q2", answer="2", level="3", source="algebra", columns=columns)
    assert first == Problem(id="p1", question="q1", answer="7", columns={"id": "p1", "question": "q1", "answer": 7}), (
        "a whole number is text as the gold answer and itself among the columns"
    )


def test_problems_without_gold_answers_keep_their_columns(tmp_path: Path) -> None:
    path = write_lines(tmp_path, '{"question": "q", "tests": ["assert f(1) == 2"], "answer": null}')
    (problem,) = load_problems(path, DataConfig(train=one_task("unused"), answer_field=None))
    assert problem.answer is None and problem.columns["tests"] == ["assert f(1) == 2"]
    assert len({problem, problem}) == 1, "a problem can be a key"


def test_fields_are_named_by_the_settings(tmp_path: Path) -> None:
    path = write_lines(tmp_path, '{"uid": 12, "problem": "1+1", "gold": "2", "question": "wrong", "id": "wrong"}')
    settings = DataConfig(train=one_task("unused"), id_field="uid", question_field="problem", answer_field="gold")
    (problem,) = load_problems(path, settings)
    assert (problem.id, problem.question, problem.answer) == ("12", "1+1", "2")


def test_row_without_an_id_is_known_by_the_hash_of_its_question(tmp_path: Path) -> None:
    path = write_lines(tmp_path, '{"question": "é?", "answer": "1"}', '{"id": null, "question": "b", "answer": "1"}')
    # printf 'é?' | sha256sum
    assert [problem.id for problem in load_problems(path, DATA)] == ["a345ee1366118e8a", question_id("b")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON (Expecting property name enclosed in double quotes at column 2)"),
        ("[" * 100_000, "is nested too deeply"),
        ("[1]", 'must be a JSON object such as {"question": ..., "answer": ...}'),
        ('{"answer": "1"}', "has no 'question' (data.question_field); its fields are answer"),
        ("{}", "has no 'question' (data.question_field); its fields are none"),
        (
            '{"question": "q", "answer": null}',
            "has no 'answer' (data.answer_field, null where there is none); its fields are question, answer",
        ),
        ('{"question": " ", "answer": "1"}', "question is blank"),
        ('{"question": "q", "answer": ""}', "answer is blank"),
        ('{"question": "q", "answer": 0.1}', "answer=0.1 must be text or a whole number: put it in quotes"),
        ('{"question": "q", "answer": true}', "answer=True must be text or a whole number: put it in quotes"),
        (
            '{"question": ["q"], "answer": "1"}',
            "question holds 'q', must hold messages like {'role': 'user', 'content': 'text'}",
        ),
        ('{"id": 1.5, "question": "q", "answer": "1"}', "id=1.5 must be text or a whole number: put it in quotes"),
        (b'{"question": "\xff", "answer": "1"}', "is not UTF-8 (byte 15 of the line): convert the file"),
        (row(1), "id=p1 is already the id of line 1: make ids unique"),
    ],
)
def test_bad_row_is_named_with_its_line_and_the_rule(tmp_path: Path, line: str | bytes, message: str) -> None:
    path = write_lines(tmp_path, row(1), "", line, row(2))
    assert refused(path) == [f"problems.jsonl:3: {message}"]


def test_same_question_twice_without_ids_is_an_error(tmp_path: Path) -> None:
    path = write_lines(tmp_path, '{"question": "q", "answer": "1"}', '{"question": "q", "answer": "2"}')
    assert refused(path) == [
        "problems.jsonl:2: asks the same question as line 1: remove one, or give both a 'id'",
    ]


def test_every_bad_row_is_listed_up_to_twenty_then_counted(tmp_path: Path) -> None:
    path = write_lines(tmp_path, *["{}"] * 20)
    assert [line.split(":")[1] for line in refused(path)] == [str(number) for number in range(1, 21)]
    path = write_lines(tmp_path, *["{}"] * 23)
    lines = refused(path)
    assert len(lines) == 21
    assert lines[-1] == "... and 3 more bad rows"


def test_skipping_uses_the_good_rows_and_reports_the_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_lines(tmp_path, row(1), "{}", row(1), row(2))
    with caplog.at_level(logging.WARNING):
        problems = load_problems(path, SKIPPING)
    assert [problem.id for problem in problems] == ["p1", "p2"]
    assert "2 bad rows skipped, 2 used" in caplog.text
    assert "problems.jsonl:2: has no 'question'" in caplog.text


def test_good_file_warns_of_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_problems(write_lines(tmp_path, row(1)), SKIPPING)
    assert caplog.text == ""


@pytest.mark.parametrize("content", [b"", b"\n\n \n"])
def test_empty_file_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="holds no problem"):
        load_problems(path, SKIPPING)


def test_file_of_bad_rows_only_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no problem"):
        load_problems(write_lines(tmp_path, "{}"), SKIPPING)


def test_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.jsonl cannot be read \(No such file or directory\)"):
        load_problems(tmp_path / "gone.jsonl", DATA)


def test_byte_order_mark_and_unicode_line_separators_are_no_obstacle(tmp_path: Path) -> None:
    path = write_lines(tmp_path, b"\xef\xbb\xbf" + row(1).encode(), '{"question": "a\u2028b", "answer": "1"}')
    assert [problem.question for problem in load_problems(path, DATA)] == ["q1", "a\u2028b"]


def test_parquet_rows_are_the_same_problems_as_json_lines(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is optional: pip install pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is optional: pip install pyarrow")
    lines = [row(number, level=number) for number in range(5)]
    path = tmp_path / "problems.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([json.loads(line) for line in lines]), path)
    assert load_problems(path, DATA) == load_problems(write_lines(tmp_path, *lines), DATA)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="damaged parquet file"):
        load_problems(path, DATA)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    path = tmp_path / "problems.parquet"
    path.write_bytes(b"PAR1....")
    with pytest.raises(
        ValueError, match=r"problems\.parquet is a parquet or Arrow file and needs .* pip install pyarrow"
    ):
        load_problems(path, DATA)


GSM8K = (
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia sold 48+24 = <<48+24=72>>72 clips altogether.\n#### 72"
)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        (GSM8K, "72"),
        ("He has $1,234.\n#### 1,234 ", "1,234"),
        ("One.\n#### 1\nTwo.\n#### -2", "-2"),
        ("six times seven #### 42", "42"),
        ("#### 42", "#### 42"),
        ("42 ####", "42 ####"),
        ("First.\n#### A heading\nand more text", "First.\n#### A heading\nand more text"),
        ("72", "72"),
    ],
)
def test_the_gold_answer_of_a_marked_solution_is_what_follows_the_mark(
    answer: str, gold: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (problem,) = load_problems(write_lines(tmp_path, row(1, answer=answer)), DATA)
    assert problem.answer == gold
    assert ("what follows it is the gold answer (rows 1)" in caplog.text) == (gold != answer)


def test_gold_answers_that_nothing_will_equal_are_warned_of_with_their_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = [row(number, answer="so it is " * 30) for number in range(30)]
    path = write_lines(tmp_path, row(100), *long[:1], row(101, answer="2\n3"), row(102, answer=" 7\n"), *long[1:])
    problems = load_problems(path, DATA)
    assert len(problems) == 33 and problems[2].answer == "2\n3"
    (record,) = caplog.records
    assert "problems.jsonl: 31 gold answers have more than 200 characters or several lines" in record.message
    listed = ", ".join(str(number) for number in (2, 3, *range(5, 23)))
    assert record.message.endswith(f"give the final answer alone (rows {listed} and 11 more)")


@pytest.mark.parametrize("column", ["image", "images", "videos", "audios"])
def test_a_question_with_pictures_or_sound_is_a_bad_row(column: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path, row(1), row(2, **{column: [{"bytes": "..."}]}), row(3, **{column: []}))
    (line,) = refused(path)
    assert line.startswith(f"problems.jsonl:2: has {column}, which the policy is not shown: use rows of text alone")
    assert [problem.id for problem in load_problems(path, SKIPPING)] == ["p1", "p3"]


def test_functions_to_call_are_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_lines(tmp_path, row(1, tools=[{"name": "search"}]), row(2, tools=[]), row(3, tools=[{"name": "run"}]))
    assert len(load_problems(path, DATA)) == 3
    (warning,) = caplog.messages
    assert "`tools` of 2 problems is not shown to the policy" in warning and warning.endswith("(p1, p3)")


def test_rows_may_come_from_code(tmp_path: Path) -> None:
    code = tmp_path / "made.py"
    code.write_text(
        "def rows():\n    for number in range(3):\n        yield {'question': f'q{number}', 'answer': number}\n"
        "def bad():\n    yield {'question': 'q0', 'answer': '0'}\n    yield 7\n"
        "def raises():\n    yield {'question': 'q0', 'answer': '0'}\n    raise KeyError('seed')\n"
        "def needs(number):\n    yield number\n"
    )
    found = [(problem.question, problem.answer) for problem in load_problems(f"{code}:rows", DATA)]
    assert found == [("q0", "0"), ("q1", "1"), ("q2", "2")]
    assert refused(Path(f"{code}:bad")) == [
        'made.py:bad:2: must be a JSON object such as {"question": ..., "answer": ...}'
    ]
    for name, told in (
        ("raises", r"made\.py:raises cannot be read \(KeyError: 'seed'\)"),
        ("needs", r"made\.py:needs has the signature \(number\) and must be callable as \(\)"),
        ("gone", r"made\.py:gone cannot be imported \(AttributeError"),
    ):
        with pytest.raises(ValueError, match=told):
            load_problems(f"{code}:{name}", DATA)


def test_a_file_whose_name_holds_a_colon_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "problems:second.jsonl"
    path.write_text(row(1) + "\n")
    assert [problem.id for problem in load_problems(path, DATA)] == ["p1"]
