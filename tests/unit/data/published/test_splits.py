"""Which rows the paper held out and trained on, against the authors' tools and a second computation."""

import hashlib
import random
from collections import Counter, defaultdict

import pytest

from megatron_p2o.data.published.splits import (
    answer_type,
    balanced_by_answer_type,
    deepmath_split,
    deepscaler_split,
    hold_out,
)


def digest(numbers: list[int]) -> str:
    return hashlib.sha256(",".join(map(str, numbers)).encode()).hexdigest()


def test_deepscaler_rows_are_those_that_the_datasets_library_gives() -> None:
    # Recorded with datasets 5.2.0 on 40,315 rows: shuffle(seed=42).train_test_split(test_size=500, seed=42), and of its
    # training part train_test_split(test_size=5_000 or 10_000, seed=42)["test"].
    held_out, rest = deepscaler_split(range(40_315), 500)
    assert held_out[:4] == [11236, 1239, 14959, 11446]
    assert digest(held_out) == "43ed634494362c561030ebf746759a687bfbbb1801e848df3eae08cfd277d176"
    assert rest[:4] == [28044, 36263, 33431, 38569]
    assert digest(rest[:5_000]) == "54db40dba04e7b57d84c437e4f1e3a1ebd4ee6ec73f4d72ec8343d5884832c3a"
    assert digest(rest[:10_000]) == "50c22f7047d01ac3679852fc3dfd48657d10e5d8a0d0ff6a7be7629a9112db3f"
    assert sorted(held_out + rest) == list(range(40_315))


def test_deepmath_holds_out_what_the_first_shuffle_of_deepscaler_would() -> None:
    # The authors do not shuffle DeepMath before they split it: one permutation less than DeepScaleR.
    held_out, rest = deepmath_split(range(1000), 100)
    assert (held_out, rest[:1]) == (hold_out(range(1000), 100)[0], rest[:1])
    assert sorted(held_out + rest) == list(range(1000))


def test_holding_out_everything_is_refused() -> None:
    with pytest.raises(ValueError, match="500 problems are too few to hold 500 out"):
        hold_out(range(500), 500)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", "yes_no"),
        ("FALSE", "yes_no"),
        ("yes.", "other"),
        ("B", "letter"),
        ("(c)", "letter"),
        ("-12", "number"),
        ("3.5", "number"),
        ("-3/4", "number"),
        ("3.", "other"),
        ("50%", "percentage"),
        ("12.5 cm", "number_with_unit"),
        ("2x", "number_with_unit"),
        ("2π", "symbol"),
        ("(0, 1]", "interval_or_tuple"),
        ("(1,2,3)", "interval_or_tuple"),
        ("a b c d e", "other"),
        ("a b c d e f", "text"),
        (r"\frac{1}{2}", "other"),
        (" 7 ", "number"),
    ],
)
def test_kinds_of_answers(answer: str, expected: str) -> None:
    assert answer_type(answer) == expected


def balanced_by_hand(rows: list[tuple[float, str]]) -> list[int]:
    """Return the numbers of the rows the authors' procedure keeps, written anew with the module-level generator."""
    random.seed(42)
    kinds = [answer_type(answer) for _, answer in rows]
    kept: list[int] = []
    for level in sorted({level for level, _ in rows}):
        members: dict[str, list[int]] = defaultdict(list)
        for number, (row_level, _) in enumerate(rows):
            if row_level == level:
                members[kinds[number]].append(number)
        num_rows = sum(map(len, members.values()))
        roots = {kind: len(numbers) ** 0.5 for kind, numbers in members.items() if kind != "yes_no"}
        quota = {kind: int(root / sum(roots.values()) * int(num_rows * 0.95)) for kind, root in roots.items()}
        if "yes_no" in members:
            quota["yes_no"] = min(len(members["yes_no"]), int(sum(quota.values()) * 0.05 / 0.95))
        for kind, places in quota.items():
            kept += members[kind] if places >= len(members[kind]) else random.sample(members[kind], places)
    random.shuffle(kept)
    yes_no = [number for number in kept if kinds[number] == "yes_no"]
    if len(yes_no) / len(kept) > 0.05:
        fewer = random.sample(yes_no, int(len(kept) * 0.05))
        kept = [number for number in kept if kinds[number] != "yes_no"] + fewer
        random.shuffle(kept)
    return kept


@pytest.mark.parametrize("share_yes_no", [0.02, 0.3, 0.8])
def test_balance_draws_the_rows_of_a_second_computation(share_yes_no: float) -> None:
    generator = random.Random(share_yes_no)
    others = ["3", "2π", "(1,2)", r"\sqrt{2}", "50%", "C", "a b c d e f g"]
    weights = [40, 5, 10, 30, 1, 5, 3]
    rows = [
        (
            generator.choice([7.0, 7.5, 8.0, 9.0]),
            "Yes" if generator.random() < share_yes_no else generator.choices(others, weights)[0],
        )
        for _ in range(800)
    ]
    kept = balanced_by_answer_type(
        list(range(800)), lambda number: rows[number][0], lambda number: rows[number][1], seed=42
    )
    assert kept == balanced_by_hand(rows)
    counts = Counter(answer_type(rows[number][1]) for number in kept)
    assert 0.01 * len(kept) < counts["yes_no"] < 0.06 * len(kept)
    assert len(set(kept)) == len(kept) < 800


def test_a_level_of_yes_and_no_alone_gives_nothing() -> None:
    rows = [(7.0, "3")] * 20 + [(8.0, "no")] * 20
    kept = balanced_by_answer_type(list(range(40)), lambda number: rows[number][0], lambda number: rows[number][1])
    assert sorted(kept) == sorted(balanced_by_hand(rows))
    assert max(kept) < 20
