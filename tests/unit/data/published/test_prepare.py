"""tools/prepare_data.py from generated files of the published schemas to the problems a run loads."""

import hashlib
import importlib.util
import json
import os
import random
import resource
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_p2o.config.tree import DataConfig, one_task
from megatron_p2o.data.problems import load_problems
from megatron_p2o.data.published.origin import NOT_STATED, origin_of
from megatron_p2o.data.published.sources import DEEPMATH
from megatron_p2o.data.raw_rows import raw_rows
from megatron_p2o.evaluation.outcome import GradedResponse
from megatron_p2o.evaluation.response_file import ResponseFile
from megatron_p2o.types import CORRECT, Problem

TOOL = Path(__file__).parents[4] / "tools" / "prepare_data.py"
NOUNS = ("apples", "boxes", "cars", "doves", "eggs", "figs", "goats", "hats", "inks", "jars", "kites", "lamps", "mugs")


@pytest.fixture(scope="module")
def tool() -> Callable[..., int]:
    spec = importlib.util.spec_from_file_location("prepare_data", TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: module.main(list(map(str, arguments)))


def question(number: int) -> str:
    generator = random.Random(number)
    return f"Problem {number}: " + " ".join(f"{generator.randrange(99)} {generator.choice(NOUNS)}" for _ in range(12))


def scaler_rows(num_rows: int) -> list[dict[str, Any]]:
    return [
        {"problem": question(number), "answer": str(number), "solution": "By counting."} for number in range(num_rows)
    ]


def math_rows(num_rows: int) -> list[dict[str, Any]]:
    generator = random.Random(1)
    answers = ["Yes", "3", "4.5", r"\sqrt{2}", "(1,2)"]
    return [
        {
            "question": question(number),
            "final_answer": generator.choice(answers),
            "difficulty": generator.choice([-1.0, 5.5, 7.0, 7.5, 9.0]),
            "topic": "Counting",
            "r1_solution_1": "By counting.",
        }
        for number in range(num_rows)
    ]


def write_array(path: Path, rows: list[Any], **layout: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, **layout), encoding="utf-8")
    return path


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def manifest(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def numbers(path: Path) -> list[int]:
    return [int(row["id"].split("-")[1]) for row in read_lines(path)]


def paper_numbers(num_rows: int, num_held_out: int) -> tuple[list[int], list[int]]:
    """Return held-out and remaining row numbers by composing the three permutations."""
    first, second, third = (
        np.random.default_rng(42).permutation(size) for size in (num_rows, num_rows, num_rows - num_held_out)
    )
    order = first[second]
    return order[:num_held_out].tolist(), order[num_held_out:][third].tolist()


def prepare_scaler(tool: Callable[..., int], download: Path, out: Path, *more: object) -> int:
    return tool("deepscaler", "--input", download, "--out", out, "--num-train", 60, "--num-held-out", 20, *more)


def test_deepscaler_becomes_the_papers_problems_with_their_provenance(
    tool: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    revision = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "snapshots" / revision
    file = write_array(folder / "deepscaler.json", scaler_rows(200), indent=1)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Card\n")
    out = tmp_path / "data" / "deepscaler"
    assert prepare_scaler(tool, folder, out) == 0
    held_out, rest = paper_numbers(200, 20)
    assert numbers(out / "test.jsonl") == held_out
    assert numbers(out / "train.jsonl") == rest[:60]
    problems = load_problems(out / "train.jsonl", DataConfig(train=one_task("unused")))
    assert replace(problems[0], columns={}) == Problem(
        id=f"deepscaler-{rest[0]:06d}", question=question(rest[0]), answer=str(rest[0]), source="deepscaler"
    )
    made = manifest(out / "manifest.json")
    assert made["origin"]["repository"] == "agentica-org/DeepScaleR-Preview-Dataset"
    assert (made["origin"]["revision"], made["origin"]["licence"]) == (revision, "mit")
    assert made["origin"]["files"] == [["deepscaler.json", file.stat().st_size, sha256(file)]]
    assert made["request"]["seed"] == 42
    assert made["files"] == {
        name: sha256(out / name) for name in ("train.jsonl", "test.jsonl", "near_duplicates.jsonl")
    }
    assert made["command"].startswith("tools/prepare_data.py deepscaler --input ") and made["version"]
    assert made["rows"] | {"bad_rows": 0} == {
        "read": 200,
        "expected": 40_315,
        "below_min_difficulty": 0,
        "repeated": 0,
        "bad": {},
        "bad_rows": 0,
        "train": 60,
        "held_out": 20,
    }
    assert "published with 40315 rows, this download has 200" in capsys.readouterr().err


def test_same_inputs_are_not_prepared_twice_and_others_do_not_overwrite(
    tool: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    download, out = write_array(tmp_path / "rows.json", scaler_rows(200)), tmp_path / "out"
    assert prepare_scaler(tool, download, out) == 0
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert prepare_scaler(tool, download, out) == 0
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert "is up to date" in capsys.readouterr().out
    assert prepare_scaler(tool, download, out, "--overlap", 0.7) == 2
    assert "request was another: choose another --out" in capsys.readouterr().err
    with (out / "train.jsonl").open("a") as file:
        file.write("\n")
    assert prepare_scaler(tool, download, out) == 2
    assert "train.jsonl is not what" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    assert prepare_scaler(tool, download, tmp_path / "mine") == 2
    assert "was not made by this tool" in capsys.readouterr().err


def test_killed_while_writing_leaves_no_output_and_the_next_try_succeeds(
    tool: Callable[..., int], tmp_path: Path
) -> None:
    download, out = write_array(tmp_path / "rows.json", scaler_rows(200)), tmp_path / "out"
    child = os.fork()
    if child == 0:
        # The kernel kills the process where train.jsonl passes 4 KiB.
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            prepare_scaler(tool, download, out)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGXFSZ
    assert not out.exists()
    assert [path.stat().st_size for path in tmp_path.glob(".out.partial/.*")] == [4096]
    assert prepare_scaler(tool, download, out) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rows.json"]
    assert numbers(out / "train.jsonl") == paper_numbers(200, 20)[1][:60]


ODD_ROWS: dict[str, Any] = {
    "no answer": {"problem": question(900)},
    "no answer (blank)": {"problem": question(901), "answer": "  "},
    "no answer (empty list)": {"problem": question(902), "answer": []},
    "several answers": {"problem": question(903), "answer": ["1", "2"]},
    "answer is no text or number": {"problem": question(904), "answer": {"value": 1}},
    "answer is no text or number (boolean)": {"problem": question(905), "answer": True},
    "answer is no text or number (NaN)": b'{"problem": "q", "answer": NaN}',
    "answer too long": {"problem": question(906), "answer": "1" * 2001},
    "question too long": {"problem": "x" * 20_001, "answer": "1"},
    "no question": {"answer": "1"},
    "question is no text": {"problem": ["q"], "answer": "1"},
    "not UTF-8": b'{"problem": "\xff", "answer": "1"}',
    "not UTF-8 (half a surrogate pair)": b'{"problem": "\\ud800", "answer": "1"}',
    "not JSON": b'{"problem": ',
    "not JSON (number)": b'{"problem": "q", "answer": ' + b"1" * 5000 + b"}",
    "no object": b"[1]",
    "too long": b'{"problem": "' + b"x" * (16 << 20) + b'", "answer": "1"}',
}


def test_every_odd_row_is_left_out_by_a_named_rule_and_moves_no_other(
    tool: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out, rest = paper_numbers(200, 20)
    rows: list[Any] = scaler_rows(200)
    places = dict(zip([held_out[3], *rest], ODD_ROWS, strict=False))
    for number, rule in places.items():
        rows[number] = ODD_ROWS[rule]
    rows[rest[-1]] = {"problem": question(7), "answer": ["0.5"]}
    rows[rest[-2]] = {"problem": question(8), "answer": 27.0}
    rows[rest[-3]] = {"problem": question(9), "answer": "$ 5 $"}
    download, out = write_lines(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    assert prepare_scaler(tool, download, out, "--num-train", 180 - 16) == 0
    assert numbers(out / "test.jsonl") == [number for number in held_out if number not in places]
    assert numbers(out / "train.jsonl") == [number for number in rest if number not in places]
    answers = [row["answer"] for row in read_lines(out / "train.jsonl")]
    assert answers[-3:] == ["5", "27", "0.5"]
    made = manifest(out / "manifest.json")
    expected: dict[str, int] = {}
    for rule in ODD_ROWS:
        expected[rule.partition(" (")[0]] = expected.get(rule.partition(" (")[0], 0) + 1
    assert made["rows"]["bad"] == expected
    assert made["rows"]["repeated"] == 3
    line = rest[2] + 1
    assert f"rows.jsonl:{line}: answer lists 2 answers: ['1', '2']" in capsys.readouterr().err


def test_array_with_bad_bytes_loses_that_row_only(tool: Callable[..., int], tmp_path: Path) -> None:
    rows = [json.dumps(row).encode() for row in scaler_rows(200)]
    rows[5] = b'{"problem": "\xff\xfe", "answer": "1"}'
    download = tmp_path / "rows.json"
    download.write_bytes(b"\xef\xbb\xbf [" + b" ,\n".join(rows) + b"]\n")
    assert prepare_scaler(tool, download, tmp_path / "out") == 0
    assert manifest(tmp_path / "out" / "manifest.json")["rows"]["bad"] == {"not UTF-8": 1}


def random_value(generator: random.Random, depth: int = 0) -> Any:
    kind = generator.randrange(8 if depth < 3 else 5)
    if kind >= 5:
        inner = [random_value(generator, depth + 1) for _ in range(generator.randrange(4))]
        return inner if kind == 5 else {f'{key}"': value for key, value in enumerate(inner)}
    text = "".join(generator.choice('ab"\\é\n\t[]{},:\u2028😀') for _ in range(generator.randrange(12)))
    return [generator.randrange(-(10**6), 10**6), 10 ** generator.uniform(-5, 20), text, None, True][kind]


def test_array_is_split_where_a_whole_read_would_split_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, path = random.Random(5), tmp_path / "rows.json"
    for _ in range(120):
        rows = [random_value(generator) for _ in range(generator.randrange(8))]
        text = json.dumps(rows, indent=generator.choice([None, 0, 2]), ensure_ascii=generator.random() < 0.5)
        path.write_text(text, encoding=generator.choice(["utf-8", "utf-8-sig"]))
        monkeypatch.setattr("megatron_p2o.data.raw_rows.CHUNK_CHARACTERS", generator.choice([1, 2, 3, 7, 50, 1000]))
        assert [json.loads(row) for _, row in raw_rows(path) if isinstance(row, bytes)] == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"problem": "q", "answer": "1"}, {"problem": "q"', "rows.json after row 1: the JSON array is damaged"),
        (b'[{"problem": "q", "answer": "1"}] [', "goes on after its JSON array"),
        (b"[" * 100_000, "the JSON array is damaged"),
        (b"[]", "hold no rows: download them again"),
        (b"", "hold no rows"),
        (
            b'{"text": "q", "label": 1}\n' * 3,
            "rows.json:3: has no 'problem'; its fields are text, label: give the published files",
        ),
        (b'{"problem": "q", "final": 1}\n' * 150, "rows.json:100: has no 'answer'; its fields are problem, final"),
        (b"PAR1....", "rows.json"),
    ],
)
def test_files_of_another_schema_or_damaged_are_refused_with_place_and_finding(
    tool: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    (tmp_path / "rows.json").write_bytes(content)
    assert prepare_scaler(tool, tmp_path / "rows.json", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_too_few_rows_are_refused(tool: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    download = write_array(tmp_path / "rows.json", scaler_rows(70))
    assert prepare_scaler(tool, download, tmp_path / "out") == 2
    assert "--num-train=60: only 50 problems of deepscaler are left" in capsys.readouterr().err
    assert prepare_scaler(tool, tmp_path / "gone", tmp_path / "out") == 2
    assert "gone holds no *.jsonl, *.json, *.parquet" in capsys.readouterr().err


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is optional: pip install pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is optional: pip install pyarrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize("write", [write_lines, write_parquet])
def test_deepmath_is_read_from_all_its_files_and_chosen_by_difficulty(
    tool: Callable[..., int], tmp_path: Path, write: Callable[[Path, list[Any]], object]
) -> None:
    rows: list[Any] = math_rows(900)
    rows[10] = rows[10] | {"difficulty": None}
    rows[11] = rows[11] | {"difficulty": float("nan")}
    (tmp_path / "download").mkdir()
    (tmp_path / "download" / "other.jsonl").write_text("{}\n")
    for part in range(3):
        name = f"train-{part:05d}-of-00003.parquet"
        write(tmp_path / "download" / "data" / name, rows[300 * part : 300 * part + 300])
    out = tmp_path / "out"
    arguments = "--input", tmp_path / "download", "--num-train", 100, "--num-held-out", 50
    assert tool("deepmath", *arguments, "--out", out) == 0
    levels = {number: row["difficulty"] for number, row in enumerate(rows)}
    hard = [number for number, level in levels.items() if isinstance(level, float) and level >= 7]
    made = manifest(out / "manifest.json")
    chosen = numbers(out / "train.jsonl") + numbers(out / "test.jsonl")
    assert set(chosen) <= set(hard) and len(set(chosen)) == 150
    assert made["rows"]["bad"] == {"no level": 2}
    assert made["rows"]["below_min_difficulty"] == 900 - 2 - len(hard)
    assert 0 < made["rows"]["left_out_by_balance"] < len(hard) - 150
    first = read_lines(out / "train.jsonl")[0]
    number = numbers(out / "train.jsonl")[0]
    assert (first["level"], first["subject"]) == (str(rows[number]["difficulty"]), "Counting")
    assert (first["question"], first["answer"]) == (rows[number]["question"], rows[number]["final_answer"])


def test_near_duplicates_of_evaluation_held_out_and_earlier_problems_are_replaced_or_reported(
    tool: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out, rest = paper_numbers(200, 20)
    rows = scaler_rows(200)
    rows[rest[4]]["problem"] = question(500).replace("Problem 500", "Exercise")
    rows[rest[9]]["problem"] = f"Think. {question(held_out[0])}"
    rows[rest[20]]["problem"] = question(rest[0]).upper()
    download = write_array(tmp_path / "rows.json", rows)
    aime = write_lines(tmp_path / "aime.jsonl", [{"problem": question(500), "answer": 7}])
    assert tool("eval", "--out", tmp_path / "eval", f"aime24={aime}") == 0
    near = {rest[4]: ("aime24", "aime24-000000"), rest[9]: ("held out", f"deepscaler-{held_out[0]:06d}")}
    near[rest[20]] = ("repeated", f"deepscaler-{rest[0]:06d}")

    replaced, reported = tmp_path / "replaced", tmp_path / "reported"
    assert prepare_scaler(tool, download, replaced, "--against", tmp_path / "eval") == 0
    assert numbers(replaced / "train.jsonl") == [number for number in rest if number not in near][:60]
    report = "--against", tmp_path / "eval", "--near-duplicates", "report"
    assert prepare_scaler(tool, download, reported, *report) == 0
    for out in (replaced, reported):
        found = read_lines(out / "near_duplicates.jsonl")
        assert {int(row["id"].split("-")[1]): (row["against"], row["known_id"]) for row in found} == near
        assert manifest(out / "manifest.json")["near_duplicates"]["found"] == {
            "aime24": 1,
            "held out": 1,
            "repeated": 1,
        }
    assert numbers(reported / "train.jsonl") == rest[:60]
    assert "near duplicates replaced: 1 aime24, 1 held out, 1 repeated" in capsys.readouterr().out
    compared = manifest(replaced / "manifest.json")["compared_with"]
    assert compared == {"aime24": sha256(tmp_path / "eval" / "aime24.jsonl")}
    assert prepare_scaler(tool, download, tmp_path / "none", "--against", tmp_path / "gone") == 2
    assert "holds no evaluation sets" in capsys.readouterr().err


EVALUATION_ROWS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    # As published by math-ai, HuggingFaceH4, Maxwell-Jia, and in the Qwen2.5-Math suite.
    "aime24": ({"id": 60, "problem": "q", "solution": r"So \boxed{204}"}, {"answer": "204"}),
    "aime25": ({"ID": "2025-I-1", "Problem": "q", "Solution": "...", "Answer": 70}, {"answer": "70"}),
    "amc23": ({"id": 0, "question": "q", "answer": 27.0, "url": "..."}, {"answer": "27"}),
    "math500": (
        {"problem": "q", "solution": "s", "answer": "p - q", "subject": "Algebra", "level": 2, "unique_id": "u"},
        {"answer": "p - q", "level": "2", "subject": "Algebra"},
    ),
    "minerva": (
        {"problem": "q", "type": "Astronomy", "solution": r"It is \boxed{4e33} erg.", "idx": 0},
        {"answer": "4e33", "subject": "Astronomy"},
    ),
    "olympiadbench": (
        {"question": "q", "solution": ["s"], "final_answer": ["$-1$", "2"], "subfield": "Algebra", "level": "x"},
        {"answer": "-1", "subject": "Algebra"},
    ),
    "my_set": ({"question": "q", "final_answer": "6", "difficulty": 3}, {"answer": "6", "level": "3"}),
}


def test_evaluation_sets_of_every_published_schema(tool: Callable[..., int], tmp_path: Path) -> None:
    pairs = [
        f"{name}={write_lines(tmp_path / 'in' / f'{name}.jsonl', [row, row | {'problem_number': 2}])}"
        for name, (row, _) in EVALUATION_ROWS.items()
    ]
    out = tmp_path / "eval"
    assert tool("eval", "--out", out, *pairs) == 0
    for name, (_, expected) in EVALUATION_ROWS.items():
        blank = {"id": f"{name}-000000", "question": "q", "source": name, "level": "", "subject": ""}
        rows = read_lines(out / f"{name}.jsonl")
        assert rows == [blank | expected, blank | expected | {"id": f"{name}-000001"}]
        assert manifest(out / f"{name}.manifest.json")["rows"]["repeated"] == 1
        assert len(load_problems(out / f"{name}.jsonl", DataConfig(train=one_task("unused")))) == 2
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert tool("eval", "--out", out, *pairs) == 0
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_bad_row_of_an_evaluation_set_is_an_error_unless_skipped(
    tool: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"problem": "q", "answer": 1}, {"problem": "r", "solution": "none"}])
    assert tool("eval", "--out", tmp_path / "eval", f"amc23={path}") == 2
    assert f"{path}:2: has no 'answer' or 'Answer' or 'solution'" in capsys.readouterr().err
    assert tool("eval", "--out", tmp_path / "eval", "--skip-bad-rows", f"amc23={path}") == 0
    assert manifest(tmp_path / "eval" / "amc23.manifest.json")["rows"]["bad"] == {"no answer": 1}
    assert tool("eval", "--out", tmp_path / "eval", str(path)) == 2
    assert "must have the form NAME=PATH" in capsys.readouterr().err


def test_revision_is_found_where_a_download_into_a_folder_records_it(tool: Callable[..., int], tmp_path: Path) -> None:
    folder, revision = tmp_path / "DeepMath-103K", "f" * 40
    write_lines(folder / "data" / "train-00000-of-00001.parquet", math_rows(400))
    record = folder / ".cache" / "huggingface" / "download" / "data" / "train-00000-of-00001.parquet.metadata"
    record.parent.mkdir(parents=True)
    record.write_text(f"{revision}\netag\n1700000000.0\n")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    arguments = "--num-train", 50, "--num-held-out", 20, "--out", tmp_path / "out"
    assert tool("deepmath", "--input", folder, *arguments) == 0
    origin = manifest(tmp_path / "out" / "manifest.json")["origin"]
    assert (origin["revision"], origin["licence"]) == (revision, "mit")


def test_snapshot_in_the_hubs_cache_is_used_with_its_revision(
    tool: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    repository, revision = tmp_path / "cache" / "datasets--agentica-org--DeepScaleR-Preview-Dataset", "a1" * 20
    write_array(repository / "snapshots" / revision / "deepscaler.json", scaler_rows(200))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    arguments = "--num-train", 60, "--num-held-out", 20
    assert tool("deepscaler", "--hf", "--out", tmp_path / "out", *arguments) == 0
    assert manifest(tmp_path / "out" / "manifest.json")["origin"]["revision"] == revision
    assert numbers(tmp_path / "out" / "train.jsonl") == paper_numbers(200, 20)[1][:60]


def test_hub_out_of_reach_says_what_to_do_instead(
    tool: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert tool("deepscaler", "--hf", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "agentica-org/DeepScaleR-Preview-Dataset could not be downloaded" in error
    assert "--local-dir FOLDER`, then give --input FOLDER" in error
    assert not (tmp_path / "out").exists()


def test_parquet_holds_the_same_problems(tool: Callable[..., int], tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is optional: pip install pyarrow")
    download = write_array(tmp_path / "rows.json", scaler_rows(200))
    assert prepare_scaler(tool, download, tmp_path / "lines") == 0
    assert prepare_scaler(tool, download, tmp_path / "parquet", "--format", "parquet") == 0
    settings = DataConfig(train=one_task("unused"))
    expected = load_problems(tmp_path / "lines" / "train.jsonl", settings)
    assert load_problems(tmp_path / "parquet" / "train.parquet", settings) == expected


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("license: [mit, cc-by-4.0]", "mit, cc-by-4.0"),
        ("license: {name: mit}", ""),
        ("license: " + "[" * 5000, ""),
        ("- " * 5000, ""),
        (
            "\n".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" if n else "a0: &a0 [x]" for n in range(40))
            + "\nlicense: *a39",
            "",
        ),
    ],
)
def test_a_licence_is_read_from_whatever_card_lies_beside_the_rows(tmp_path: Path, card: str, licence: str) -> None:
    (tmp_path / "README.md").write_text(f"---\n{card}\n---\n# Card\n")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    assert origin_of(DEEPMATH, [tmp_path / "rows.jsonl"]).licence == (licence or NOT_STATED)


def test_a_teacher_s_whole_responses_join_the_rows_of_their_problems(
    tool: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": f"p{number}", "question": question(number), "answer": "1", "level": "7"} for number in range(3)]
    problems = write_lines(tmp_path / "train.jsonl", rows)
    with ResponseFile(tmp_path / "responses" / "train.jsonl", {"temperature": 1.0}) as file:
        for problem_id, sample, finish_reason, text in (
            ("p0", 1, "stop", "second"),
            ("p0", 0, "stop", "first"),
            ("p1", 0, "length", "cut of"),
            ("p1", 1, "stop", " "),
            ("p2", 0, "abort", "lost"),
            ("p2", 0, "stop", "wrong, but whole"),  # asked again when the evaluation went on
            ("elsewhere", 0, "stop", "another problem"),
        ):
            response = GradedResponse(
                problem_id=problem_id,
                sample=sample,
                grade=CORRECT,
                finish_reason=finish_reason,
                num_tokens=3,
                response=text,
            )
            file.append(response)
    given = ("demonstrations", "--problems", problems, "--responses", tmp_path / "responses" / "train.jsonl")
    out = tmp_path / "out" / "train.jsonl"
    assert tool(*given, "--out", out) == 0
    assert capsys.readouterr().out.endswith(
        f"{out}: 3 responses to 2 of 3 problems; 3 are cut off, without a text or to other problems, and left out\n"
    )
    data = DataConfig(train=one_task("unused"), demonstrations_field="demonstrations")
    made = load_problems(out, data)
    assert [problem.demonstrations for problem in made] == [("first", "second"), (), ("wrong, but whole",)]
    assert [problem.level for problem in made] == ["7"] * 3, "the rest of each row stays"
    others = write_lines(tmp_path / "others.jsonl", [{"id": "other", "question": "1+1", "answer": "2"}])
    assert tool("demonstrations", "--problems", others, *given[3:], "--out", tmp_path / "none.jsonl") == 2
    assert (
        "holds no whole response to a problem of" in capsys.readouterr().err and not (tmp_path / "none.jsonl").exists()
    )
