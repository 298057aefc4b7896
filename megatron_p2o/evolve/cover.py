"""Few templates that together solve as many development problems as all of them do (arXiv:2603.21877, Alg. 2)."""

from collections.abc import Mapping


def greedy_cover(solved: Mapping[int, frozenset[str]]) -> list[int]:
    """Return candidates in the order chosen: each adds most newly solved problems, ties to the lowest id.

    Empty when nobody solves anything: the next epoch then asks plainly.
    """
    cover: list[int] = []
    covered: frozenset[str] = frozenset()
    while True:
        gains = {candidate: len(solved[candidate] - covered) for candidate in sorted(solved)}
        best = max(gains, key=lambda candidate: (gains[candidate], -candidate), default=None)
        if best is None or gains[best] == 0:
            return cover
        cover.append(best)
        covered |= solved[best]
