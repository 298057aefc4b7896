"""On-policy context distillation: who is asked for what, and what becomes of the advantages."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_p2o.config.tree import ObjectiveConfig
from megatron_p2o.metrics.step import step_metrics
from megatron_p2o.metrics.values import numbers_of
from megatron_p2o.rl.grouping import most_informative, num_informative, train_samples
from megatron_p2o.rl.objective import has_loss, loss_rule, token_stats
from megatron_p2o.rl.packing import pack
from megatron_p2o.rl.sampling import SamplingParts
from megatron_p2o.rl.teachers.teaching import with_teaching
from megatron_p2o.testing.fakes import (
    FakeEngines,
    FakeGrader,
    FakeRenderer,
    FakeReply,
    fake_logprobs,
    fake_problem,
    fake_rollout,
)
from megatron_p2o.types import PLAIN, Group, Rollout, Teaching, Template
from p2o_kernels import LossRule, linear_policy_loss

HINT = Template(id=1, text="Think.", parent=0)
DISTILL = ObjectiveConfig(context="distill", distill_beta=0.5)


def parts_of(engines: FakeEngines, **renderer: int) -> SamplingParts:
    return SamplingParts(engines=engines, grader=FakeGrader(), renderer=FakeRenderer(**renderer), solved_at=1.0)


def fake_engines(*unscorable: str) -> FakeEngines:
    return FakeEngines(reply=lambda prompt, index: FakeReply(text="no"), unscorable=frozenset(unscorable))


def rollouts_of(num: int = 3) -> list[Rollout]:
    return [fake_rollout(fake_problem(number), reward=float(number == 0)) for number in range(num)]


def under(rollout: Rollout, template: Template) -> np.ndarray:
    prompt = FakeRenderer().render(rollout.completion.prompt.problem, template)
    return fake_logprobs(prompt.sampling_ids, rollout.completion.token_ids).astype(np.float64)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_gain_is_the_template_s_log_prob_less_the_plain_one_over_the_temperature(temperature: float) -> None:
    engines, rollouts = fake_engines(), rollouts_of()
    taught = with_teaching(rollouts, [HINT, PLAIN, HINT], parts_of(engines), temperature)
    assert taught[1] is rollouts[1]
    for rollout in (taught[0], taught[2]):
        assert rollout.teaching is not None and rollout.teaching.template == HINT
        expected = (under(rollout, HINT) - under(rollout, PLAIN)) / temperature
        assert rollout.teaching.gains is not None
        np.testing.assert_allclose(rollout.teaching.gains, expected, atol=1e-6)
    asked = [[prompt.is_templated for prompt in prompts] for prompts in engines.scored]
    # At temperature 1 the plain log-probs are those of sampling.
    assert asked == ([[True, True]] if temperature == 1 else [[True, True], [False, False]])


def test_who_has_no_verdict_or_no_room_for_the_template_is_not_asked_about() -> None:
    engines = fake_engines()
    rollouts = [
        fake_rollout(fake_problem(0), reward=0.0, finish_reason="abort"),
        fake_rollout(fake_problem(1), reward=0.0, num_tokens=0),
        fake_rollout(fake_problem(2), reward=0.0),
    ]
    taught = with_teaching(rollouts, [HINT] * 3, parts_of(engines, max_prompt_tokens=12), 1.0)
    assert taught == rollouts
    assert engines.scored == []


def test_a_rollout_that_no_engine_scored_is_counted_and_left_out_of_training() -> None:
    rollouts = rollouts_of()
    taught = with_teaching(rollouts, [HINT] * 3, parts_of(fake_engines("problem-001")), 0.6)
    groups = [Group(problem=each.completion.prompt.problem, rollouts=(each,), advantages=(0.25,)) for each in taught]
    assert [sample.key[0] for sample in train_samples(groups, DISTILL)] == ["problem-000", "problem-002"]
    numbers = numbers_of(step_metrics(groups, [], {}))
    known = [each.teaching.gains for each in (taught[0], taught[2]) if each.teaching and each.teaching.is_known]
    assert numbers["distill/untaught_rollouts_count"] == 1
    assert numbers["distill/taught_rollouts_count"] == 2
    assert numbers["distill/taught_tokens_count"] == 8
    assert numbers["distill/gain_per_token"] == pytest.approx(np.concatenate(known).mean(dtype=float))  # pyright: ignore[reportArgumentType]
    assert not any(
        key.startswith("distill/") for key in step_metrics([replace(groups[0], rollouts=rollouts[:1])], [], {})
    )


def test_each_token_has_the_advantage_of_its_response_plus_beta_times_its_gain() -> None:
    taught = with_teaching(rollouts_of(2), [HINT, PLAIN], parts_of(fake_engines()), 1.0)
    groups = [
        Group(problem=each.completion.prompt.problem, rollouts=(each,), advantages=(advantage,))
        for each, advantage in zip(taught, (0.25, -1.0), strict=True)
    ]
    samples = train_samples(groups, DISTILL)
    assert [len(sample.context_ids) for sample in samples] == [len("question 0")] * 2, "trained without the template"
    batch = pack(samples, None)
    gains = under(taught[0], HINT) - under(taught[0], PLAIN)
    expected = torch.tensor([*(0.25 + 0.5 * gains), *[-1.0] * 4], dtype=torch.float32)
    torch.testing.assert_close(batch.advantages_T[batch.loss_mask_T], expected)
    assert not batch.advantages_T[~batch.loss_mask_T].any()
    assert not batch.is_templated_T.any()


def test_a_group_that_fails_throughout_still_teaches() -> None:
    rollout = fake_rollout(fake_problem(0), reward=0.0)
    taught = replace(rollout, teaching=Teaching(template=HINT, gains=np.ones(4, np.float32)))
    lost = replace(rollout, teaching=Teaching(template=HINT, gains=None))
    groups = [
        Group(problem=rollout.completion.prompt.problem, rollouts=(each, each), advantages=(0.0, 0.0))
        for each in (rollout, lost, taught)
    ]
    assert num_informative(groups) == 1
    assert most_informative(groups, 1) == [groups[2]]
    assert [has_loss(sample, DISTILL) for sample in train_samples(groups, DISTILL)] == [False] * 2 + [True] * 2


def test_the_gradient_is_that_of_the_reverse_kl_in_expectation() -> None:
    """By enumeration of one token, float64: sum over y of pi(y|x) A(y) grad log pi(y|x) is -grad KL(pi_x || pi_z)."""
    generator = torch.Generator().manual_seed(0)
    plain_V = torch.randn(7, generator=generator, dtype=torch.float64, requires_grad=True)
    taught_V = torch.randn(7, generator=generator, dtype=torch.float64)
    for temperature in (1.0, 0.6):
        plain, taught = (logits / temperature for logits in (plain_V, taught_V))
        kl = (plain.softmax(0) * (plain.log_softmax(0) - taught.log_softmax(0))).sum()
        (truth,) = torch.autograd.grad(-kl, plain_V, retain_graph=True)
        # As `with_teaching` makes the gains: at temperature 1, over the temperature.
        gains_V = (taught_V.log_softmax(0) - plain_V.log_softmax(0)).detach() / temperature
        surrogate = (plain.softmax(0).detach() * gains_V * plain.log_softmax(0)).sum()
        (ours,) = torch.autograd.grad(surrogate, plain_V)
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)


def test_a_loss_with_gains_has_the_gradient_of_each_token_s_own_advantage() -> None:
    sample = train_samples(
        [
            Group(
                problem=fake_problem(0),
                rollouts=(
                    replace(
                        fake_rollout(fake_problem(0), reward=0.0),
                        teaching=Teaching(template=HINT, gains=np.array([3.0, -1.0, 0.0, 0.5], np.float32)),
                    ),
                ),
                advantages=(0.0,),
            )
        ],
        DISTILL,
    )[0]
    batch = pack([sample], None)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(len(batch.target_ids_T), 8, generator=generator, requires_grad=True)
    weight = torch.randn(200, 8, generator=generator)
    rule = loss_rule(DISTILL)
    assert rule == replace(LossRule(), context="replace", ratio_form=DISTILL.ratio_form)
    outcome = linear_policy_loss(
        hidden,
        weight,
        batch.target_ids_T,
        rule=rule,
        advantages_T=batch.advantages_T,
        weights_T=batch.loss_weights_T * batch.loss_mask_T,
    )
    outcome.loss.backward()
    again = hidden.detach().double().requires_grad_()
    logprobs_T = (again @ weight.double().T).log_softmax(-1).gather(1, batch.target_ids_T[:, None]).squeeze(1)
    expected = 0.5 * torch.tensor([3.0, -1.0, 0.0, 0.5], dtype=torch.float64)
    (-(expected * logprobs_T[batch.loss_mask_T]).sum()).backward()
    assert hidden.grad is not None and again.grad is not None
    torch.testing.assert_close(hidden.grad.double(), again.grad, rtol=1e-5, atol=1e-6)
    assert token_stats(batch, outcome).carrying_tokens == 3, "a token whose gain is 0 carries nothing"
