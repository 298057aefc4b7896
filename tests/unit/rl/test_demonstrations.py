"""A teacher's responses in the place of sampled ones."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_p2o.config.tree import Config, TaskConfig
from megatron_p2o.metrics.step import speed_metrics
from megatron_p2o.metrics.values import numbers_of
from megatron_p2o.rl.hard_samples import HardSampleLedger, LedgerEntry
from megatron_p2o.rl.sampling import SamplingParts, asked, given_templates, rollout_sampling, sample_and_grade
from megatron_p2o.rl.teachers.demonstrations import DEMONSTRATED, demonstrations_of, uses_demonstrations
from megatron_p2o.testing.fakes import (
    END_OF_SEQUENCE,
    FakeEngines,
    FakeGrader,
    FakeLibrary,
    FakeRenderer,
    FakeReply,
    fake_config,
    fake_problem,
)
from megatron_p2o.types import PLAIN, Demonstration, Group, Problem

SHOWN = replace(fake_problem(1), demonstrations=("first", "second", "third"), task="train")
WITHOUT = replace(fake_problem(2), task="train")


def config_of(**settings: object) -> Config:
    """Groups of three, of which one asks plainly."""
    data = {"train": TaskConfig(file="train.jsonl", demonstrations_field="demonstrations")}
    own = {"rollout.group_size": 3, "assignment.num_plain": 1, "rollout.temperature": 1.0}
    return fake_config({"data.train": data, "evolution.enabled": False, **own, **settings})


def ledger_of(problem: Problem, num_groups: int) -> HardSampleLedger:
    """Return the ledger after so many groups of `problem`."""
    entry = LedgerEntry(
        epoch=0, step=0, problem_id=problem.id, plain_tries=1, plain_solved=0, templated_tries=2, templated_solved=2
    )
    return HardSampleLedger([replace(entry, epoch=number, step=number) for number in range(num_groups)])


@pytest.mark.parametrize(
    ("group_size", "num_groups", "responses"),
    [
        (3, 0, ["first", "second"]),
        (3, 1, ["third", "first"]),
        (3, 2, ["second", "third"]),
        (5, 0, ["first", "second", "third"]),  # there are no more
        (5, 1, ["first", "second", "third"]),
        (2, 4, ["second"]),
    ],
)
def test_each_group_of_a_problem_has_its_next_demonstrations(
    group_size: int, num_groups: int, responses: list[str]
) -> None:
    config = config_of(**{"rollout.group_size": group_size})
    given = given_templates(SHOWN, FakeLibrary(), ledger_of(SHOWN, num_groups), config)
    assert [each.response for each in given if isinstance(each, Demonstration)] == responses
    assert given[len(responses) :] == (PLAIN,)


def test_a_problem_without_demonstrations_is_asked_plainly() -> None:
    config = config_of()
    assert demonstrations_of(WITHOUT, ledger_of(WITHOUT, 0), config) == ()
    assert given_templates(WITHOUT, FakeLibrary(), ledger_of(WITHOUT, 0), config) == (PLAIN,) * 3
    assert uses_demonstrations(config.data) and not uses_demonstrations(fake_config({}).data)


def test_a_demonstration_is_read_on_the_bare_prompt_and_graded_and_the_rest_is_sampled() -> None:
    config = config_of()
    problem = replace(SHOWN, answer="first")
    renderer = FakeRenderer()
    engines = FakeEngines(reply=lambda prompt, index: FakeReply(text="sampled"))
    parts = SamplingParts(engines=engines, grader=FakeGrader(), renderer=renderer, solved_at=1.0)
    prompts = [
        asked(each, template, renderer)
        for each in (problem, WITHOUT)
        for template in given_templates(each, FakeLibrary(), ledger_of(each, 0), config)
    ]
    rollouts = sample_and_grade(prompts, rollout_sampling(config, 0), parts)
    texts = ["first", "second", "sampled", "sampled", "sampled", "sampled"]
    assert [renderer.decode(rollout.completion) for rollout in rollouts] == texts
    assert [rollout.is_solved for rollout in rollouts[:2]] == [True, False], "graded like any other"
    plain = renderer.render(problem, PLAIN)
    for rollout in rollouts[:2]:
        completion = rollout.completion
        assert completion.prompt.is_templated and completion.prompt.template.text == DEMONSTRATED
        assert completion.weight_versions == ()
        np.testing.assert_array_equal(completion.prompt.sampling_ids, plain.sampling_ids)
        np.testing.assert_array_equal(completion.prompt.training_ids, plain.training_ids)
        assert completion.token_ids[-1] == END_OF_SEQUENCE and completion.finish_reason == "stop"
        (scored,) = engines.score([completion.prompt], [completion.token_ids])
        assert scored is not None
        np.testing.assert_array_equal(completion.logprobs, scored)
    assert len(engines.prompts) == 4, "nothing is sampled for a demonstration"


def test_a_demonstration_that_no_engine_has_read_has_no_verdict_and_no_gradient() -> None:
    renderer = FakeRenderer()
    engines = FakeEngines(reply=lambda prompt, index: FakeReply(text="!"), unscorable=frozenset({SHOWN.id}))
    parts = SamplingParts(engines=engines, grader=FakeGrader(), renderer=renderer, solved_at=1.0)
    config = config_of(**{"assignment.num_plain": 0})
    given = given_templates(SHOWN, FakeLibrary(), ledger_of(SHOWN, 0), config)
    prompts = [asked(SHOWN, template, renderer) for template in given]
    rollouts = sample_and_grade(prompts, rollout_sampling(config, 0), parts)
    assert [rollout.is_decided or rollout.can_be_trained_on for rollout in rollouts] == [False] * 3
    assert engines.journal == ["score"], "no engine is asked for nothing"


def test_a_teacher_s_tokens_are_not_sampled_tokens() -> None:
    config, renderer = config_of(), FakeRenderer()
    engines = FakeEngines(reply=lambda prompt, index: FakeReply(text="abc"))
    parts = SamplingParts(engines=engines, grader=FakeGrader(), renderer=renderer, solved_at=1.0)
    prompts = [
        asked(SHOWN, each, renderer) for each in given_templates(SHOWN, FakeLibrary(), ledger_of(SHOWN, 0), config)
    ]
    rollouts = sample_and_grade(prompts, rollout_sampling(config, 0), parts)
    group = Group(problem=SHOWN, rollouts=tuple(rollouts), advantages=(0.0,) * len(rollouts))
    assert numbers_of(speed_metrics([group], [], {"rollout": 2.0}))["perf/rollout_tokens_per_s"] == 4 / 2
