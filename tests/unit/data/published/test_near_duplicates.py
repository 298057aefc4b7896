"""When a question counts as nearly another one."""

import random

import pytest

from megatron_p2o.data.published.near_duplicates import NearDuplicateIndex, ngrams, words

KNOWN = (
    r"A farmer has $12$ hens and \(\dfrac{3}{4}\) of them lay two eggs a day. How many eggs does the farmer collect "
    r"in a week of seven days if every third egg breaks?"
)


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        (r"\left( x+1 \right)^{2}", "x 1 2"),
        ("(X + 1)^2", "x 1 2"),
        (r"\(\dfrac{1}{2}\)", "frac 1 2"),
        (r"$\frac12$", "frac 12"),
        (r"\text{cm} a_{1}", "cm a 1"),
        ("[asy]draw((0,0)--(1,1));[/asy] Find it.", "find it"),
        (r"2x and \textbf{3y}", "2 x and 3 y"),
        (r"\textual \bigger", "textual bigger"),
        ("", ""),
    ],
)
def test_words_leave_out_case_punctuation_layout_and_drawings(question: str, expected: str) -> None:
    assert " ".join(words(question)) == expected


def share_by_hand(question: str, known: str) -> float:
    """Return the share of the known question's 5-grams found in the question, by comparing all pairs."""
    own, theirs = words(question), words(known)
    grams = {tuple(theirs[start : start + 5]) for start in range(len(theirs) - 4)}
    return sum(any(own[i : i + 5] == gram for i in range(len(own))) for gram in grams) / len(grams)


def test_share_of_common_ngrams_decides() -> None:
    generator = random.Random(3)
    index = NearDuplicateIndex({"known": KNOWN})
    for _ in range(60):
        changed = KNOWN.split()
        for position in generator.sample(range(len(changed)), generator.randint(0, 6)):
            changed[position] = generator.choice(["goose", "17", "", "today the"])
        question = " ".join(changed)
        share = share_by_hand(question, KNOWN)
        overlap = index.overlap(question)
        assert (overlap is not None) == (share >= 0.5), question
        assert overlap is None or (overlap.id, overlap.share) == ("known", pytest.approx(share))


def test_question_inside_a_longer_one_is_found_and_a_part_of_a_known_one_is_not() -> None:
    index = NearDuplicateIndex({"known": KNOWN})
    longer = index.overlap(f"Read carefully. {KNOWN} Give the answer as a number.")
    assert longer is not None and longer.share == 1.0
    assert index.overlap("A farmer has 12 hens. How many legs do they have?") is None


def test_most_similar_known_question_is_named() -> None:
    changed = KNOWN.replace("hens", "geese")
    index = NearDuplicateIndex({"changed": changed, "same": KNOWN})
    assert index.overlap(KNOWN).id == "same"
    assert index.overlap(changed).id == "changed"


def test_short_questions_must_be_found_whole() -> None:
    index = NearDuplicateIndex({"short": "What is the value of x squared?", "tiny": "Compute $2^3$.", "none": "$$"})
    assert index.overlap("What is the value of x minus y?") is None
    assert index.overlap("If x = 3, what is the value of x squared?").id == "short"
    assert index.overlap("Compute 2^{3}").id == "tiny"
    assert index.overlap("Compute $2^4$.") is None
    assert index.overlap("") is None
    assert ngrams("?") == frozenset()


def test_stricter_share_finds_less() -> None:
    changed = KNOWN.replace("hens", "geese").replace("eggs a day", "eggs each day")
    assert NearDuplicateIndex({"known": KNOWN}, min_share=0.5).overlap(changed) is not None
    assert NearDuplicateIndex({"known": KNOWN}, min_share=0.95).overlap(changed) is None
