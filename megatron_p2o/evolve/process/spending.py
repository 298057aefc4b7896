"""Counts the tokens of the rounds of a run from their journals, also of one that still runs or was cut off."""

from dataclasses import dataclass, field
from pathlib import Path

from megatron_p2o.evolve.process.conduct import journal_paths
from megatron_p2o.evolve.record.history import CONTROL_OCCASION, Event, Picked, Reflected, Scored, event_from_json
from megatron_p2o.evolve.record.journal import decode_line


@dataclass(kw_only=True, slots=True)
class RoundTokens:
    """Tokens of one or more rounds."""

    minibatch: int = 0
    """Sampled by trials on feedback problems."""
    development: int = 0
    """Sampled by trials on development problems."""
    control: int = 0
    """Sampled by the plain control."""
    reflection_prompt: int = 0
    reflection_completion: int = 0
    num_unknown: int = 0
    """Replies of reflection whose endpoint did not count."""

    def add(self, other: "RoundTokens") -> None:
        """Add those of another round."""
        for name in RoundTokens.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(kw_only=True, slots=True)
class _Followed:
    """How far a journal has been read."""

    inode: int
    num_bytes: int = 0
    tokens: RoundTokens = field(default_factory=RoundTokens)
    feedback_ids: set[str] = field(default_factory=set[str])
    """Feedback problems: those of minibatches. Each is drawn before it is tried."""


class RoundSpending:
    """Follows the journals of a run; reads only what is new."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._followed: dict[Path, _Followed] = {}

    def tokens(self, num_epochs: int) -> RoundTokens:
        """Return what the rounds after the first `num_epochs` epochs have spent so far.

        A round that begins again, because problems or settings have changed, counts from its new beginning.
        """
        total = RoundTokens()
        for epoch in range(num_epochs):
            for path in journal_paths(self._run_dir, epoch):
                total.add(self._of_round(path))
        return total

    def _of_round(self, path: Path) -> RoundTokens:
        stat = path.stat()
        followed = self._followed.get(path)
        if followed is None or followed.inode != stat.st_ino or followed.num_bytes > stat.st_size:
            followed = self._followed[path] = _Followed(inode=stat.st_ino)
        if followed.num_bytes < stat.st_size:
            _follow(path, followed)
        return followed.tokens


def _follow(path: Path, followed: _Followed) -> None:
    """Take in the whole lines after those that were read. One that is damaged ends it, as it ends the journal."""
    with path.open("rb") as file:
        file.seek(followed.num_bytes)
        for line in file:
            record = decode_line(line.removesuffix(b"\n")) if line.endswith(b"\n") else None
            if record is None:
                return
            _count(event_from_json(record[0]), followed)
            followed.num_bytes += len(line)


def _count(event: Event, followed: _Followed) -> None:
    tokens = followed.tokens
    match event:
        case Picked():
            followed.feedback_ids.update(event.minibatch)
        case Scored() if event.occasion.startswith(CONTROL_OCCASION):
            tokens.control += event.trial.num_tokens
        case Scored() if event.problem_id in followed.feedback_ids:
            tokens.minibatch += event.trial.num_tokens
        case Scored():
            tokens.development += event.trial.num_tokens
        case Reflected():
            tokens.reflection_prompt += event.prompt_tokens
            tokens.reflection_completion += event.completion_tokens
            tokens.num_unknown += event.num_unknown
        case _:
            pass
