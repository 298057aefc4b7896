"""What evolution keeps on disk and sends over its socket: library files, journals, messages."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_p2o.evolve.process.messages import (
    FinishRound,
    Message,
    Notice,
    RoundPublished,
    StartRound,
    TrialReply,
    TrialRequest,
    decode,
    encode,
)
from megatron_p2o.evolve.record.history import (
    Accepted,
    Disqualified,
    Ended,
    ForeignJournal,
    Picked,
    Published,
    Reflected,
    RoundHistory,
    Scored,
    template_digest,
)
from megatron_p2o.evolve.record.journal import Journal, encode_line, read_journal
from megatron_p2o.evolve.record.library import EMPTY_LIBRARY, PublishedLibrary, library_path, load_library
from megatron_p2o.evolve.search.publish import RoundStats
from megatron_p2o.evolve.trial import FreeScore, Trial
from megatron_p2o.testing.evolution import make_problems, round_spec
from megatron_p2o.types import PLAIN, Problem, Template

FIRST = Template(id=3, text="Mind\nthe units. é ∑", parent=1, lineage_problem_ids=frozenset({"b", "a"}), score=0.25)
SECOND = Template(id=7, text="Draw it.", parent=None, score=0.125, weight_version=9)
LIBRARY = PublishedLibrary(
    version=2, templates=(FIRST, SECOND), assignments={"p": (FIRST, SECOND, PLAIN), "q": (SECOND, SECOND, PLAIN)}
)
TRIAL = Trial(reward=1.0, response_text="so \\boxed{4}\n", finish_reason="stop", num_tokens=12, weight_version=5)


def problem(problem_id: str) -> Problem:
    return Problem(id=problem_id, question="?", answer="!")


# Library


def test_library_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    path = LIBRARY.save(tmp_path)
    assert path == library_path(tmp_path, 2) == tmp_path / "templates" / "library-2.json"
    assert load_library(path) == LIBRARY
    assert [entry.name for entry in path.parent.iterdir()] == ["library-2.json"], "no temporary file stays behind"


def test_problem_without_templates_is_asked_plainly() -> None:
    assert LIBRARY.assigned(problem("q")) == (SECOND, SECOND, PLAIN)
    assert LIBRARY.assigned(problem("unknown")) == ()
    assert EMPTY_LIBRARY.assigned(problem("p")) == () and EMPTY_LIBRARY.version == 0


def test_cleared_library_is_the_next_version_and_holds_nothing() -> None:
    assert LIBRARY.cleared() == PublishedLibrary(version=3)


def test_altered_library_file_is_refused(tmp_path: Path) -> None:
    path = LIBRARY.save(tmp_path)
    content = path.read_text()
    path.write_text(content.replace("Draw it.", "Draw that."))
    with pytest.raises(ValueError, match=r"library-2\.json does not match its checksum"):
        load_library(path)
    path.write_text(content[: len(content) // 2])
    with pytest.raises(ValueError, match="is not a template library"):
        load_library(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="is not a template library"):
        load_library(path)
    with pytest.raises(FileNotFoundError):
        load_library(library_path(tmp_path, 99))


# Journal


def test_journal_replays_what_was_appended_in_order(tmp_path: Path) -> None:
    records = [{"text": "line\nbreak é", "value": 0.1}, None, [1, 2], "x" * 100_000]
    with Journal(tmp_path / "deep" / "j.jsonl") as journal:
        assert journal.records == []
        for record in records:
            journal.append(record)
    with Journal(tmp_path / "deep" / "j.jsonl") as journal:
        assert journal.records == records and journal.num_dropped_bytes == 0
        journal.append("more")
    assert read_journal(tmp_path / "deep" / "j.jsonl")[0] == [*records, "more"]


def test_journal_cut_at_any_byte_keeps_the_whole_lines_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    lines = [encode_line({"number": number}) for number in range(3)]
    content = b"".join(lines)
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        num_whole = sum(cut >= sum(map(len, lines[: count + 1])) for count in range(3))
        with Journal(path) as journal:
            assert journal.records == [{"number": number} for number in range(num_whole)]
            assert journal.num_dropped_bytes == cut - sum(map(len, lines[:num_whole]))
            journal.append("after")
        assert read_journal(path)[0] == [*({"number": number} for number in range(num_whole)), "after"]


def test_journal_drops_everything_from_a_corrupted_byte_on(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    lines = [encode_line({"number": number}) for number in range(4)]
    content = b"".join(lines)
    rng = random.Random(0)
    for _ in range(300):
        position = rng.randrange(len(content))
        damaged = bytearray(content)
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(damaged))
        line = next(index for index in range(4) if position < sum(map(len, lines[: index + 1])))
        records, num_bytes = read_journal(path)
        assert records == [{"number": number} for number in range(line)]
        assert num_bytes == sum(map(len, lines[:line]))
        with Journal(path) as journal:
            aside = [each for each in tmp_path.iterdir() if ".damaged-" in each.name]
            if damaged.find(b"\n", num_bytes) < 0:  # the newline itself: what a kill leaves
                assert (journal.damage, aside) == ("", [])
                continue
            assert f"j.jsonl:{line + 1} is damaged: the {line} records before it count" in journal.damage
            assert [each.read_bytes() for each in aside] == [bytes(damaged)]
            assert aside[0].name in journal.damage
            aside[0].unlink()
        assert read_journal(path) == (records, num_bytes)


# History


def test_history_replays_to_the_state_it_had() -> None:
    written: list[object] = []
    history = RoundHistory([], written.append, "round-a")
    scored = Scored(template=template_digest("z"), problem_id="p", occasion="", trial=TRIAL)
    for event in (
        Picked(proposal=0, parent=0, minibatch=("p", "q")),
        Picked(proposal=1, parent=0, minibatch=("q", "r")),
        scored,
        replace(scored, occasion="control/0"),
        Reflected(proposal=0, text="z"),
        Reflected(proposal=1, text="", refusal="empty"),
        Accepted(proposal=0, candidate=1),
        Disqualified(candidate=1, reason="too long"),
        Ended(proposal=1, outcome="refused: empty"),
        Published(version=4, ended_by="budget"),
    ):
        history.add(event)
    replayed = RoundHistory(json.loads(json.dumps(written)), lambda _: None, "round-a")
    for state in (history, replayed):
        assert state.open_proposals() == [0]
        assert state.trials[template_digest("z"), "p", ""] == TRIAL
        assert (state.num_scored, state.num_tokens) == (1, 12), "the control's rollouts are not the round's"
        assert state.candidate_of == {0: 1} and state.disqualified == {1: "too long"}
        assert state.reflections[1].refusal == "empty"
        assert state.outcome_counts() == {"refused: empty": 1}
        assert state.published == Published(version=4, ended_by="budget")
    assert len(written) == 11, "replaying writes nothing"


def test_the_budget_is_kept_and_another_one_opens_the_round_again() -> None:
    written: list[Any] = []
    assert RoundHistory([], written.append, "round-a", max_rollouts=60).max_rollouts == 60
    assert RoundHistory(written, written.append, "round-a").max_rollouts == 60
    assert RoundHistory(written, written.append, "round-a", max_rollouts=60).max_rollouts == 60
    assert len(written) == 1, "nothing has changed"
    assert RoundHistory(written, written.append, "round-a", max_rollouts=90).max_rollouts == 90
    assert [record["max_rollouts"] for record in written] == [60, 90]
    assert RoundHistory([{"event": "Opened", "fingerprint": "round-a"}], written.append, "round-a").max_rollouts is None


def test_history_of_another_round_or_program_is_refused() -> None:
    written: list[object] = []
    RoundHistory([], written.append, "round-a")
    with pytest.raises(ForeignJournal, match="of round round-a, not round-b"):
        RoundHistory(written, lambda _: None, "round-b")
    with pytest.raises(ForeignJournal, match="unknown event"):
        RoundHistory([*written, {"event": "Merged"}], lambda _: None, "round-a")
    with pytest.raises(ForeignJournal, match="missing required field `outcome`"):
        RoundHistory([*written, {"event": "Ended", "proposal": 1, "outcomes": "x"}], lambda _: None, "round-a")


def test_fingerprint_changes_with_what_events_refer_to_and_with_nothing_else() -> None:
    problems = make_problems(12)
    spec = round_spec(problems)
    same = replace(
        spec,
        free_scores=(FreeScore(template_text="", problem_id="problem-1", trial=TRIAL),),
        settings=replace(spec.settings, evolution=replace(spec.settings.evolution, round_timeout_s=1.0)),
    )
    assert same.fingerprint() == spec.fingerprint()
    others = [
        round_spec(problems[:-1]),
        round_spec([replace(problems[0], answer="other"), *problems[1:]]),
        round_spec(problems, epoch=1),
        round_spec(problems, library_version=2),
        round_spec(problems, seed=2),
        round_spec(problems, warm_templates=[FIRST]),
        round_spec(problems, rules="reference"),
        round_spec(problems, minibatch_size=4),
        round_spec(problems, dev_size=3),
    ]
    assert len({spec.fingerprint(), *(other.fingerprint() for other in others)}) == len(others) + 1


# Messages


@pytest.mark.parametrize(
    "message",
    [
        StartRound(
            spec=replace(
                round_spec(make_problems(3), warm_templates=[FIRST]),
                free_scores=(FreeScore(template_text="", problem_id="problem-1", trial=TRIAL),),
            )
        ),
        FinishRound(),
        TrialRequest(request=1, template_text="z\n", problem_id="p", temperature=0.6, sample=2),
        TrialReply(request=1, trial=TRIAL),
        TrialReply(request=2, rejection="too long"),
        TrialReply(request=3, failure="engine lost"),
        RoundPublished(
            stats=RoundStats(
                epoch=1, library_version=2, ended_by="budget", num_hard=3, plain_coverage=0.5, outcomes={"accepted": 2}
            )
        ),
        Notice(text="é\n"),
    ],
    ids=lambda message: type(message).__name__,
)
def test_message_survives_the_wire_as_one_line(message: Message) -> None:
    line = encode(message)
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert decode(line) == message


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"{", "Expecting"),
        (b"[1]", "unknown kind"),
        (b'{"kind": "Reboot"}', "unknown kind"),
        (b'{"kind": "Notice", "text": 1}', r"Notice\.text: Expected `str`, got `int`"),
        (b'{"kind": "Notice"}', "Notice: Object missing required field `text`"),
        (b'{"kind": "Notice", "text": "", "more": 1}', "no field more"),
        (b'{"kind": "TrialReply", "request": true}', r"TrialReply\.request: Expected `int`, got `bool`"),
        (
            b'{"kind": "RoundPublished", "stats": {"epoch": 1, "library_version": 1, "ended_by": "boredom", '
            b'"num_hard": 1, "outcomes": {}}}',
            r"RoundPublished\.stats\.ended_by: Invalid enum value 'boredom'",
        ),
    ],
)
def test_what_is_no_message_is_refused_by_name(line: bytes, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        decode(line)
