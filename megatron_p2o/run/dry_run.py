"""What `p2o train --dry-run` prints: what the run would read, need and take, with nothing started."""

import os
from collections.abc import Sequence
from pathlib import Path

from megatron_p2o.config.tree import Config
from megatron_p2o.errors import SeveralErrors
from megatron_p2o.machine.findings import Finding
from megatron_p2o.run.before.examination import HOURS, INPUTS, SO_FAR, examine_run
from megatron_p2o.terminal import say

PLAN, MACHINE = "problems and plan", "machine"

PARTS = {INPUTS: PLAN, HOURS: PLAN, SO_FAR: SO_FAR}
"""Title under which findings on a subject are printed; all others stand under `MACHINE`."""

SELF_EXPLANATORY = (INPUTS, HOURS, SO_FAR, MACHINE, "plan")
"""Subjects whose findings begin with what they are about."""


def dry_run(config: Config, path: Path) -> None:
    """Print everything that can be known of a run before it starts. Starts nothing.

    What only this machine lacks is printed and is no error: settings are checked on a laptop for a cluster.

    Args:
        path: the settings' file, for the last line.

    Raises:
        ValueError: files, rows, prompts or settings are bad; the message names everything that is.
    """
    findings = examine_run(config, os.environ)
    fine = [finding for finding in findings if not finding.is_missing]
    for title in (PLAN, MACHINE, SO_FAR):
        lines = [_line(finding) for finding in fine if PARTS.get(finding.subject, MACHINE) == title]
        if lines:
            say_part(title, lines)
    lacking = [finding for finding in findings if finding.is_missing and not finding.is_wrong]
    for finding in lacking:
        say(f"not on this machine: {finding.finding}")
    wrong = [finding.finding for finding in findings if finding.is_wrong]
    if len(wrong) > 1:
        raise SeveralErrors(wrong)
    if wrong:
        raise ValueError(wrong[0])
    if lacking:
        say(f"the settings are right, but not for this machine: p2o doctor {path} --strict fails on what it lacks")
    else:
        say("nothing is missing: the run can start")


def _line(finding: Finding) -> str:
    is_whole = finding.subject in SELF_EXPLANATORY
    return finding.finding if is_whole else f"{finding.subject}: {finding.finding}"


MAX_SUBJECT_CHARACTERS = 30
"""Longest beginning of a line that stands in a column of its own."""


def say_part(title: str, lines: Sequence[str]) -> None:
    """Print lines under a title, in two columns: what a line says before its first colon, and the rest."""
    say(f"{title}:")
    pairs = [line.partition(": ") for line in lines]
    subjects = [head for head, colon, _ in pairs if colon and len(head) <= MAX_SUBJECT_CHARACTERS]
    width = max(map(len, subjects), default=0)
    for line, (head, colon, rest) in zip(lines, pairs, strict=True):
        is_pair = colon and len(head) <= MAX_SUBJECT_CHARACTERS
        say(f"  {head:<{width}}  {rest}" if is_pair else f"  {line}")
