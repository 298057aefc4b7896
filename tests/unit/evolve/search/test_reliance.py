"""How far templates lean on their text, measured in a round and kept in its library."""

from pathlib import Path
from typing import Literal

import pytest

from megatron_p2o.config.tree import AssignmentConfig
from megatron_p2o.evolve.process.conduct import journal_path
from megatron_p2o.evolve.record.history import template_digest
from megatron_p2o.evolve.record.journal import encode_line, read_journal
from megatron_p2o.evolve.record.library import library_path
from megatron_p2o.testing.evolution import KEY_PHRASES, KeyPhraseTask, make_problems, round_spec, whole_round
from megatron_p2o.types import Template

PROBLEMS = make_problems(60)
BOTH_AFFINE = " ".join(KEY_PHRASES["affine"])


class Silent:
    """A reflector that writes nothing."""

    async def propose(self, request: object) -> str:
        return ""

    async def close(self) -> None: ...


TRANSFER = AssignmentConfig(weight="transfer")

RELIANCES = {"affine": -0.1, "cross": -1.5, "walk": -0.5}


def test_published_reliance_is_the_mean_of_the_solutions_whatever_order_they_ended_in(tmp_path: Path) -> None:
    spec = round_spec(PROBLEMS, max_rollouts=2000, assignment=TRANSFER)
    task = KeyPhraseTask(PROBLEMS, reliances=RELIANCES)
    library, stats, history = whole_round(spec, tmp_path / "whole", task)
    assert stats.num_unweighed == 0 and len(library.templates) > 1
    for template in library.templates:
        solutions = [
            trial
            for (digest, *_), trial in history.trials.items()
            if digest == template_digest(template.text) and trial.is_solved
        ]
        expected = [trial.reliance for trial in solutions if trial.reliance is not None]
        assert len(expected) == len(solutions) > 0
        assert template.reliance == pytest.approx(sum(expected) / len(expected), abs=1e-12)
    whole = library_path(tmp_path / "whole", 1).read_bytes()
    records, _ = read_journal(journal_path(tmp_path / "whole", 0))
    events = [record for record in records if record["event"] != "Published"]
    scored = [record for record in events if record["event"] == "Scored"]
    others = [record for record in events if record["event"] != "Scored"]
    for number, replayed in enumerate((events, [others[0], *reversed(scored), *others[1:]])):
        path = journal_path(tmp_path / str(number), 0)
        path.parent.mkdir(parents=True)
        path.write_bytes(b"".join(map(encode_line, replayed)))
        whole_round(spec, tmp_path / str(number), KeyPhraseTask(PROBLEMS, reliances=RELIANCES))
        assert library_path(tmp_path / str(number), 1).read_bytes() == whole, "a resumed round draws the same"


@pytest.mark.parametrize(
    ("weight", "reliance", "num_unweighed"), [("transfer", -0.4, 0), ("transfer", None, 1), ("score", None, 0)]
)
def test_a_template_without_a_measurement_keeps_the_last_one_or_is_counted(
    weight: Literal["score", "transfer"], reliance: float | None, num_unweighed: int, tmp_path: Path
) -> None:
    warm = Template(id=9, text=BOTH_AFFINE, parent=4, score=0.9, reliance=reliance)
    assignment = AssignmentConfig(weight=weight)
    spec = round_spec(PROBLEMS, warm_templates=[warm], max_rollouts=100, assignment=assignment)
    library, stats, _ = whole_round(spec, tmp_path, KeyPhraseTask(PROBLEMS), Silent())
    assert [(each.text, each.reliance) for each in library.templates] == [(BOTH_AFFINE, reliance)]
    assert stats.num_unweighed == num_unweighed
