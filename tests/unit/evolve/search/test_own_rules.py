"""Evolution rules of the user's own: what may be named, and what they must return."""

import asyncio
from pathlib import Path

import pytest

from megatron_p2o.evolve.process.conduct import conduct_round, split_of
from megatron_p2o.evolve.reflection.phrasebook import Phrasebook
from megatron_p2o.evolve.search.rules import RULES, rules_named
from megatron_p2o.testing.evolution import KeyPhraseTask, make_problems, round_spec
from megatron_p2o.tiny.problems import PHRASES


def test_rules_of_ones_own_have_the_guards_and_the_scores_of_the_asynchronous_ones(tmp_path: Path) -> None:
    code = tmp_path / "own.py"
    code.write_text("async def search(round_):\n    return 'budget'\n\ndef plain(round_):\n    return 'budget'\n")
    assert rules_named(f"{code}:search") == RULES["asynchronous"]
    with pytest.raises(ValueError, match=r"evolution\.rules=.*:plain is no async def and must be an async def"):
        rules_named(f"{code}:plain")
    with pytest.raises(
        ValueError, match=r"evolution\.rules=referense is none of asynchronous, reference, single_turn, nor"
    ):
        rules_named("referense")


def test_rules_of_ones_own_must_say_why_they_ended(tmp_path: Path) -> None:
    code = tmp_path / "silent.py"
    code.write_text("async def search(round_):\n    pass\n")
    problems = make_problems(60)
    spec = round_spec(problems, rules=f"{code}:search")
    split = split_of(spec)
    assert split is not None
    round_ = conduct_round(
        spec, split, tmp_path, KeyPhraseTask(problems), Phrasebook(PHRASES, 1), asyncio.Event(), lambda _: None
    )
    with pytest.raises(ValueError, match="returned None: must be one of budget, no_progress"):
        asyncio.run(round_)
