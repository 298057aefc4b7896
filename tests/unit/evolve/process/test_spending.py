"""The tokens of rounds, from their journals: also while a round runs, after a kill, and of one that began again."""

from pathlib import Path

from megatron_p2o.evolve.process.conduct import journal_path
from megatron_p2o.evolve.process.spending import RoundSpending, RoundTokens
from megatron_p2o.evolve.record.history import Event, Opened, Picked, Reflected, Scored, event_to_json
from megatron_p2o.evolve.record.journal import Journal
from megatron_p2o.evolve.trial import Trial


def scored(problem_id: str, num_tokens: int, occasion: str = "") -> Scored:
    trial = Trial(reward=1.0, response_text="", finish_reason="stop", num_tokens=num_tokens, weight_version=1)
    return Scored(template="t", problem_id=problem_id, occasion=occasion, trial=trial)


def write(run_dir: Path, epoch: int, *events: Event) -> None:
    with Journal(journal_path(run_dir, epoch)) as journal:
        for event in events:
            journal.append(event_to_json(event))


def test_tokens_are_told_apart_by_what_they_were_sampled_for(tmp_path: Path) -> None:
    spending = RoundSpending(tmp_path)
    assert spending.tokens(3) == RoundTokens(), "no round has begun"
    write(
        *(tmp_path, 0, Opened(fingerprint="a"), scored("dev", 5), Picked(proposal=0, parent=0, minibatch=("f", "g"))),
        *(scored("f", 10), scored("g", 20, "0/before"), Reflected(proposal=0, text="z", completion_tokens=7)),
    )
    assert spending.tokens(1) == RoundTokens(minibatch=30, development=5, reflection_completion=7)
    write(
        *(tmp_path, 0, scored("f", 40), scored("dev", 100, "control/0"), scored("dev", 3)),
        Reflected(proposal=1, text="", refusal="cut", prompt_tokens=9, completion_tokens=2),
        Reflected(proposal=2, text="y", num_unknown=1),
    )
    write(tmp_path, 2, scored("dev", 1000))
    first = RoundTokens(
        minibatch=70, development=8, control=100, reflection_prompt=9, reflection_completion=9, num_unknown=1
    )
    assert spending.tokens(2) == first == RoundSpending(tmp_path).tokens(2), "read on, or read anew"
    assert spending.tokens(3).development == 1008
    assert spending.tokens(2) == first, "a run that goes back has not begun the later round"


def test_a_torn_line_counts_once_it_is_whole_and_a_round_that_begins_again_counts_anew(tmp_path: Path) -> None:
    spending, path = RoundSpending(tmp_path), journal_path(tmp_path, 0)
    write(tmp_path, 0, scored("dev", 5))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:20])
    assert spending.tokens(1).development == 5
    write(tmp_path, 0, scored("dev", 6))  # cuts the torn end off
    assert spending.tokens(1).development == 11
    path.rename(path.with_name("aside"))
    write(tmp_path, 0, scored("dev", 8))
    assert spending.tokens(1).development == 8
