"""Reads the reports of an engine's ranks at the end of a refresh, and says what is wrong."""

from collections.abc import Sequence
from pathlib import Path

from megatron_p2o.rollout.buckets.weight_message import RefreshReport, read_refresh_report
from megatron_p2o.terminal import listed

MAX_NAMES_SHOWN = 5


class RefreshFailed(RuntimeError):
    """The engines do not hold the weights they were sent; they serve nothing until a refresh succeeds."""


class MemoryOutOfReach(RefreshFailed):
    """An engine could not open the memory in which a trainer rank or this process left weights."""


def take_report(path: Path) -> RefreshReport:
    """Read a report and remove its file."""
    report = read_refresh_report(path)
    path.unlink()
    return report


def judge(subject: str, reports: Sequence[RefreshReport], *, verify: bool) -> None:
    """Raise an error if an engine's weights are wrong, by the reports of its ranks.

    Args:
        subject: start of the message.

    Raises:
        MemoryOutOfReach: a rank could not open a bucket.
        RefreshFailed: weights are missing, superfluous or different; only with `verify`.
    """
    for rank, report in enumerate(reports):
        if report.unopened:
            raise MemoryOutOfReach(f"{subject} (rank {rank}) could not open a bucket: {report.unopened}")
    complaint = complaint_of(reports)
    if verify and complaint:
        raise RefreshFailed(f"{subject} {complaint}")


def complaint_of(reports: Sequence[RefreshReport]) -> str:
    """Return the error of an engine's weights by the reports of its ranks, or ""."""
    for rank, report in enumerate(reports):
        if report.corrupted:
            return (
                f"(rank {rank}) holds {len(report.corrupted)} weights that differ from the trainer's: "
                f"{listed(report.corrupted, MAX_NAMES_SHOWN)}"
            )
        if report.unwritten:
            return (
                f"(rank {rank}) has {len(report.unwritten)} parameters that no traceable copy filled: "
                f"{listed(report.unwritten, MAX_NAMES_SHOWN)}; either the policy left weights out, or this model "
                "cannot be verified: set rollout.verify_every to 0"
            )
        if report.num_verified == 0:
            return f"(rank {rank}) compared nothing"
    ignored = set.intersection(*(set(report.ignored) for report in reports))
    if ignored:
        return f"has no use for {len(ignored)} weights it was sent: {listed(sorted(ignored), MAX_NAMES_SHOWN)}"
    return ""
