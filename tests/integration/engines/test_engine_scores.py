"""Log-probs of given responses from a real SGLang server, against the trainer's own: what a template teaches."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from megatron_p2o.config.tree import Config, DataConfig, ModelConfig, RolloutConfig, RunConfig, one_task
from megatron_p2o.rl.sampling import SamplingParts
from megatron_p2o.rl.teachers.teaching import with_teaching
from megatron_p2o.rollout.engines import SglangEngines
from megatron_p2o.rollout.start import start_engines
from megatron_p2o.testing.fakes import FakeGrader
from megatron_p2o.testing.tested_policy import policy_of
from megatron_p2o.testing.tiny_model import write_tiny_qwen3
from megatron_p2o.types import CORRECT, PLAIN, Logprobs, Problem, Prompt, Rollout, SamplingParams, Template, TrainSample

pytestmark = pytest.mark.slow

EOS = 2
TOLERANCE = 1e-5
"""float32 log-probs of about -10 by two programs."""
HINT = Template(id=1, text="hint", parent=0)
HINT_IDS = np.arange(5, 17, dtype=np.int32)


class Renderer:
    """Puts `HINT_IDS` before the problem's tokens, which its question lists."""

    def render(self, problem: Problem, template: Template) -> Prompt:
        plain = np.array(problem.question.split(), np.int32)
        ids = np.concatenate([HINT_IDS, plain]).astype(np.int32) if template.text else plain
        return Prompt(problem=problem, template=template, sampling_ids=ids, training_ids=plain)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    model = write_tiny_qwen3(tmp_path_factory.mktemp("model"), seed=3)
    return Config(
        run=RunConfig(name="test"),
        model=ModelConfig(path=str(model), dtype="float32"),
        data=DataConfig(train=one_task("unused")),
        rollout=RolloutConfig(max_running_requests=32, max_total_tokens=16384, startup_timeout_s=300),
    )


@pytest.fixture(scope="module")
def engines(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SglangEngines]:
    with start_engines(config, tmp_path_factory.mktemp("run"), [EOS]) as started:
        yield started


def plain_rollouts(engines: SglangEngines, temperature: float, num: int = 12) -> list[Rollout]:
    generator = np.random.default_rng(0)
    questions = [" ".join(map(str, generator.integers(3, 99, 20))) for _ in range(num)]
    problems = [Problem(id=str(number), question=text, answer="") for number, text in enumerate(questions)]
    prompts = [Renderer().render(problem, PLAIN) for problem in problems]
    sampled = dict(engines.generate(prompts, SamplingParams(temperature=temperature, max_new_tokens=40, seed=5)))
    return [Rollout(completion=sampled[index], grade=CORRECT) for index in range(num)]


def trainer_logprobs(config: Config, temperature: float, rollouts: list[Rollout], template: Template) -> list[Logprobs]:
    """Return what Megatron says of the responses under a template."""
    samples = [
        TrainSample(
            context_ids=Renderer().render(each.completion.prompt.problem, template).sampling_ids,
            response_ids=each.completion.token_ids,
            advantage=1.0,
            sampling_logprobs=each.completion.logprobs,
            is_templated=False,
        )
        for each in rollouts
    ]
    with policy_of(replace(config, rollout=replace(config.rollout, temperature=temperature))) as policy:
        return policy.logprobs(samples)


@pytest.mark.parametrize("template", [PLAIN, HINT])
def test_log_probs_of_given_responses_are_the_trainer_s(
    config: Config, engines: SglangEngines, template: Template
) -> None:
    rollouts = plain_rollouts(engines, 0.6)
    prompts = [Renderer().render(each.completion.prompt.problem, template) for each in rollouts]
    scores = engines.score(prompts, [each.completion.token_ids for each in rollouts])
    truth = trainer_logprobs(config, 1.0, rollouts, template)
    assert {len(row) for row in truth} != {1}
    for ours, theirs in zip(scores, truth, strict=True):
        assert ours is not None and ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


def parts_of(engines: SglangEngines) -> SamplingParts:
    return SamplingParts(engines=engines, grader=FakeGrader(), renderer=Renderer(), solved_at=1.0)  # pyright: ignore[reportArgumentType]


def test_at_temperature_1_one_prefill_gives_the_gains(config: Config, engines: SglangEngines) -> None:
    rollouts = plain_rollouts(engines, 1.0)
    taught = with_teaching(rollouts, [HINT] * len(rollouts), parts_of(engines), 1.0)
    with_hint, without = (trainer_logprobs(config, 1.0, rollouts, template) for template in (HINT, PLAIN))
    for rollout, z_R, x_R in zip(taught, with_hint, without, strict=True):
        assert rollout.teaching is not None and rollout.teaching.gains is not None
        np.testing.assert_allclose(rollout.teaching.gains, z_R - x_R, rtol=0, atol=2 * TOLERANCE)
        assert np.abs(rollout.teaching.gains).max() > 100 * TOLERANCE


def test_at_another_temperature_the_gains_are_those_at_1_divided_by_it(config: Config, engines: SglangEngines) -> None:
    rollouts = plain_rollouts(engines, 0.5)
    taught = with_teaching(rollouts, [HINT, PLAIN] * 6, parts_of(engines), 0.5)
    with_hint, without = (trainer_logprobs(config, 1.0, rollouts, template) for template in (HINT, PLAIN))
    for index, (rollout, z_R, x_R) in enumerate(zip(taught, with_hint, without, strict=True)):
        if index % 2:
            assert rollout == rollouts[index], "without a template nobody teaches"
            continue
        assert rollout.teaching is not None and rollout.teaching.gains is not None
        np.testing.assert_allclose(rollout.teaching.gains, (z_R - x_R) / 0.5, rtol=0, atol=4 * TOLERANCE)


def test_the_same_responses_have_the_same_gains_to_the_last_bit(engines: SglangEngines) -> None:
    rollouts = plain_rollouts(engines, 1.0)
    together = with_teaching(rollouts, [HINT] * len(rollouts), parts_of(engines), 1.0)
    for rollout, expected in zip(rollouts[::-1], together[::-1], strict=True):
        (alone,) = with_teaching([rollout], [HINT], parts_of(engines), 1.0)
        assert alone.teaching is not None and alone.teaching.gains is not None
        assert expected.teaching is not None and expected.teaching.gains is not None
        assert alone.teaching.gains.tobytes() == expected.teaching.gains.tobytes()


def test_a_request_the_engine_refuses_has_no_log_probs_and_is_counted(
    engines: SglangEngines, caplog: pytest.LogCaptureFixture
) -> None:
    engines.metrics()
    problem = Problem(id="long", question=" ".join(["7"] * 2030), answer="")
    prompts = [Renderer().render(problem, template) for template in (PLAIN, HINT)]
    response = np.arange(3, 10, dtype=np.int32)
    fits, too_long = engines.score(prompts, [response, response])
    assert fits is not None and len(fits) == 7
    assert too_long is None
    assert engines.metrics()["engine/refused_count"] == 1
    assert "1 completions were refused by their engine" in caplog.text
