"""A round beside training: training takes its library when there is one, and never waits for it."""

from collections.abc import Sequence
from concurrent.futures import Future

from megatron_p2o.evolve.process.beside import BesideTraining
from megatron_p2o.evolve.record.library import EMPTY_LIBRARY, PublishedLibrary
from megatron_p2o.interfaces import TemplateLibrary
from megatron_p2o.testing.fakes import fake_problem
from megatron_p2o.types import Problem, RunningRound, Template

HARD = [fake_problem(1), fake_problem(2)]
PUBLISHED = PublishedLibrary(version=1, templates=(Template(id=1, text="count.", parent=0),))


class Rounds:
    """Rounds that end when the test says so."""

    def __init__(self) -> None:
        self.libraries: list[Future[PublishedLibrary]] = []

    def start(self, hard: Sequence[Problem], library: TemplateLibrary, epoch: int) -> Future[PublishedLibrary]:
        self.libraries.append(Future())
        return self.libraries[-1]


def test_training_goes_on_with_what_there_is_until_the_round_has_ended() -> None:
    rounds = Rounds()
    evolution = BesideTraining(rounds)
    assert evolution.evolve(HARD, EMPTY_LIBRARY, 0) is EMPTY_LIBRARY
    assert evolution.newest(EMPTY_LIBRARY) is EMPTY_LIBRARY
    assert evolution.running == RunningRound(epoch=0, problem_ids=("problem-001", "problem-002"))
    rounds.libraries[0].set_result(PUBLISHED)
    assert evolution.newest(EMPTY_LIBRARY) is PUBLISHED
    assert evolution.running is None
    assert evolution.newest(PUBLISHED) is PUBLISHED


def test_one_round_runs_at_a_time() -> None:
    rounds = Rounds()
    evolution = BesideTraining(rounds)
    evolution.evolve(HARD, EMPTY_LIBRARY, 0)
    assert evolution.evolve(HARD[:1], EMPTY_LIBRARY, 1) is EMPTY_LIBRARY
    assert len(rounds.libraries) == 1
    rounds.libraries[0].set_result(PUBLISHED)
    assert evolution.evolve(HARD[:1], EMPTY_LIBRARY, 2) is PUBLISHED, "the old round's, while the next begins"
    assert evolution.running == RunningRound(epoch=2, problem_ids=("problem-001",))


def test_a_round_that_is_lost_leaves_the_library_in_force() -> None:
    rounds = Rounds()
    evolution = BesideTraining(rounds)
    evolution.evolve(HARD, PUBLISHED, 0)
    rounds.libraries[0].set_exception(RuntimeError("service gone"))
    assert evolution.newest(PUBLISHED) is PUBLISHED
    assert evolution.running is None


def test_a_round_whose_problems_were_solved_meanwhile_is_ended() -> None:
    rounds = Rounds()
    evolution = BesideTraining(rounds)
    evolution.evolve(HARD, PUBLISHED, 0)
    cleared = PUBLISHED.cleared()
    assert evolution.newest(cleared) is cleared
    assert rounds.libraries[0].cancelled()
    assert evolution.running is None
