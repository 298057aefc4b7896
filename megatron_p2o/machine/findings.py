"""What an examination of a machine or of a run's settings has found, and how it is collected and printed."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from megatron_p2o.errors import expected_messages
from megatron_p2o.terminal import say


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One line of a report."""

    subject: str
    finding: str
    is_missing: bool = False
    """True when the run cannot start here as it is."""
    is_wrong: bool = False
    """True when it could start nowhere: what is missing is wrong with the settings or the files, not with the
    machine."""


class Findings:
    """Collects what is found, and goes on where one thing cannot be used: what does not depend on it is looked at."""

    def __init__(self) -> None:
        self.found: list[Finding] = []

    def tell(self, subject: str, lines: Iterable[str]) -> None:
        """Note what is as it should be."""
        self.found += [Finding(subject=subject, finding=line) for line in lines]

    def miss(self, subject: str, sentences: Iterable[str]) -> None:
        """Note what this machine lacks."""
        self._add(Finding(subject=subject, finding=sentence, is_missing=True) for sentence in sentences)

    def refuse(self, subject: str, sentences: Iterable[str]) -> None:
        """Note what is wrong with the settings or the files."""
        self._add(Finding(subject=subject, finding=each, is_missing=True, is_wrong=True) for each in sentences)

    @contextmanager
    def looking_at(self, subject: str, *, is_of_machine: bool = False) -> Iterator[None]:
        """Note the error of an input that ends the block, and go on after it.

        `is_of_machine`: it is this machine that lacks something.
        """
        try:
            yield
        except Exception as error:
            messages = expected_messages(error)
            if messages is None:
                raise
            (self.miss if is_of_machine else self.refuse)(subject, messages)

    def _add(self, missing: Iterable[Finding]) -> None:
        """Note what is missing, but what has been noted already: two parts may need the same."""
        for finding in missing:
            if all(finding.finding != other.finding for other in self.found):
                self.found.append(finding)


def print_findings(findings: list[Finding], write: Callable[[str], None] = say) -> None:
    """Write one aligned line per finding, and last how many are missing."""
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        mark = "MISSING " if finding.is_missing else ""
        write(f"{finding.subject:<{width}}  {mark}{finding.finding}")
    num_missing = sum(finding.is_missing for finding in findings)
    write(f"{num_missing} of these are missing: see the lines marked MISSING" if num_missing else "nothing is missing")
