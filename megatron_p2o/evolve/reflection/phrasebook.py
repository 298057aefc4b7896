"""Reflection without a language model: templates are recombined from a file of phrases."""

import hashlib
import random
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_p2o.evolve.reflection.reflection import ReflectionRefused, ReflectionRequest

DEFAULT_MAX_PHRASES = 4
"""Most phrases of a template. A file can change it by a line `# max_phrases: 3`."""

MAX_PHRASES_LINE = re.compile(r"#\s*max_phrases\s*:\s*(\d{1,9})\s*")

HELD_OUT_LINE = re.compile(r"#\s*held_out_wordings\s*:\s*1/(\d{1,9})\s*")
"""A line `# held_out_wordings: 1/4`: of the templates of two phrases or more, only those whose SHA-256 (its first eight
bytes, big-endian) divides by 4 are proposed. A policy whose supervision avoided these has seen none of them."""

MAX_DRAWS = 100
"""Changes tried until one gives a wording that may be proposed."""

MOVE_WEIGHTS = {"add": 5, "replace": 3, "drop": 1, "reorder": 1}
"""Relative frequency of each change, where it is possible."""


class Phrasebook:
    """Changes the parent template by one phrase; blind to feedback, so that search does all the work."""

    def __init__(
        self, phrases: Sequence[str], seed: int, max_phrases: int = DEFAULT_MAX_PHRASES, held_out_divisor: int = 1
    ) -> None:
        self.phrases = tuple(dict.fromkeys(phrases))
        """Distinct, in file order; a template is some of them joined by spaces."""
        self._seed = seed
        self._max_phrases = max_phrases
        self._held_out_divisor = held_out_divisor

    @classmethod
    def from_file(cls, path: Path, seed: int) -> "Phrasebook":
        """Read one phrase per line; blank lines and lines beginning with # are skipped.

        Raises:
            ValueError: there is none, or a line about them holds no number they can have.
        """
        setting = f"evolution.reflection.phrases={path}"
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except UnicodeDecodeError as error:
            raise ValueError(f"{setting} must be a file of UTF-8 text, one phrase per line: convert it") from error
        phrases = [line for line in lines if line and not line.startswith("#")]
        if not phrases:
            raise ValueError(f"{setting} holds no phrase: write one per line")
        limits = [int(match[1]) for line in lines if (match := MAX_PHRASES_LINE.fullmatch(line))]
        divisors = [int(match[1]) for line in lines if (match := HELD_OUT_LINE.fullmatch(line))]
        if 0 in (*limits, *divisors):
            raise ValueError(f"{setting} says 0 in a line that begins with #: write at least 1")
        return cls(phrases, seed, (limits or [DEFAULT_MAX_PHRASES])[-1], (divisors or [1])[-1])

    async def propose(self, request: ReflectionRequest) -> str:
        rng = random.Random(f"phrasebook/{self._seed}/{request.proposal}")
        phrases = self.split(request.parent_text)
        moves = self._possible_moves(phrases)
        if not moves:
            raise ReflectionRefused("no other combination")
        for _ in range(MAX_DRAWS):
            move = rng.choices(moves, [MOVE_WEIGHTS[name] for name in moves])[0]
            changed = self._moved(phrases, move, rng)
            if self._may_propose(changed):
                return " ".join(changed)
        raise ReflectionRefused("no held-out wording within reach")

    async def close(self) -> None:
        """Nothing is held open."""

    def split(self, text: str) -> list[str]:
        """Return the phrases of a template. Text that is not in the book stays together as one phrase."""
        phrases: list[str] = []
        rest = text.strip()
        while rest:
            matching = [phrase for phrase in self.phrases if rest.startswith(phrase)]
            phrase = max(matching, key=len, default=rest)
            phrases.append(phrase)
            rest = rest[len(phrase) :].strip()
        return phrases

    def _may_propose(self, phrases: Sequence[str]) -> bool:
        digest = hashlib.sha256(" ".join(phrases).encode()).digest()
        return len(phrases) < 2 or int.from_bytes(digest[:8], "big") % self._held_out_divisor == 0

    def _possible_moves(self, phrases: Sequence[str]) -> list[str]:
        has_unused = any(phrase not in phrases for phrase in self.phrases)
        is_possible = {
            "add": has_unused and len(phrases) < self._max_phrases,
            "replace": has_unused and len(phrases) > 0,
            "drop": len(phrases) > 1,
            "reorder": len(phrases) > 1,
        }
        return [name for name in MOVE_WEIGHTS if is_possible[name]]

    def _moved(self, phrases: Sequence[str], move: str, rng: random.Random) -> list[str]:
        result = list(phrases)
        place = rng.randrange(len(result) + 1) if move == "add" else rng.randrange(len(result))
        unused = [phrase for phrase in self.phrases if phrase not in result]
        if move == "add":
            result.insert(place, rng.choice(unused))
        elif move == "replace":
            result[place] = rng.choice(unused)
        else:
            moved = result.pop(place)
            if move == "reorder":
                result.insert((place + rng.randrange(1, len(phrases))) % len(phrases), moved)
        return result
