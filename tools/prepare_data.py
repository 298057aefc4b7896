"""Make the problem files of the paper's runs and benchmarks, from a local download or from the Hugging Face hub.

    python tools/prepare_data.py deepscaler --hf --out data/deepscaler-5k
    python tools/prepare_data.py deepmath --input downloads/DeepMath-103K --out data/deepmath-5k
    python tools/prepare_data.py eval --out data/eval aime24=FILE aime25=FILE amc23=FILE math500=FILE ...
    python tools/prepare_data.py demonstrations --problems FILE --responses FILE --out FILE

Held-out and training problems are those of the paper: 500 held out, then 5,000 (`--num-train 10000`: larger runs)
in the order of its shuffles; of DeepMath, difficulty 7 and more, balanced by kind of answer. With `--against data/eval`
training problems that nearly repeat an evaluation problem are replaced by the next, and listed.

`demonstrations` adds a teacher's responses, which `p2o eval` has sampled, to the rows of its problems. It writes its
OUT anew each time.

A finished OUT of the others is not made again, a killed preparation leaves none. The data sets belong to their authors:
read their licences. docs/data.md says which rows are left out, and why.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_p2o import __version__
from megatron_p2o.config.tree import DataConfig, one_task
from megatron_p2o.data.problems import load_problems
from megatron_p2o.data.published.download import read_download
from megatron_p2o.data.published.near_duplicates import MIN_SHARE
from megatron_p2o.data.published.origin import origin_of
from megatron_p2o.data.published.prepare import (
    MANIFEST,
    EvaluationSet,
    TrainingRequest,
    evaluation_inputs,
    evaluation_manifest,
    is_prepared,
    prepare_evaluation,
    prepare_training,
    training_inputs,
)
from megatron_p2o.data.published.source_rows import row_files
from megatron_p2o.data.published.sources import DEEPMATH, DEEPSCALER, EVALUATION_SETS, Source, any_source
from megatron_p2o.data.published.splits import MIN_DIFFICULTY
from megatron_p2o.errors import expected_message
from megatron_p2o.evaluation.outcome import GradedResponse
from megatron_p2o.files import digest_of, write_whole
from megatron_p2o.metrics.jsonl import read_lines
from megatron_p2o.records import from_json
from megatron_p2o.rewards.extract import last_boxed
from megatron_p2o.terminal import say, set_up_logging

PROGRESS_INTERVAL_S = 2.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 2 when an input cannot be used."""
    set_up_logging()
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    made_by = {"command": shlex.join(["tools/prepare_data.py", *arguments]), "version": __version__}
    try:
        options.run(options, made_by)
    except (ValueError, RuntimeError, OSError) as error:
        say(f"prepare_data: {expected_message(error) or error}", sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="deepscaler|deepmath|eval|demonstrations")
    for source in (DEEPSCALER, DEEPMATH):
        command = commands.add_parser(source.name, help=f"training and held-out problems of {source.hub_repository}")
        where = command.add_mutually_exclusive_group(required=True)
        where.add_argument("--input", type=Path, metavar="PATH", help="the download: folder, JSON, JSONL or parquet")
        where.add_argument("--hf", action="store_true", help="download it with huggingface_hub")
        command.add_argument("--out", type=Path, required=True, metavar="FOLDER")
        command.add_argument("--num-train", type=_positive, default=5000)
        command.add_argument("--num-held-out", type=_positive, default=500)
        command.add_argument("--against", type=Path, metavar="FOLDER", help="evaluation sets to compare with")
        command.add_argument("--near-duplicates", choices=("replace", "report"), default="replace")
        command.add_argument("--overlap", type=_share, default=MIN_SHARE, help="n-grams that make a near duplicate")
        command.add_argument("--format", choices=("jsonl", "parquet"), default="jsonl")
        command.add_argument("--revision", help="commit of the repository; the hub's own records are found without it")
        command.add_argument("--licence", help="when no README.md beside the files states it")
        command.set_defaults(run=_training, source=source)
    command = commands.add_parser("eval", help=f"evaluation sets: {', '.join(EVALUATION_SETS)}, or your own")
    command.add_argument("sets", nargs="+", metavar="NAME=PATH")
    command.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    command.add_argument("--skip-bad-rows", action="store_true", help="use the good rows of a set")
    command.set_defaults(run=_evaluation)
    command = commands.add_parser("demonstrations", help="problems with the responses of a teacher")
    command.add_argument("--problems", type=Path, required=True, metavar="FILE", help="what the teacher was asked")
    command.add_argument(
        "--responses", type=Path, required=True, metavar="FILE", help="responses/NAME.jsonl of `p2o eval`"
    )
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSONL with a column `demonstrations`")
    command.add_argument("--id-field", default="id", help="column of a problem's id")
    command.set_defaults(run=_demonstrations)
    return parser


def _training(options: argparse.Namespace, made_by: Mapping[str, str]) -> None:
    source: Source = options.source
    folder = _downloaded(source, options.revision) if options.hf else options.input
    files = row_files(folder, source.hub_files)
    request = TrainingRequest(
        num_train=options.num_train,
        num_held_out=options.num_held_out,
        near_duplicates=options.near_duplicates,
        min_overlap=options.overlap,
        file_format=options.format,
    )
    known_sets = _evaluation_sets(options.against) if options.against else {}
    inputs = training_inputs(origin_of(source, files, options.revision, options.licence), request, known_sets)
    if is_prepared(options.out / MANIFEST, inputs):
        say(f"{options.out} is up to date")
        return
    min_level = MIN_DIFFICULTY if source.has_numeric_level else None
    download = read_download(files, source, last_boxed, min_level, _progress(source))
    manifest = prepare_training(download, source, request, known_sets, {**inputs, **made_by}, options.out)
    _report(source, manifest)
    verb = "replaced" if options.near_duplicates == "replace" else "found and kept"
    found = manifest["near_duplicates"]["found"]
    say(f"near duplicates {verb}: {_counts(found)}" if known_sets else "near duplicates: not looked for (--against)")
    say(f"{options.out}: {', '.join(manifest['files'])}, {MANIFEST}")


def _evaluation(options: argparse.Namespace, made_by: Mapping[str, str]) -> None:
    for pair in options.sets:
        name, equals, path = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"{pair} must have the form NAME=PATH, e.g. aime24=downloads/aime24.jsonl")
        source = EVALUATION_SETS.get(name) or any_source(name)
        files = row_files(Path(path))
        inputs = evaluation_inputs(origin_of(source, files), options.skip_bad_rows)
        if is_prepared(evaluation_manifest(options.out, source), inputs):
            say(f"{name} is up to date")
            continue
        download = read_download(files, source, last_boxed)
        if download.num_bad and not options.skip_bad_rows:
            raise ValueError(
                f"{path} has {download.num_bad.total()} bad rows: {'; '.join(download.bad_rows)}\n"
                "Correct them, or give --skip-bad-rows"
            )
        _report(source, prepare_evaluation(download, source, {**inputs, **made_by}, options.out))


def _demonstrations(options: argparse.Namespace, made_by: Mapping[str, str]) -> None:
    columns = DataConfig(train=one_task("unused"), id_field=options.id_field, answer_field=None)
    problems = load_problems(options.problems, columns)
    lines = [line for line in read_lines(options.responses) if "settings" not in line]
    # A continued evaluation asks again for what had no verdict: the last line of a sample counts.
    last = {(each.problem_id, each.sample): each for each in (from_json(GradedResponse, line) for line in lines)}
    responses = [last[key] for key in sorted(last)]
    whole: dict[str, list[str]] = {problem.id: [] for problem in problems}
    num_left_out = 0
    for response in responses:
        if response.problem_id not in whole or response.finish_reason != "stop" or not response.response.strip():
            num_left_out += 1  # of another problem; cut off; without its text
            continue
        whole[response.problem_id].append(response.response)
    num_kept = sum(map(len, whole.values()))
    if not num_kept:
        raise ValueError(
            f"{options.responses} holds no whole response to a problem of {options.problems}: name the file that "
            "`p2o eval` has written for these problems"
        )
    rows = [{**problem.columns, "demonstrations": whole[problem.id]} for problem in problems]
    write_whole(options.out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    num_without = sum(not each for each in whole.values())
    say(
        f"{options.out}: {num_kept} responses to {len(problems) - num_without} of {len(problems)} problems; "
        f"{num_left_out} are cut off, without a text or to other problems, and left out"
    )


def _evaluation_sets(folder: Path) -> dict[str, EvaluationSet]:
    """Return every evaluation set this tool has written to a folder, by name."""
    files = [path for path in sorted(folder.glob("*.jsonl")) if path.with_name(f"{path.stem}.{MANIFEST}").exists()]
    if not files:
        raise ValueError(f"--against {folder} holds no evaluation sets: write them with the command `eval` first")
    settings = DataConfig(train=one_task("unused"))
    return {
        path.stem: EvaluationSet(
            questions={problem.id: problem.question for problem in load_problems(path, settings)},
            sha256=digest_of(path).sha256,
        )
        for path in files
    }


def _progress(source: Source) -> Callable[[int], None]:
    last_report_s = time.monotonic()

    def report(num_read: int) -> None:
        nonlocal last_report_s
        if time.monotonic() - last_report_s > PROGRESS_INTERVAL_S:
            last_report_s = time.monotonic()
            say(f"{source.name}: {num_read} rows read", sys.stderr)

    return report


def _report(source: Source, manifest: Mapping[str, Any]) -> None:
    rows, origin = manifest["rows"], manifest["origin"]
    say(f"{source.name}: {_counts({name: count for name, count in rows.items() if isinstance(count, int)})}")
    say(f"  revision {origin['revision'] or 'unknown'}, licence {origin['licence']}")
    if rows["bad"]:
        say(f"  bad rows left out: {_counts(rows['bad'])}")
    for line in rows["bad_rows"]:
        say(f"    {line}", sys.stderr)
    if source.num_rows not in (None, rows["read"]):
        say(
            f"{source.name}: published with {source.num_rows} rows, this download has {rows['read']}: "
            "the problems are not those of the paper",
            sys.stderr,
        )


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items()) or "none"


def _downloaded(source: Source, revision: str | None) -> Path:
    """Return the folder of the source's snapshot; what an interrupted download has fetched is not fetched again."""
    try:
        from huggingface_hub import snapshot_download  # optional here: a local download needs no client
    except ImportError as error:
        raise RuntimeError("--hf needs huggingface_hub: pip install huggingface_hub, or give --input") from error
    assert source.hub_repository
    patterns = [source.hub_files, "README.md"]
    try:
        folder = snapshot_download(
            source.hub_repository, repo_type="dataset", revision=revision, allow_patterns=patterns
        )
    except OSError as error:
        raise RuntimeError(
            f"{source.hub_repository} could not be downloaded ({error}): on a machine with a connection run "
            f"`hf download --repo-type dataset {source.hub_repository} --local-dir FOLDER`, then give --input FOLDER"
        ) from error
    return Path(folder)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _share(text: str) -> float:
    share = float(text)
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError("must be above 0 and at most 1")
    return share


if __name__ == "__main__":
    sys.exit(main())
