"""Compare proposing from P parents N children each, as gepa 0.1.4 does, with our lineages of one child.

    python tools/compare_proposals.py --seeds 8 --output tools/results/proposals.json
    python tools/compare_proposals.py --record runs/tiny --scores runs/scores.npz   # renew the recorded responses

Whole rounds of the real search at the same rollouts, in virtual time, on two worlds without a model (see
`proposal_worlds.py`). A trial takes its tokens times `TOKEN_S`: engines have room for all. What a library is worth is
the true success of the templates it assigns, which the round does not know.
"""

import argparse
import asyncio
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))  # where PYTHONSAFEPATH leaves it out
sys.path.append(str(Path(__file__).resolve().parents[1] / "experiments"))

from proposal_rules import sharing
from proposal_worlds import Kinds, Recorded, Table, World, draw, record

from megatron_p2o.evolve.process.conduct import open_round, split_of
from megatron_p2o.evolve.record.history import RoundHistory
from megatron_p2o.evolve.record.library import PublishedLibrary
from megatron_p2o.evolve.reflection.reflection import ReflectionRequest
from megatron_p2o.evolve.search.publish import build_library
from megatron_p2o.evolve.search.round import Round
from megatron_p2o.evolve.trial import Trial
from megatron_p2o.simulation.virtual_time import VirtualTimeLoop, simulate

SCORES = Path(__file__).parent / "results" / "proposal_scores.npz"

TOKEN_S = 0.01
"""What a token takes in an engine that samples a dozen, by `megatron_p2o/simulation/hardware.json`."""
MEDIAN_TOKENS, MAX_TOKENS = 3000, 12288
"""Lengths of lognormal responses, as in `p2o plan`."""
REFLECTION_S = 20.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """A way to propose."""

    parents: int
    children: int
    """Proposals in a row that share a parent."""
    waits: bool = False
    """The next proposals wait for all of an iteration, as in gepa; else each lineage goes on by itself."""

    @property
    def name(self) -> str:
        return f"{self.parents} x {self.children}" + (", iterations" if self.waits else "")


ARMS = tuple(
    Arm(parents=parents, children=children, waits=waits)
    for waits in (False, True)
    for parents, children in ((16, 1), (4, 4), (2, 8))
)
BASE = ARMS[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a round led to."""

    success: float
    """True success of the assigned templates, mean over the hard problems."""
    num_proposals: int
    num_candidates: int
    num_rollouts: int
    round_s: float


class Runner:
    """Answers from a world."""

    def __init__(self, world: World, seed: int) -> None:
        self._world = world
        self._seed = seed

    async def run_trial(self, template_text: str, problem_id: str, *, temperature: float, sample: int = 0) -> Trial:
        drawn = draw(self._seed, "length", template_text, problem_id).standard_normal()
        num_tokens = max(1, min(MAX_TOKENS, int(MEDIAN_TOKENS * math.exp(drawn))))
        await asyncio.sleep(num_tokens * TOKEN_S)
        return Trial(
            reward=float(self._world.is_solved(template_text, problem_id)),
            response_text="",
            finish_reason="stop",
            num_tokens=num_tokens,
            weight_version=0,
        )


class Slow:
    """A reflector that takes its time."""

    def __init__(self, world: World) -> None:
        self._reflector = world.reflector

    async def propose(self, request: ReflectionRequest) -> str:
        await asyncio.sleep(REFLECTION_S)
        return await self._reflector.propose(request)

    async def close(self) -> None: ...


def round_in(world: World, seed: int, append: Callable[[object], None] = lambda _: None) -> Round:
    """Return a round that has not begun. `append` is given its events."""
    split = split_of(world.spec)
    assert split is not None
    history = RoundHistory([], append, world.spec.fingerprint())
    return open_round(world.spec, split, history, Runner(world, seed), Slow(world), print)


def run_arm(round_: Round, arm: Arm) -> float:
    """Run a whole round and return its seconds."""

    async def search(loop: VirtualTimeLoop) -> float:
        await sharing(arm.children, waits=arm.waits)(round_)
        return loop.time()

    return simulate(search)


def outcome_of(world: World, arm: Arm, seed: int) -> Outcome:
    round_ = round_in(world, seed)
    round_s = run_arm(round_, arm)
    return Outcome(
        success=round(true_success(world, build_library(round_)), 4),
        num_proposals=len(round_.history.picks),
        num_candidates=len(round_.history.candidate_of),
        num_rollouts=round_.history.num_scored,
        round_s=round(round_s),
    )


def true_success(world: World, library: PublishedLibrary) -> float:
    """Return the mean over the problems of the mean true success of their templates."""
    by_problem = (
        [world.rate(template.text, problem.id) for template in library.assignments.get(problem.id, ())]
        for problem in world.spec.problems
    )
    return fmean(fmean(rates or [0.0]) for rates in by_problem)


def table_rows(outcomes: dict[str, list[dict[str, float]]]) -> list[str]:
    """Return the rows of the guide's table of a world: means, with the standard deviation over the seeds, and the mean
    difference from `BASE` on the same seeds, with its standard error.
    """
    base = [outcome["success"] for outcome in outcomes[BASE.name]]
    rows: list[str] = []
    for name, found in outcomes.items():
        success = [outcome["success"] for outcome in found]
        differences = [mine - other for mine, other in zip(success, base, strict=True)]
        error = stdev(differences) / math.sqrt(len(differences))
        difference = "" if name == BASE.name else f"{fmean(differences):+.3f} ± {error:.3f}"
        proposals, candidates, seconds = (
            f"{fmean(outcome[field] for outcome in found):,.0f}"
            for field in ("num_proposals", "num_candidates", "round_s")
        )
        cells = [name, f"{fmean(success):.3f} ± {stdev(success):.3f}", difference, proposals, candidates, seconds]
        rows.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", type=Path, default=SCORES, help="file of recorded responses")
    parser.add_argument("--record", type=Path, help="folder of the tiny policy (python -m megatron_p2o.tiny.policy)")
    parser.add_argument("--temperature", type=float, default=0.8, help="of the recorded responses")
    parser.add_argument("--seeds", type=int, default=8, help="rounds of each arm in each world")
    parser.add_argument("--output", type=Path, help="JSON file of all outcomes")
    options = parser.parse_args()
    if options.record is not None:
        table = record(options.record, options.temperature, seed=1)
        np.savez_compressed(options.scores, solved=table.solved, families=table.families)
        return
    saved = np.load(options.scores)
    table = Table(saved["solved"], saved["families"])
    worlds: dict[str, Callable[[int], World]] = {"recorded": lambda seed: Recorded(table, seed), "kinds": Kinds}
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for name, make in worlds.items():
        found[name] = {
            arm.name: [asdict(outcome_of(make(seed), arm, seed)) for seed in range(1, options.seeds + 1)]
            for arm in ARMS
        }
        print(name, *table_rows(found[name]), sep="\n", flush=True)
    if options.output is not None:
        options.output.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
