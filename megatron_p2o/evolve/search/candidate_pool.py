"""The candidates of a round, their scores on the development problems, and the front of each problem."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_p2o.evolve.trial import is_solved
from megatron_p2o.types import Template


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """Reward of one candidate on one problem, and the policy it was measured on."""

    reward: float
    weight_version: int
    solved_share: float | None = None
    """As `Trial.solved_share`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A template in the running."""

    id: int
    """Position in the pool; 0 is the empty template."""
    text: str
    parent: int | None
    """Index of the parent; None for candidates the round started with."""
    lineage_problem_ids: frozenset[str]
    """Problems whose feedback and gold answer it or an ancestor has seen."""


class CandidatePool:
    """Grows during a round; a candidate is never removed but may be disqualified."""

    def __init__(self, dev_problem_ids: Sequence[str]) -> None:
        self.dev_problem_ids = tuple(dev_problem_ids)
        """Order in which candidates are scored."""
        self._candidates: list[Candidate] = []
        self._scores: list[dict[str, Score]] = []
        self._disqualified: set[int] = set()
        self._fronts: dict[str, frozenset[int]] = {problem_id: frozenset() for problem_id in dev_problem_ids}

    def __len__(self) -> int:
        return len(self._candidates)

    def __getitem__(self, candidate_id: int) -> Candidate:
        return self._candidates[candidate_id]

    def add(self, text: str, parent: int | None, lineage_problem_ids: frozenset[str] = frozenset()) -> Candidate:
        candidate = Candidate(
            id=len(self._candidates), text=text, parent=parent, lineage_problem_ids=lineage_problem_ids
        )
        self._candidates.append(candidate)
        self._scores.append({})
        return candidate

    def record(self, candidate_id: int, problem_id: str, score: Score) -> None:
        """Set the score of a candidate on a development problem; a newer one replaces the old."""
        self._scores[candidate_id][problem_id] = score
        self._renew_front(problem_id)

    def disqualify(self, candidate_id: int) -> None:
        """Take a candidate out of fronts, selection and cover: its template cannot be used."""
        self._disqualified.add(candidate_id)
        for problem_id in self._scores[candidate_id]:
            self._renew_front(problem_id)

    def qualified(self) -> list[Candidate]:
        return [candidate for candidate in self._candidates if candidate.id not in self._disqualified]

    def is_known(self, text: str) -> bool:
        return any(candidate.text == text for candidate in self._candidates)

    def scores(self, candidate_id: int) -> Mapping[str, Score]:
        return self._scores[candidate_id]

    def mean_reward(self, candidate_id: int) -> float:
        """Mean over the development problems it was measured on; 0 before the first."""
        scores = self._scores[candidate_id].values()
        return sum(score.reward for score in scores) / len(scores) if scores else 0.0

    def solved(self, candidate_id: int) -> frozenset[str]:
        if candidate_id in self._disqualified:
            return frozenset()
        scores = self._scores[candidate_id].items()
        return frozenset(problem_id for problem_id, score in scores if is_solved(score.reward, score.solved_share))

    def fronts(self) -> Mapping[str, frozenset[int]]:
        """Return for each development problem the candidates with the best reward on it, ties included (at 0 too)."""
        return self._fronts

    def template(self, candidate_id: int) -> Template:
        """Return the candidate as the library publishes it."""
        candidate = self._candidates[candidate_id]
        versions = [score.weight_version for score in self._scores[candidate_id].values()]
        return Template(
            id=candidate.id,
            text=candidate.text,
            parent=candidate.parent,
            lineage_problem_ids=candidate.lineage_problem_ids,
            score=self.mean_reward(candidate_id),
            weight_version=max(versions, default=0),
        )

    def _renew_front(self, problem_id: str) -> None:
        rewards = {
            candidate.id: self._scores[candidate.id][problem_id].reward
            for candidate in self.qualified()
            if problem_id in self._scores[candidate.id]
        }
        best = max(rewards.values(), default=0.0)
        self._fronts[problem_id] = frozenset(key for key, reward in rewards.items() if reward == best)
