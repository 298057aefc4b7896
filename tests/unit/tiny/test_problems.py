"""Generated problems: answers, splits and wordings against independent recomputation."""

import random
import re
from pathlib import Path

import pytest

from megatron_p2o.tiny.problems import (
    FAMILIES,
    FILLER_PHRASES,
    MODULUS,
    NUM_STEPS,
    PHRASES,
    Level,
    generate_problems,
    held_out_rewordings,
    is_held_out_start,
    is_held_out_wording,
    join_phrases,
    make_problem,
    num_keys,
    split_phrases,
    starts,
    supervised_instruction,
    user_message,
    worked_pairs,
)
from megatron_p2o.types import Problem

ALL_STARTS = [(first, second) for first in range(MODULUS) for second in range(MODULUS)]


def answer_by_matrix(problem: Problem) -> str:
    """Recompute the answer from the question's text: each step is a matrix on (first, second, 1) modulo 97."""
    name, marks, first, second = re.fullmatch(r"(\w+) ([+ ]+) : (\d+) (\d+)", problem.question).groups()
    matrix = {
        "affine": ((3, 0, 7), (0, 3, 7), (0, 0, 1)),
        "cross": ((0, 3, 7), (3, 0, 7), (0, 0, 1)),
        "walk": ((0, 1, 0), (3, 0, 7), (0, 0, 1)),
    }[name]
    vector = [int(first), int(second), 1]
    for _ in range(marks.count("+")):
        vector = [sum(entry * value for entry, value in zip(row, vector, strict=True)) % 97 for row in matrix]
    return f"{vector[0]} {vector[1]}"


def test_answers_follow_from_the_question_text():
    problems = generate_problems({"easy": 60, "hard": 60}, "train", seed=3)
    assert [problem.answer for problem in problems] == [answer_by_matrix(problem) for problem in problems]


def test_every_step_is_a_bijection_so_no_answer_is_more_frequent_than_another():
    for family in FAMILIES.values():
        assert {family.step(pair) for pair in ALL_STARTS} == set(ALL_STARTS)


def test_hints_are_one_key_phrase_of_the_family_and_then_both():
    for problem in generate_problems({"easy": 9, "hard": 9}, "train", seed=1):
        family = FAMILIES[problem.source]
        assert [num_keys(family, hint) for hint in problem.hints] == [1, 2]
        assert not any(
            num_keys(other, hint) for other in FAMILIES.values() if other != family for hint in problem.hints
        )


def test_problems_are_distinct_balanced_and_repeatable():
    problems = generate_problems({"hard": 314, "easy": 134}, "train", seed=1)
    assert len({problem.id for problem in problems}) == len({problem.question for problem in problems}) == 448
    counts = [sum(p.source == name and p.level == "hard" for p in problems) for name in FAMILIES]
    assert counts == [105, 105, 104]
    assert problems == generate_problems({"hard": 314, "easy": 134}, "train", seed=1)
    assert problems != generate_problems({"hard": 314, "easy": 134}, "train", seed=2)


def test_held_out_problems_share_no_start_pair_with_training():
    held_out = {tuple(map(int, p.question.split()[-2:])) for p in generate_problems({"hard": 96}, "held_out", seed=1)}
    assert held_out <= set(starts("held_out"))
    assert not set(starts("held_out")) & set(starts("train"))
    assert 0.17 < len(starts("held_out")) / len(starts("held_out") + starts("train")) < 0.23


def test_numbers_of_a_start_pair_do_not_meet_within_ten_steps():
    ahead = {
        number: {(pow(3, n, 97) * number + 7 * (pow(3, n, 97) - 1) * 49) % 97 for n in range(11)}
        for number in range(97)
    }
    meeting = {(a, b) for a, b in ALL_STARTS if ahead[a] & ahead[b] or len(ahead[a]) < 11 or len(ahead[b]) < 11}
    assert set(starts("train")) | set(starts("held_out")) == set(ALL_STARTS) - meeting


def test_asking_for_more_problems_than_start_pairs_names_the_limit():
    with pytest.raises(ValueError, match="ask for at most"):
        generate_problems({"hard": 3 * MODULUS**2}, "held_out", seed=1)


def test_levels_differ_only_in_the_number_of_steps():
    family = FAMILIES["affine"]
    levels: tuple[Level, ...] = ("easy", "hard")
    assert [len(worked_pairs(family, level, (1, 2))) for level in levels] == [1, 10]
    assert worked_pairs(family, "hard", (1, 2))[0] == worked_pairs(family, "easy", (1, 2))[0] == (10, 13)
    assert {level: make_problem(family, level, (1, 2)).question.count("+") for level in levels} == dict(NUM_STEPS)


def test_phrase_file_of_the_tiny_run_holds_exactly_the_known_phrases():
    path = Path(__file__).parents[3] / "examples" / "tiny_cpu" / "phrases.txt"
    lines = path.read_text(encoding="utf-8").splitlines()
    assert sorted(line for line in lines if not line.startswith("#")) == sorted(PHRASES)


def test_key_phrases_belong_to_one_family_each():
    for family in FAMILIES.values():
        both = join_phrases(family.key_phrases)
        assert {other.name: num_keys(other, both) for other in FAMILIES.values() if num_keys(other, both)} == {
            family.name: 2
        }
        assert num_keys(family, join_phrases(FILLER_PHRASES)) == 0
        assert num_keys(family, family.key_phrases[0]) == num_keys(family, family.key_phrases[0] * 2) == 1


def test_phrases_are_recognised_whatever_the_spacing_case_and_line_breaks():
    assert split_phrases("Write  every pair.\n\nBe polite") == ("write every pair.", "be polite.")
    assert split_phrases(" . ") == ()


def test_message_sets_the_instruction_apart_from_the_question():
    assert user_message("be polite.", "affine + : 1 2") == "be polite.\n\naffine + : 1 2"
    assert user_message("", "affine + : 1 2") == "affine + : 1 2"


def test_supervision_never_uses_a_held_out_wording_or_start():
    generator = random.Random(0)
    instructions = {supervised_instruction(family, generator) for family in FAMILIES.values() for _ in range(2000)}
    assert not [instruction for instruction in instructions if is_held_out_wording(instruction)]
    assert {"", *(phrase for family in FAMILIES.values() for phrase in family.key_phrases)} <= instructions
    assert any(is_held_out_start(start) for start in ALL_STARTS)


def test_about_a_quarter_of_ordered_phrase_combinations_is_held_out():
    pairs = [join_phrases((first, second)) for first in PHRASES for second in PHRASES if first != second]
    assert 0.17 < sum(map(is_held_out_wording, pairs)) / len(pairs) < 0.33
    assert any(
        is_held_out_wording(join_phrases((first, second))) != is_held_out_wording(join_phrases((second, first)))
        for first in PHRASES
        for second in PHRASES
    )
    assert not any(map(is_held_out_wording, ("", *PHRASES)))


def test_wording_split_is_stable_across_processes_and_releases():
    followers = [phrase for phrase in PHRASES if is_held_out_wording(f"write every pair. {phrase}")]
    assert followers == ["check each line.", "carry the old number.", "take your time.", "explain your work."]


@pytest.mark.parametrize("name", FAMILIES)
def test_rewordings_keep_the_keys_and_are_held_out(name: str):
    family = FAMILIES[name]
    instruction = join_phrases((FILLER_PHRASES[0], *family.key_phrases))
    rewordings = held_out_rewordings(instruction, 12, seed=5)
    assert len(set(rewordings)) == 12
    for rewording in rewordings:
        assert is_held_out_wording(rewording) and rewording != instruction
        assert [num_keys(other, rewording) for other in FAMILIES.values()] == [
            num_keys(other, instruction) for other in FAMILIES.values()
        ]
    assert rewordings == held_out_rewordings(instruction, 12, seed=5)


def test_rewordings_keep_phrases_without_a_meaning_here():
    rewordings = held_out_rewordings("do not guess. Mind the gap.", 4, seed=1)
    assert len(rewordings) == 4
    assert all({"do not guess.", "mind the gap."} <= set(split_phrases(rewording)) for rewording in rewordings)
