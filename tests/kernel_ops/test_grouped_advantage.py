"""`grouped_advantage` against its scalar specification and the advantages of the algorithm; torch and interpreted."""

import pytest
import torch

from p2o_kernels import active_token_index, grouped_advantage
from p2o_kernels.advantage.reference import group_advantages_reference

ESTIMATORS = ("grpo", "dr_grpo", "rloo")
NAN = float("nan")


@pytest.fixture(params=["torch", "triton"])
def implementation(request):
    """Both paths; Triton's in the interpreter."""
    if request.param == "triton":
        request.getfixturevalue("interpreted_triton")
    return request.param


def make_batch(*, offset=0.0, anchored=False, seed=0):
    """Return ragged groups in mixed order: flat ones, one of one rollout, one of invalid rollouts."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.cat([torch.randint(0, 6, (24,), generator=generator), torch.tensor([6, 7, 7, 8, 8, 8])])
    groups = groups[torch.randperm(len(groups), generator=generator)]
    rewards = (torch.rand(len(groups), generator=generator) < 0.4).float()
    rewards[groups == 3] = 1.0
    rewards[groups == 8] = torch.tensor([0.0, 1e-3, 0.5])
    is_valid = torch.rand(len(groups), generator=generator) > 0.15
    is_valid[groups == 7] = False
    is_valid[groups == 8] = True
    rates = torch.tensor([0.0, 1.0, 0.25, 1.0, NAN, 0.0, 0.5, 0.5, NAN])[groups] if anchored else None
    return {
        "rewards_R": rewards + offset,
        "group_ids_R": groups * 1_000_003 - 7,
        "is_valid_R": is_valid,
        "anchor_rates_R": rates,
    }


def by_group(batch):
    """Yield (rollouts of a group, their rewards, validity, anchor rate or None)."""
    for group in batch["group_ids_R"].unique():
        rows = (batch["group_ids_R"] == group).nonzero().squeeze(1)
        rate = NAN if batch["anchor_rates_R"] is None else batch["anchor_rates_R"][rows[0]].item()
        rewards, is_valid = batch["rewards_R"][rows].tolist(), batch["is_valid_R"][rows].tolist()
        yield rows, rewards, is_valid, None if rate != rate else rate


@pytest.mark.parametrize("anchored", [False, True], ids=["group baseline", "anchored"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_ragged_groups_equal_the_specification(estimator, anchored, implementation, nan_empty):
    batch = make_batch(anchored=anchored)
    result = grouped_advantage(**batch, estimator=estimator, implementation=implementation)
    num_flat = 0
    for rows, rewards, is_valid, rate in by_group(batch):
        advantages = torch.tensor(group_advantages_reference(rewards, is_valid, estimator, rate))
        torch.testing.assert_close(result[rows], advantages, rtol=2e-6, atol=1e-7)
        if not advantages.any():
            assert not result[rows].any()  # exactly 0, not nearly
            num_flat += 1
    assert 0 < num_flat < len(set(batch["group_ids_R"].tolist()))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_common_offset_of_the_rewards_changes_nothing(estimator, implementation):
    # Rewards in steps of 1/16 are exact at 1e6 in float32, so any difference would come from the computation.
    near = make_batch()
    near["rewards_R"] = (near["rewards_R"] * 16).round() / 16
    far = near | {"rewards_R": near["rewards_R"] + 1e6}
    first = grouped_advantage(**near, estimator=estimator, implementation=implementation)
    second = grouped_advantage(**far, estimator=estimator, implementation=implementation)
    torch.testing.assert_close(second, first, rtol=1e-6, atol=1e-7)
    assert torch.equal(second == 0, first == 0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_an_invalid_rollout_was_given_changes_nothing(estimator, implementation):
    batch = make_batch()
    garbage = torch.where(batch["is_valid_R"], batch["rewards_R"], torch.tensor([NAN, torch.inf, 1e30] * 10))
    first = grouped_advantage(**batch, estimator=estimator, implementation=implementation)
    second = grouped_advantage(**batch | {"rewards_R": garbage}, estimator=estimator, implementation=implementation)
    assert torch.equal(second, first)


def test_a_nan_reward_makes_its_group_nan_and_no_other(implementation):
    batch = make_batch()
    row = int((batch["group_ids_R"] == 8 * 1_000_003 - 7).nonzero()[0])
    batch["rewards_R"][row] = NAN
    result = grouped_advantage(**batch, estimator="dr_grpo", implementation=implementation)
    assert torch.equal(result.isnan(), batch["group_ids_R"] == batch["group_ids_R"][row])


def test_an_estimator_without_a_formula_is_an_error(implementation):
    # Triton's interpreter has an error of its own around the kernel's, without a public name.
    with pytest.raises(Exception, match="has no formula"):
        grouped_advantage(**make_batch(), estimator="maxrl", implementation=implementation)


def test_a_difference_far_below_the_epsilon_is_not_flat(implementation):
    rewards = torch.tensor([1.0, 1.0 + 2**-23, 1.0, 1.0])
    result = grouped_advantage(
        rewards,
        torch.zeros(4, dtype=torch.int32),
        torch.ones(4, dtype=torch.bool),
        estimator="grpo",
        implementation=implementation,
    )
    assert result.all() and result[1] > 0


@pytest.mark.parametrize("num_tokens", [0, 1, 1024, 2500])
def test_the_active_tokens_are_those_with_advantage_and_weight_in_their_order(num_tokens, implementation, nan_empty):
    generator = torch.Generator().manual_seed(4)
    advantages, weights = torch.randn(2, num_tokens, generator=generator).relu()  # half of them zero
    if num_tokens > 2048:
        advantages[1024:2048] = 0  # a block without any
    index = active_token_index(advantages, weights, implementation=implementation)
    expected = [place for place in range(num_tokens) if advantages[place] != 0 and weights[place] != 0]
    assert index.dtype == torch.int64 and index.tolist() == expected


def test_all_templated_successes_still_teach_against_a_plain_anchor(implementation):
    arguments = {
        "rewards_R": torch.ones(6),
        "group_ids_R": torch.zeros(6, dtype=torch.int64),
        "is_valid_R": torch.ones(6, dtype=torch.bool),
        "estimator": "dr_grpo",
        "implementation": implementation,
    }
    assert not grouped_advantage(**arguments).any()
    anchored = grouped_advantage(**arguments, anchor_rates_R=torch.zeros(6))
    torch.testing.assert_close(anchored, torch.full((6,), 0.5))


def test_no_rollouts_give_no_advantages(implementation):
    result = grouped_advantage(
        torch.zeros(0),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(0, dtype=torch.bool),
        estimator="grpo",
        implementation=implementation,
    )
    assert result.shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards_R": torch.zeros(30, dtype=torch.float64)}, "rewards_R"),
        ({"is_valid_R": torch.ones(3, dtype=torch.bool)}, r"is_valid_R \(3,\)"),
        ({"rewards_R": torch.zeros(5, 6)}, r"rewards_R \(5, 6\) .* must be \(30,\)"),
        ({"rewards_R": torch.zeros(60)[::2]}, "rewards_R: must be contiguous"),
        ({"anchor_rates_R": torch.zeros(5)}, r"anchor_rates_R \(5,\)"),
    ],
)
def test_misfits_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        grouped_advantage(**make_batch() | change, estimator="grpo")
