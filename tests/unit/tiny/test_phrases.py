"""The phrases of the tiny runs fit the problems they are for."""

import asyncio
from pathlib import Path

from megatron_p2o.evolve.reflection.phrasebook import Phrasebook
from megatron_p2o.evolve.reflection.reflection import ReflectionRequest
from megatron_p2o.tiny.problems import PHRASES, is_held_out_wording, split_phrases

ROOT = Path(__file__).parents[3]


def test_the_phrasebook_of_the_tiny_runs_proposes_only_wordings_that_supervision_never_used() -> None:
    book = Phrasebook.from_file(ROOT / "examples" / "tiny_cpu" / "phrases.txt", seed=1)
    assert set(book.phrases) == set(PHRASES)
    parent, proposed = "", []
    for number in range(300):
        text = asyncio.run(book.propose(ReflectionRequest(proposal=number, parent_text=parent, examples=())))
        proposed.append(text)
        parent = text if number % 5 else ""
    longer = [text for text in proposed if len(split_phrases(text)) > 1]
    assert len(longer) > 100
    assert all(is_held_out_wording(text) for text in longer)
