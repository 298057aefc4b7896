"""Finds what helps: the known name that is nearest to an unknown one, the command that makes a missing file."""

import difflib
import re
from collections.abc import Collection, Mapping
from pathlib import Path

CUTOFF = 0.75
"""Share of letters in common, in order, from which two names are alike: `lrr` and `lr` are, `reward` and `head` not."""

MIN_BEGINNING = 3
"""Letters from which the beginning of a name stands for it: `temp`."""


def nearest(name: str, known: Collection[str]) -> str | None:
    """Return the known name that is most like `name`, or begins with it; None when none is."""
    alike = difflib.get_close_matches(name, known, n=1, cutoff=CUTOFF)
    begun = [other for other in known if len(name) >= MIN_BEGINNING and other.startswith(name)]
    return next(iter([*alike, *begun]), None)


def did_you_mean(name: str, known: Collection[str], prefix: str = "") -> str:
    """Return ": did you mean <prefix><nearest>?" for the end of a sentence; "" when no name is near."""
    near = nearest(name, known)
    return "" if near is None else f": did you mean {prefix}{near}?"


TINY = "python -m megatron_p2o.tiny.policy"

WRITERS: Mapping[str, str] = {
    r"(.*/)?tasks/(?P<task>palindrome|code|reasoning_gym|partial_credit)": "python examples/tasks/{task}/prepare.py",
    r"(.*/)?tiny-seed(?P<seed>\d+)": TINY + " --seed {seed}",
    r"(.*/)?tiny_leaning": TINY + " --regime leaning",
    r"(.*/)?tiny": TINY,
}
"""Folders of the examples, and the command that writes what is in them; it takes the folder after `--out`."""

FETCHED: Mapping[str, str] = {"SmolLM2-135M-Instruct": "python tools/fetch_smollm2.py"}
"""Models that a tool of ours fetches; it takes the folder after `--out`."""

DOWNLOADED = {"Qwen": "Qwen"}
"""How the name of a model begins, and who publishes it on Hugging Face."""


def model_command(path: str) -> str:
    """Return how a model gets into the folder `path`."""
    name, folder = Path(path).name, Path(path).parent.as_posix()
    if name in FETCHED:
        return f"fetch it: {FETCHED[name]} --out {path}"
    if name == "model" and (writer := _writer_of(folder)):
        return f"write the tiny policy: {writer}"
    owners = (owner for beginning, owner in DOWNLOADED.items() if name.startswith(beginning))
    owner = next(owners, None)
    if owner is not None:
        return f"download it: hf download {owner}/{name} --local-dir {path}"
    return f"download a model by its name on Hugging Face: hf download ORG/NAME --local-dir {path}"


def problems_command(file: str) -> str:
    """Return how a file of problems is made; "" where no command of ours makes it."""
    path = Path(file)
    if path.suffix == ".jsonl" and path.parts[:1] == ("data",):
        return "make the paper's problems: python tools/prepare_data.py (docs/data.md)"
    folder = path.parent.parent if path.parent.name == "problems" else path.parent
    writer = _writer_of(folder.as_posix())
    return f"write it: {writer}" if writer else ""


def _writer_of(folder: str) -> str:
    for pattern, command in WRITERS.items():
        if found := re.fullmatch(pattern, folder):
            return f"{command.format(**found.groupdict())} --out {folder}"
    return ""
