"""Reflection: what it is shown, how its answer is read, what is refused, and the phrasebook."""

import asyncio
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_p2o.evolve.reflection.phrasebook import Phrasebook
from megatron_p2o.evolve.reflection.reflection import (
    Example,
    ReflectionRefused,
    ReflectionRequest,
    reflection_prompt,
)
from megatron_p2o.evolve.trial import Trial
from megatron_p2o.types import Problem

WRONG = Example(
    problem=Problem(id="p", question="What is {2} + 2?", answer="4444"),
    trial=Trial(reward=0.0, response_text="So \\boxed{22}.", finish_reason="stop", num_tokens=5, weight_version=1),
)


def request(*examples: Example, parent: str = "Be {brave}.", proposal: int = 0) -> ReflectionRequest:
    return ReflectionRequest(proposal=proposal, parent_text=parent, examples=examples)


def answered(**changes: object) -> Example:
    return replace(WRONG, trial=replace(WRONG.trial, **changes))


# Prompt


def test_prompt_shows_instruction_question_response_verdict_and_answer() -> None:
    prompt = reflection_prompt(request(WRONG))
    positions = [
        prompt.index(part)
        for part in (
            "```\nBe {brave}.\n```",
            "# Example 1",
            "What is {2} + 2?",
            "So \\boxed{22}.",
            "Wrong: the final answer does not match. The correct final answer is 4444.",
        )
    ]
    assert positions == sorted(positions)


@pytest.mark.parametrize(
    ("example", "verdict"),
    [
        (answered(reward=1.0), "Correct. The correct final answer is 4444."),
        (answered(finish_reason="length"), "Wrong: the answer was cut off at the length limit"),
        (answered(response_text="It is 22."), "Wrong: there is no final answer inside \\boxed{}."),
        (answered(reward=1 / 6), "Wrong: the final answer does not match."),
    ],
)
def test_verdict_says_what_was_wrong(example: Example, verdict: str) -> None:
    assert verdict in reflection_prompt(request(example))


def test_instruction_that_holds_fences_is_shown_between_longer_ones() -> None:
    assert "\n````\nUse\n```\nx\n```\n````\n" in reflection_prompt(request(WRONG, parent="Use\n```\nx\n```"))


def test_long_responses_are_cut_in_the_middle_so_that_the_prompt_fits() -> None:
    long = answered(response_text="BEGIN " + "words " * 50_000 + " \\boxed{1} END")
    examples = [replace(long, problem=replace(WRONG.problem, id=str(index))) for index in range(3)]
    prompt = reflection_prompt(request(*examples), max_chars=20_000)
    assert 15_000 < len(prompt) <= 20_000
    assert prompt.count("BEGIN") == prompt.count("\\boxed{1} END") == 3
    assert prompt.count("characters left out") == 3
    assert prompt.count("The correct final answer is 4444.") == 3


def test_response_without_final_answer_is_shown_briefly() -> None:
    prompt = reflection_prompt(request(answered(response_text="a" * 5_000 + "b" * 5_000)))
    assert prompt.count("a" * 400) == 1 and prompt.count("b" * 400) == 1
    assert "a" * 401 not in prompt and "b" * 401 not in prompt


# Phrasebook

PHRASES = tuple(f"phrase {letter}." for letter in "abcdefgh")


def proposals(book: Phrasebook, parent: str, count: int = 300) -> list[list[str]]:
    return [book.split(asyncio.run(book.propose(request(parent=parent, proposal=number)))) for number in range(count)]


def test_phrasebook_starts_with_any_single_phrase() -> None:
    counts = Counter(tuple(phrases) for phrases in proposals(Phrasebook(PHRASES, seed=1), ""))
    assert set(counts) == {(phrase,) for phrase in PHRASES}


def test_phrasebook_changes_one_phrase_by_adding_dropping_replacing_or_moving() -> None:
    parent = list(PHRASES[:3])
    moves: Counter[str] = Counter()
    for child in proposals(Phrasebook(PHRASES, seed=1), " ".join(parent)):
        gone, new = set(parent) - set(child), set(child) - set(parent)
        kept = [phrase for phrase in child if phrase in parent]
        assert len(child) == len(set(child))
        if (len(gone), len(new)) == (0, 0):
            assert kept != parent
            moves["reorder"] += 1
        else:
            assert (len(gone), len(new)) in {(0, 1), (1, 0), (1, 1)}
            assert kept == [phrase for phrase in parent if phrase in kept], "the others keep their order"
            moves[f"-{len(gone)}+{len(new)}"] += 1
    assert set(moves) == {"reorder", "-0+1", "-1+0", "-1+1"}


def test_phrasebook_never_exceeds_its_limit() -> None:
    full = " ".join(PHRASES[:4])
    assert max(map(len, proposals(Phrasebook(PHRASES, seed=1, max_phrases=4), full))) == 4
    assert max(map(len, proposals(Phrasebook(PHRASES, seed=1, max_phrases=5), full))) == 5


def test_phrasebook_depends_on_seed_and_proposal_number_only() -> None:
    assert proposals(Phrasebook(PHRASES, seed=1), PHRASES[0], 50) == proposals(Phrasebook(PHRASES, 1), PHRASES[0], 50)
    assert proposals(Phrasebook(PHRASES, seed=1), PHRASES[0], 50) != proposals(Phrasebook(PHRASES, 2), PHRASES[0], 50)


def test_phrasebook_keeps_text_it_does_not_know_together() -> None:
    book = Phrasebook(("a.", "a. b.", "c."), seed=1)
    assert book.split("c. a. b. own words. c.") == ["c.", "a. b.", "own words. c."]


def test_phrasebook_that_knows_nothing_else_refuses() -> None:
    with pytest.raises(ReflectionRefused, match="no other combination"):
        asyncio.run(Phrasebook(("a.",), seed=1).propose(request(parent="a.")))


def test_phrase_file_holds_one_phrase_per_line(tmp_path: Path) -> None:
    path = tmp_path / "phrases.txt"
    path.write_text("# comment\n# max_phrases: 2\n\n  be kind. \nbe kind.\nstay calm.\n")
    book = Phrasebook.from_file(path, seed=1)
    assert book.phrases == ("be kind.", "stay calm.")
    assert max(map(len, proposals(book, "be kind. stay calm."))) == 2
    path.write_text("# nothing\n")
    with pytest.raises(ValueError, match=r"evolution\.reflection\.phrases=.* holds no phrase"):
        Phrasebook.from_file(path, seed=1)


def test_a_task_of_ones_own_is_told_with_rewards_and_feedback_and_without_boxes() -> None:
    problem = replace(WRONG.problem, answer=None)
    trial = replace(WRONG.trial, reward=0.4, solved_share=0.0, feedback="Two letters do not mirror.")
    example = replace(WRONG, problem=problem, trial=trial)
    asked = ReflectionRequest(proposal=1, parent_text="", examples=(example,), task_description="Write a palindrome.\n")
    prompt = reflection_prompt(asked)
    assert "The task: Write a palindrome.\n\n# Example 1" in prompt
    assert "## Judgement\nNot good enough: it earned 0.4 of 1.\nTwo letters do not mirror." in prompt
    assert "boxed" not in prompt.replace(trial.response_text, "") and "correct final answer" not in prompt
    solved = replace(example, trial=replace(trial, solved_share=1.0, feedback=""))
    assert "Good: it earned 0.4 of 1." in reflection_prompt(replace(asked, examples=(solved,), task_description=""))


def test_without_a_task_of_ones_own_the_prompt_is_that_of_boxed_answers() -> None:
    plain = ReflectionRequest(proposal=1, parent_text="", examples=(WRONG,))
    assert "The task:" not in reflection_prompt(plain) and "\n\n# Example 1" in reflection_prompt(plain)
    assert "does not match. The correct final answer is" in reflection_prompt(plain)
