"""Prepares the files that a run reads from a downloaded data set, with a manifest of their source.

    OUT/train.jsonl, OUT/test.jsonl     problems: id, question, answer, source, level, subject
    OUT/near_duplicates.jsonl           ids and shares of n-grams, no text
    OUT/manifest.json                   source, revision, licence, SHA-256 of every file, counts, command

The folder appears complete or not at all. The same download and options give the same problems.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_p2o.data.published.download import Download
from megatron_p2o.data.published.near_duplicates import RULE, NearDuplicateIndex, words
from megatron_p2o.data.published.origin import Origin
from megatron_p2o.data.published.source_rows import SourceRow
from megatron_p2o.data.published.sources import DEEPSCALER, Source
from megatron_p2o.data.published.splits import (
    SEED,
    balanced_by_answer_type,
    deepmath_split,
    deepscaler_split,
    type_counts,
)
from megatron_p2o.files import digest_of, read_json_object, write_whole

MANIFEST = "manifest.json"
HELD_OUT = "held out"
REPEATED = "repeated"

FileFormat = Literal["jsonl", "parquet"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRequest:
    """Options for preparing a download."""

    num_train: int
    num_held_out: int
    near_duplicates: Literal["replace", "report"]
    """What to do with training problems that nearly repeat one of an evaluation set."""
    min_overlap: float
    """See `NearDuplicateIndex`."""
    file_format: FileFormat
    seed: int = SEED
    """The paper's; recorded, not chosen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSet:
    """A prepared benchmark, to compare training problems with."""

    questions: Mapping[str, str]
    """Questions by problem id."""
    sha256: str
    """SHA-256 of its file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NearDuplicate:
    """A training problem that nearly repeats another problem."""

    id: str
    against: str
    """Name of the evaluation set, HELD_OUT or REPEATED."""
    known_id: str
    share: float


def prepare_training(
    download: Download,
    source: Source,
    request: TrainingRequest,
    known_sets: Mapping[str, EvaluationSet],
    inputs: Mapping[str, Any],
    out: Path,
) -> dict[str, Any]:
    """Write the paper's training and held-out problems to the folder `out`, and return the manifest.

    With `known_sets`, training problems that nearly repeat a problem there, a held-out or an earlier training problem
    are found and, when so requested, replaced by the next in the paper's order. Otherwise the problems are exactly the
    paper's; a bad row among them gives its place to the next.

    Args:
        inputs: what `training_inputs` returns, and what else the manifest should say.

    Raises:
        ValueError: fewer problems are left than asked for.
    """
    held_out, candidates, counts = paper_order(download, source, request.num_held_out)
    near_duplicates: list[NearDuplicate] = []
    if known_sets:
        near_duplicates = _near_duplicates(candidates, held_out, known_sets, request, source)
    replaced = {each.id for each in near_duplicates} if request.near_duplicates == "replace" else set[str]()
    train = [row for row in candidates if problem_id(row, source) not in replaced][: request.num_train]
    if len(train) < request.num_train:
        raise ValueError(
            f"--num-train={request.num_train}: only {len(train)} problems of {source.name} are left after holding "
            f"{request.num_held_out} out and leaving {len(replaced)} near duplicates out: ask for fewer"
        )
    manifest = {
        **inputs,
        "rows": download.record(source) | counts | {"train": len(train), "held_out": len(held_out)},
        "near_duplicates": {
            "rule": RULE,
            "replaced": bool(replaced),
            "found": dict(Counter(each.against for each in near_duplicates)),
        },
        "answer_types": type_counts(row.answer for row in train),
    }
    partial = _empty_folder_beside(out)
    files = [
        _write_problems(partial / f"train.{request.file_format}", train, source),
        _write_problems(partial / f"test.{request.file_format}", held_out, source),
        _write_near_duplicates(partial / "near_duplicates.jsonl", near_duplicates),
    ]
    manifest = _write_manifest(partial / MANIFEST, manifest, files)
    partial.rename(out)
    return manifest


def training_inputs(
    origin: Origin, request: TrainingRequest, known_sets: Mapping[str, EvaluationSet]
) -> dict[str, Any]:
    """Return the part of a manifest that decides all the rest."""
    compared_with = {name: known_sets[name].sha256 for name in sorted(known_sets)}
    return {"origin": asdict(origin), "request": asdict(request), "compared_with": compared_with}


def evaluation_inputs(origin: Origin, skips_bad_rows: bool) -> dict[str, Any]:
    """Return the same for an evaluation set."""
    return {"origin": asdict(origin), "request": {"skip_bad_rows": skips_bad_rows}}


def is_prepared(manifest_path: Path, inputs: Mapping[str, Any]) -> bool:
    """Whether what the manifest describes is there and was made from these inputs.

    Raises:
        ValueError: it was made from others, or is not a manifest of ours, or a file has changed since: making it again
            would destroy something.
    """
    out = manifest_path.parent
    if not manifest_path.exists():
        return False
    manifest = read_json_object(manifest_path)
    for key, value in inputs.items():
        if manifest.get(key) != json.loads(json.dumps(value)):
            raise ValueError(f"{manifest_path}: {key} was another: choose another --out, or remove {out}")
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise ValueError(f"{manifest_path} is no manifest of this tool: choose another --out, or remove {out}")
    for name, digest in files.items():
        if not (out / name).exists() or digest_of(out / name).sha256 != digest:
            raise ValueError(f"{out / name} is not what {manifest_path} describes: remove both to make them again")
    return True


def paper_order(
    download: Download, source: Source, num_held_out: int
) -> tuple[list[SourceRow], list[SourceRow], dict[str, int]]:
    """Return the held-out problems, the others in the order training takes them, and counts on the way.

    A bad row of DeepScaleR keeps its place in the shuffles, so that it moves no other, and is left out after them.
    """
    if source is DEEPSCALER:
        held_out, rest = deepscaler_split(download.rows, num_held_out)
        return _present(held_out), _present(rest), {}
    hard = download.problems
    balanced = balanced_by_answer_type(hard, lambda row: float(row.level), lambda row: row.answer)
    held_out, rest = deepmath_split(balanced, num_held_out)
    return held_out, rest, {"left_out_by_balance": len(hard) - len(balanced)}


def prepare_evaluation(download: Download, source: Source, inputs: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Write OUT/<name>.jsonl with every problem of an evaluation set and, after it, OUT/<name>.manifest.json."""
    path = _write_problems(out / f"{source.name}.jsonl", download.problems, source)
    return _write_manifest(evaluation_manifest(out, source), {**inputs, "rows": download.record(source)}, [path])


def evaluation_manifest(out: Path, source: Source) -> Path:
    """Return the path of an evaluation set's manifest in the folder `out`."""
    return out / f"{source.name}.{MANIFEST}"


def problem_id(row: SourceRow, source: Source) -> str:
    """Return the id of a problem: its source and its place there, the same in every selection."""
    return f"{source.name}-{row.number:06d}"


def _near_duplicates(
    candidates: Iterable[SourceRow],
    held_out: Sequence[SourceRow],
    known_sets: Mapping[str, EvaluationSet],
    request: TrainingRequest,
    source: Source,
) -> list[NearDuplicate]:
    """Return the near duplicates among the candidates up to the last one that training takes, in order."""
    questions = {name: known.questions for name, known in known_sets.items()}
    questions[HELD_OUT] = {problem_id(row, source): row.question for row in held_out}
    indexes = {name: NearDuplicateIndex(those, request.min_overlap) for name, those in questions.items()}
    found: list[NearDuplicate] = []
    first_with: dict[tuple[str, ...], str] = {}
    num_taken = 0
    for row in candidates:
        if num_taken == request.num_train:
            break
        near = _near_duplicate(row, indexes, first_with, source)
        if near is None:
            first_with[words(row.question)] = problem_id(row, source)
        else:
            found.append(near)
        num_taken += near is None or request.near_duplicates == "report"
    return found


def _near_duplicate(
    row: SourceRow, indexes: Mapping[str, NearDuplicateIndex], first_with: Mapping[tuple[str, ...], str], source: Source
) -> NearDuplicate | None:
    own_id = problem_id(row, source)
    for name, index in indexes.items():
        overlap = index.overlap(row.question)
        if overlap is not None:
            return NearDuplicate(id=own_id, against=name, known_id=overlap.id, share=round(overlap.share, 3))
    first = first_with.get(words(row.question))
    return None if first is None else NearDuplicate(id=own_id, against=REPEATED, known_id=first, share=1.0)


def _present(rows: Iterable[SourceRow | None]) -> list[SourceRow]:
    return [row for row in rows if row is not None]


def _empty_folder_beside(out: Path) -> Path:
    """Return a new folder to be renamed to `out`; what a killed preparation has left there is removed."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} exists and was not made by this tool: choose another folder")
    partial = out.with_name(f".{out.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def _write_problems(path: Path, rows: Sequence[SourceRow], source: Source) -> Path:
    problems = [
        {
            "id": problem_id(row, source),
            "question": row.question,
            "answer": row.answer,
            "source": source.name,
            "level": row.level,
            "subject": row.subject,
        }
        for row in rows
    ]
    if path.suffix == ".parquet":
        _write_parquet(path, problems)
    else:
        write_whole(path, "".join(json.dumps(problem, ensure_ascii=False) + "\n" for problem in problems))
    return path


def _write_parquet(path: Path, problems: Sequence[Mapping[str, str]]) -> None:
    try:
        from pyarrow import Table  # optional dependency
        from pyarrow.parquet import write_table
    except ImportError as error:
        raise RuntimeError("--format parquet needs pyarrow: pip install pyarrow, or use jsonl") from error
    write_table(Table.from_pylist(list(problems)), path)


def _write_near_duplicates(path: Path, near_duplicates: Iterable[NearDuplicate]) -> Path:
    write_whole(path, "".join(json.dumps(asdict(each)) + "\n" for each in near_duplicates))
    return path


def _write_manifest(path: Path, manifest: Mapping[str, Any], files: Iterable[Path]) -> dict[str, Any]:
    """Write `manifest` with the checksums of the files it describes, and return it with them."""
    complete = {**manifest, "files": {file.name: digest_of(file).sha256 for file in files}}
    write_whole(path, json.dumps(complete, indent=1, ensure_ascii=False) + "\n")
    return complete
