"""`p2o init`: asks for what a first run needs, looks at it, and writes settings that pass the dry run."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_p2o.files import write_whole
from megatron_p2o.run.before.draft import (
    TASKS,
    DraftLine,
    drafted_config,
    given_settings,
    reward_lines,
    settings_text,
    size_lines,
    with_given,
)
from megatron_p2o.run.before.look import FileFacts, ModelFacts, longest_prompt, look_at_file, look_at_model, problems_in
from megatron_p2o.run.dry_run import dry_run
from megatron_p2o.terminal import say

Ask = Callable[[str], str]
"""Asks a question on the terminal and returns what was typed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What a first run is made of; "" where it is not known yet."""

    model: str = ""
    problems: str = ""
    heldout: str = ""
    """File of problems that the policy is measured on."""
    task: str = ""


def write_first_settings(wanted: Wanted, overrides: Sequence[str], path: Path, ask: Ask | None) -> None:
    """Write settings to `path` once they have passed the dry run, which is printed.

    Args:
        overrides: settings of the user ("schedule.epochs=4").
        ask: None: nobody can be asked.

    Raises:
        ValueError: something is missing or cannot be used; nothing is written then.
    """
    if path.exists():
        raise ValueError(f"{path} exists: give another file, --output FILE, or remove it")
    wanted, given, has_gpu = completed(wanted, ask), given_settings(overrides), torch.cuda.is_available()
    model, file = look_at_model(wanted.model), look_at_file(wanted.problems)
    lines = with_given([*place_lines(wanted, has_gpu=has_gpu), *reward_lines(wanted.task, file, given)], given)
    config = drafted_config(lines)
    problems = problems_in(wanted.problems, config.data)
    longest = longest_prompt(problems, config.model, config.data)
    lines = with_given([*lines, *size_lines(model, len(problems), longest, given, has_gpu=has_gpu)], given)
    config = drafted_config(lines)
    dry_run(config, path)
    write_whole(path, settings_text(head_of(model, file, len(problems)), lines))
    say(f"{path} written; to train: p2o train {path}; first, what this machine lacks: p2o doctor {path}")


def head_of(model: ModelFacts, file: FileFacts, num_problems: int) -> list[str]:
    """Return the first lines of the file: what was found."""
    return [
        "Settings of a first run, by `p2o init`. docs/settings.md lists all others.",
        f"Model: {model}.",
        f"Problems: {num_problems} in {file.path}, with the columns {', '.join(file.columns)}.",
    ]


def completed(wanted: Wanted, ask: Ask | None) -> Wanted:
    """Return `wanted` with the answers to what is open in it; nothing is asked where no answer is needed.

    Raises:
        ValueError: nobody can be asked for the model or the problems, or an answer is blank.
    """
    open_options = [f"--{name}" for name in ("model", "problems") if not getattr(wanted, name)]
    if open_options and ask is None:
        raise ValueError(f"p2o init needs {' and '.join(open_options)} where there is no terminal to ask on")
    if ask is None or not open_options:
        return replace(wanted, task=wanted.task or TASKS[0])
    found = next(_model_folders(), "")
    model = wanted.model or ask(f"Folder of the model{f' [{found}]' if found else ''}: ").strip() or found
    problems = wanted.problems or ask("File of the problems (JSONL, JSON, CSV, parquet): ").strip()
    if not model or not problems:
        raise ValueError("p2o init needs a model and problems: give their paths")
    heldout = wanted.heldout or ask("File of held-out problems to measure the policy on [none]: ").strip()
    task = wanted.task or ask(f"What rewards an answer: {', '.join(TASKS)} or file.py:function [{TASKS[0]}]: ").strip()
    return Wanted(model=model, problems=problems, heldout=heldout, task=task or TASKS[0])


def _model_folders() -> Iterator[str]:
    """Yield the folders here and in models/ that hold a model."""
    for pattern in ("models/*/config.json", "*/config.json"):
        yield from (str(path.parent) for path in sorted(Path().glob(pattern)))


def place_lines(wanted: Wanted, *, has_gpu: bool) -> list[DraftLine]:
    """Return where the run, its model and its problems are, and what the machine asks for."""
    name = f"{Path(wanted.model).name}-{Path(wanted.problems).stem}"
    comment = "This machine has no GPU: delete this line on one."
    dtype = [] if has_gpu else [DraftLine(name=("model", "dtype"), value="float32", comment=comment)]
    comment = "Asked without templates, every evaluation.every_steps steps and at the end."
    heldout = [DraftLine(name=("data", "evaluation", "heldout"), value=wanted.heldout, comment=comment)]
    return [
        DraftLine(name=("run", "name"), value=name, comment="The run's folder below runs/."),
        DraftLine(name=("model", "path"), value=wanted.model),
        *dtype,
        DraftLine(name=("data", "train"), value=wanted.problems),
        *(heldout if wanted.heldout else ()),
    ]
