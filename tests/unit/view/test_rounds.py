"""Rounds that are read while they run, against the history that evolution itself keeps."""

from pathlib import Path

import pytest

from megatron_p2o.evolve.record.history import (
    CONTROL_OCCASION,
    Accepted,
    Disqualified,
    Ended,
    Picked,
    Published,
    Reflected,
    RoundHistory,
    Scored,
    template_digest,
)
from megatron_p2o.evolve.record.journal import Journal
from megatron_p2o.evolve.trial import Trial
from megatron_p2o.view.rounds import ViewedRound


def trial(reward: float, num_tokens: int = 5) -> Trial:
    return Trial(reward=reward, response_text="", finish_reason="stop", num_tokens=num_tokens, weight_version=3)


def scored(text: str, problem_id: str, reward: float, occasion: str = "") -> Scored:
    return Scored(template=template_digest(text), problem_id=problem_id, occasion=occasion, trial=trial(reward))


BEGINNING = (
    scored("", "a", 0.0),
    scored("", "b", 0.0),
    Picked(proposal=0, parent=0, minibatch=("a", "b")),
    Reflected(proposal=0, text="Count."),
    scored("Count.", "a", 1.0),
    scored("Count.", "a", 0.5, occasion="again"),
    scored("Count.", "b", 0.0),
    Accepted(proposal=0, candidate=7),
    Ended(proposal=0, outcome="accepted"),
    Picked(proposal=1, parent=7, minibatch=("b",)),
    Reflected(proposal=1, text="Count!", refusal="duplicate"),
    Ended(proposal=1, outcome="refused: duplicate"),
    Picked(proposal=2, parent=7, minibatch=("a",)),
)
REST = (
    scored("", "a", 1.0, occasion=f"{CONTROL_OCCASION}0"),
    Disqualified(candidate=7, reason="prompt too long"),
    Published(version=4, ended_by="budget"),
)


REFLECTS = "reflection writes"


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "journal-0002.jsonl"


def test_a_round_is_followed_as_its_journal_grows(journal: Path) -> None:
    with Journal(journal) as opened:
        history = RoundHistory([], opened.append, "fingerprint", max_rollouts=90)
        for event in BEGINNING:
            history.add(event)
        viewed = ViewedRound(journal)
        viewed.catch_up()
        assert (viewed.number, viewed.published, viewed.max_rollouts) == (2, None, 90)
        assert [(each.proposal, each.parent, each.stage) for each in viewed.lineages()] == [(2, 7, REFLECTS)]
        plain, child = viewed.candidates()
        assert (plain.id, plain.parent, plain.mean_score) == (0, None, 0.0)
        assert (child.id, child.parent, child.text, child.minibatch) == (7, 0, "Count.", ("a", "b"))
        assert {name: (score.mean, score.num_trials) for name, score in child.scores.items()} == {
            "a": (0.75, 2),
            "b": (0.0, 1),
        }
        assert child.mean_score == pytest.approx(0.375)
        assert [(refusal.text, refusal.outcome) for refusal in viewed.refusals()] == [("Count!", "refused: duplicate")]
        for event in REST:
            history.add(event)
        viewed.catch_up()
        assert viewed.published == Published(version=4, ended_by="budget")
        assert viewed.reflection(2) is None, "it has not answered"
        assert viewed.candidates()[1].disqualified == "prompt too long"
        assert viewed.outcome_counts() == history.outcome_counts()
        assert (viewed.num_rollouts, viewed.num_control_rollouts) == (history.num_scored, 1)
        assert viewed.num_tokens == history.num_tokens + 5


def test_a_lineage_is_told_by_what_its_proposal_waits_for(journal: Path) -> None:
    stages: list[tuple[str, int | None]] = []
    with Journal(journal) as opened:
        history = RoundHistory([], opened.append, "fingerprint")
        viewed = ViewedRound(journal)
        for events in (
            (scored("", "a", 0.0), Picked(proposal=0, parent=0, minibatch=("a", "b"))),
            (scored("", "b", 0.0),),
            (Reflected(proposal=0, text="Count."),),
            (scored("Count.", "a", 1.0), Accepted(proposal=0, candidate=1)),
        ):
            for event in events:
                history.add(event)
            viewed.catch_up()
            (lineage,) = viewed.lineages()
            stages.append((lineage.stage, lineage.candidate))
        history.add(Ended(proposal=0, outcome="accepted"))
    viewed.catch_up()
    assert stages == [
        ("the parent is tried", None),
        (REFLECTS, None),
        ("its text is compared with the parent", None),
        ("its candidate is tried on development problems", 1),
    ]
    assert viewed.lineages() == [] and viewed.max_rollouts is None


def test_a_damaged_line_is_named_and_nothing_behind_it_is_shown(journal: Path) -> None:
    with Journal(journal) as opened:
        history = RoundHistory([], opened.append, "fingerprint")
        for event in BEGINNING[:2]:
            history.add(event)
    content = journal.read_bytes()
    journal.write_bytes(content + b"5 00000000 wrong\n" + content)
    viewed = ViewedRound(journal)
    viewed.catch_up()
    assert viewed.num_rollouts == 2
    assert viewed.damage == (f"{journal}:4 cannot be read (its length or checksum is wrong): what follows is not shown")


def test_a_reflection_shows_what_the_parent_did_before_it(journal: Path) -> None:
    with Journal(journal) as opened:
        history = RoundHistory([], opened.append, "fingerprint")
        for event in (*BEGINNING, *REST, scored("Count.", "b", 0.25)):
            history.add(event)
    viewed = ViewedRound(journal)
    viewed.catch_up()
    first, second = viewed.reflection(0), viewed.reflection(1)
    assert first is not None and second is not None
    assert (first.parent, first.parent_text, first.text, first.refusal) == (0, "", "Count.", "")
    assert first.examples == {"a": trial(0.0), "b": trial(0.0)}
    assert (second.parent, second.parent_text, second.text, second.refusal) == (7, "Count.", "Count!", "duplicate")
    assert second.examples == {"b": trial(0.0)}, "the later trial was not known yet"
    assert [candidate.proposal for candidate in viewed.candidates()] == [None, 0]
