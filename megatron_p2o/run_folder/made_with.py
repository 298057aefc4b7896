"""Records what a checkpoint was made with: settings, problems and files. Written into every checkpoint.

runs/<name>/checkpoints/step-000030/made_with.json   what `run.resume.comparison` compares when a run goes on from there
runs/<name>/history.jsonl                            one line per start: what it went on from and what had changed
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_p2o.config.callables import names_code, rows_of
from megatron_p2o.config.tree import Config
from megatron_p2o.files import digest_of, digests_of, json_digest, read_json_object
from megatron_p2o.metrics.compute import ComputeAccount
from megatron_p2o.metrics.jsonl import read_lines
from megatron_p2o.policy.model.architecture import read_architecture
from megatron_p2o.records import from_json, from_text, to_json
from megatron_p2o.run_folder.program import this_program
from megatron_p2o.run_folder.resume_effects import (
    CHAT_TEMPLATE,
    GENERATION,
    INITIAL_WEIGHTS,
    TOKENIZER,
    TOKENIZER_SETTINGS,
)
from megatron_p2o.run_folder.state import UNREADABLE, CheckpointError
from megatron_p2o.types import Problem

MADE_WITH_FILE = "made_with.json"
HISTORY_FILE = "history.jsonl"

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")
"""Files of a model directory that decide which text a token stands for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MadeWith:
    """Everything that a run's numbers depend on besides its weights, in JSON values."""

    settings: Mapping[str, Any]
    """Settings by dotted name."""
    files: Mapping[str, str]
    """SHA-256 by the setting that names a file, or by what it is to the model."""
    architecture: Mapping[str, Any]
    """What config.json says of the model, as far as the trainer reads it."""
    problems: Mapping[str, str]
    """Problems of `data.train` in order: id to a digest of question and answer."""
    mix: Sequence[tuple[int, float]] = ()
    """Number of problems and relative weight of each task; empty in checkpoints of before there were tasks."""


def made_with(config: Config, train: Sequence[Problem]) -> MadeWith:
    """Return the record of a run; `train` are the problems as they are asked. Raises `OSError` and `ValueError`."""
    record = MadeWith(
        settings=settings_of(config),
        files=file_digests(config),
        architecture=flat(json.loads(json.dumps(asdict(read_architecture(Path(config.model.path)))))),
        problems={},
    )
    return with_problems(record, config, train)


def with_problems(record: MadeWith, config: Config, train: Sequence[Problem]) -> MadeWith:
    """Return the record of a run on these problems."""
    return replace(
        record,
        problems={problem.id: _short_digest([problem.question, problem.answer]) for problem in train},
        mix=config.data.mix(problem.task for problem in train),
    )


def settings_of(config: Config) -> dict[str, Any]:
    """Return every setting by dotted name, as JSON gives it back."""
    return flat(json.loads(json.dumps(asdict(config), default=str)))


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by dotted name."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return leaves


def file_digests(config: Config) -> dict[str, str]:
    """Return the digests of the files that settings name and of what the model directory says of text."""
    data, phrases = config.data, config.evolution.reflection.phrases
    named = {**data.training_files, **data.evaluation_files}
    if phrases is not None:
        named["evolution.reflection.phrases"] = phrases
    if config.evolution.templates_file is not None:
        named["evolution.templates_file"] = config.evolution.templates_file
    digests = {name: _content_digest(path) for name, path in named.items()}
    if config.objective.kl_coefficient > 0:
        digests[INITIAL_WEIGHTS] = weights_digest(Path(config.model.path))
    return digests | model_digests(Path(config.model.path))


def _content_digest(path: str) -> str:
    """Return the SHA-256 of a file's content, or of the rows that code yields."""
    return json_digest(to_json(list(rows_of(path)))) if names_code(path) else digest_of(Path(path)).sha256


def weights_digest(directory: Path) -> str:
    """Return the digest of a model directory's weights; reads all of them."""
    digests = digests_of(sorted(directory.glob("*.safetensors")))
    return _short_digest([[name, digest.sha256] for name, digest in digests.items()])


def model_digests(directory: Path) -> dict[str, str]:
    """Return the digests of a model directory's vocabulary, chat template and settings of text."""
    settings = _json(directory / "tokenizer_config.json")
    template = directory / "chat_template.jinja"
    chat = template.read_text(encoding="utf-8") if template.is_file() else settings.get("chat_template")
    vocabulary = [
        [name, digest_of(directory / name).sha256] for name in VOCABULARY_FILES if (directory / name).is_file()
    ]
    return {
        TOKENIZER: _short_digest(vocabulary),
        TOKENIZER_SETTINGS: _short_digest({key: settings[key] for key in settings if key != "chat_template"}),
        CHAT_TEMPLATE: _short_digest(chat),
        GENERATION: _short_digest(_json(directory / "generation_config.json")),
    }


def made_with_text(record: MadeWith) -> str:
    """Return the content of `made_with.json`."""
    return json.dumps(to_json(record), indent=1)


def read_made_with(checkpoint: Path) -> MadeWith | None:
    """Return what a checkpoint was made with; None of one that an earlier version has written, which does not say.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = checkpoint / MADE_WITH_FILE
    try:
        return from_text(MadeWith, path.read_bytes())
    except FileNotFoundError:
        return None
    except UNREADABLE as error:
        raise CheckpointError(f"{path} cannot be read ({error}): restore it, or remove the checkpoint") from error


def note_start(
    run_dir: Path, record: MadeWith, step: int, changes: Sequence[Mapping[str, Any]], redone: ComputeAccount
) -> None:
    """Append a start of the run after `step` to its history. Raises `OSError`.

    The problems are given by their number and a digest.

    Args:
        redone: what had been spent on later steps, which are done again.
    """
    problems = {"count": len(record.problems), "digest": _short_digest(list(record.problems.items()))}
    line = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "changes": list(changes),
        "redone": to_json(redone),
        "program": to_json(this_program()),
        "made_with": {**to_json(record), "problems": problems},
    }
    path = run_dir / HISTORY_FILE
    written = path.read_bytes() if path.is_file() else b""
    is_torn = written and not written.endswith(b"\n")  # by a kill
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if is_torn else "") + json.dumps(line) + "\n")


def redone_in(run_dir: Path) -> ComputeAccount:
    """Return what all starts of a run had spent on steps that were done again. Damaged lines are passed over."""
    total = ComputeAccount()
    for start in read_lines(run_dir / HISTORY_FILE):
        total = total.plus(from_json(ComputeAccount, start.get("redone", {}), skips_unknown=True))
    return total


def _json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty when there is none."""
    return read_json_object(path) if path.is_file() else {}


def _short_digest(value: Any) -> str:
    """Return 64 bits of the SHA-256 of a JSON value."""
    return json_digest(value)[:16]
