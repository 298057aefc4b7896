"""The glossary: its examples are right, every record has one, and the path they show is the one the code takes."""

import ast
import doctest
import inspect
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_p2o import types
from megatron_p2o.config.tree import AdvantageConfig, ObjectiveConfig
from megatron_p2o.evaluation.outcome import graded_response
from megatron_p2o.rl.grouping import make_groups, train_samples
from megatron_p2o.types import Grade

RECORDS = {name: value for name, value in vars(types).items() if isinstance(value, type) and is_dataclass(value)}


def examples() -> list[doctest.DocTest]:
    """Return the examples of each record, in the order of the file."""
    parser = doctest.DocTestParser()
    order = [
        node.name for node in ast.parse(Path(types.__file__).read_text(encoding="utf-8")).body if hasattr(node, "name")
    ]
    return [
        parser.get_doctest(inspect.getdoc(RECORDS[name]) or "", {}, name, types.__file__, 0)
        for name in order
        if name in RECORDS
    ]


@pytest.fixture(scope="module")
def shown() -> dict[str, Any]:
    """Run the examples; return what they name."""
    names = {**vars(types), "np": np, "replace": replace}
    runner, told = doctest.DocTestRunner(optionflags=doctest.FAIL_FAST), []
    for test in examples():
        test.globs = names
        runner.run(test, out=told.append, clear_globs=False)
    assert runner.failures == 0, "".join(told)
    return names


@pytest.mark.parametrize("name", RECORDS)
def test_every_record_of_the_glossary_has_an_example(name: str) -> None:
    assert next(test for test in examples() if test.name == name).examples


def test_the_examples_are_right_and_what_they_write_out_is_what_the_code_makes(shown: dict[str, Any]) -> None:
    advantage = AdvantageConfig(estimator="dr_grpo")
    (group,) = make_groups([shown["group"].rollouts], advantage, [0.0])
    assert group == shown["group"]
    made, shown_sample = train_samples([group], ObjectiveConfig())[0], shown["sample"]
    for field in ("context_ids", "response_ids", "sampling_logprobs"):
        np.testing.assert_array_equal(getattr(made, field), getattr(shown_sample, field))
    assert (made.advantage, made.is_templated) == (shown_sample.advantage, shown_sample.is_templated)


def test_a_reward_of_parts_reaches_their_sum_in_every_place(shown: dict[str, Any]) -> None:
    rounded = Grade(reward=0.1 + 0.7)
    assert rounded.reward == 0.7999999999999999
    assert rounded.reaches(0.8) and not Grade(reward=0.799).reaches(0.8)
    assert not Grade(reward=0.0).reaches(1e-12) and not Grade.undecided("lost").reaches(0.1)
    rollout = replace(shown["right"], grade=rounded, solved_at=0.8)
    assert rollout.is_solved
    assert graded_response(rollout, sample=0).is_correct
