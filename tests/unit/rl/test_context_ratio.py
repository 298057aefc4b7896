"""Context-ratio weights against the paper's definition."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from p2o_kernels import LossRule
from p2o_kernels.policy_loss.token_loss import RatioForm, context_weighted

FORMS = get_args(RatioForm)
LOW, HIGH = 0.01, 10.0


def context_ratio_weights(
    old_T: Tensor,
    sampling_T: Tensor,
    is_templated_T: Tensor,
    *,
    low: float,
    high: float,
    form: RatioForm,
    advantage: float = -1.0,
) -> Tensor:
    rule = LossRule(ratio_low=low, ratio_high=high, ratio_form=form)
    ones_T = torch.ones_like(old_T)
    return context_weighted(rule, ones_T, old_T, sampling_T, is_templated_T, advantage * ones_T)


def weights(
    ratios: list[float],
    form: RatioForm = "hard",
    *,
    is_templated: bool = True,
    low: float = LOW,
    high: float = HIGH,
    advantage: float = -1.0,
) -> list[float]:
    """Return the weights of tokens whose context ratio is given."""
    sampling = torch.full((len(ratios),), -3.0, dtype=torch.float64)
    old = sampling + torch.tensor(ratios, dtype=torch.float64).log()
    flags = torch.full((len(ratios),), is_templated)
    return context_ratio_weights(old, sampling, flags, low=low, high=high, form=form, advantage=advantage).tolist()


def test_tokens_inside_the_band_are_kept_and_others_dropped() -> None:
    ratios = [1e-4, 0.0099, 0.0101, 0.5, 1.0, 2.0, 9.99, 10.01, 1e4]
    assert weights(ratios) == [0, 0, 1, 1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("bound", [LOW, HIGH])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_bounds_are_inclusive(bound: float, dtype: torch.dtype) -> None:
    log_ratio = torch.tensor([math.log(bound)], dtype=dtype)
    # The band's end as this dtype computes it: whether exp(log(b)) is b or a neighbour is rounding, not the rule.
    exact = float(log_ratio.exp())
    flags, zero = torch.tensor([True]), torch.zeros(1, dtype=dtype)
    at_low = context_ratio_weights(log_ratio, zero, flags, low=exact, high=1e9, form="hard")
    at_high = context_ratio_weights(log_ratio, zero, flags, low=1e-9, high=exact, form="hard")
    assert at_low.tolist() == at_high.tolist() == [1.0]
    above, below = (float(np.nextafter(exact, side, dtype=np.dtype(str(dtype)[6:]))) for side in (np.inf, 0))
    assert context_ratio_weights(log_ratio, zero, flags, low=above, high=1e9, form="hard").tolist() == [0.0]
    assert context_ratio_weights(log_ratio, zero, flags, low=1e-9, high=below, form="hard").tolist() == [0.0]


@pytest.mark.parametrize("form", FORMS)
def test_plain_tokens_weigh_one_whatever_engine_and_trainer_disagree(form: RatioForm) -> None:
    assert weights([1e-8, 0.5, 1e8], form, is_templated=False) == [1, 1, 1]
    assert weights([1e-8, 0.5, 1e8], form, is_templated=False, low=1.0, high=1.0) == [1, 1, 1]


def test_the_soft_form_weighs_by_the_clipped_ratio_over_the_ratio() -> None:
    expected = [0.01 / 1e-4, 0.01 / 0.005, 1.0, 1.0, 1.0, 10 / 20, 10 / 1e4]
    assert weights([1e-4, 0.005, 0.02, 1.0, 9.0, 20.0, 1e4], "soft") == pytest.approx(expected, rel=1e-9)


def test_the_one_sided_form_spares_what_has_a_positive_advantage() -> None:
    ratios = [1e-8, 0.005, 0.02, 1.0, 9.0, 20.0, 1e8]
    assert weights(ratios, "one_sided", advantage=0.4) == [1, 1, 1, 1, 1, 1, 1]
    for advantage in (-0.4, 0.0):
        assert weights(ratios, "one_sided", advantage=advantage) == weights(ratios, "hard") == [0, 0, 1, 1, 1, 0, 0]


def test_the_fading_form_falls_off_on_both_sides_and_never_amplifies() -> None:
    ratios = [1e-8, 1e-4, 0.005, 0.01, 1.0, 10.0, 20.0, 1e4]
    expected = [1e-6, 1e-2, 0.5, 1.0, 1.0, 1.0, 0.5, 1e-3]
    assert weights(ratios, "fading") == pytest.approx(expected, rel=1e-9)
    assert weights([1e-8], "soft") == pytest.approx([1e6]), "what the fading form is there for"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_a_band_without_ends_is_no_weight_in_any_form(form: RatioForm, advantage: float) -> None:
    ratios = [1e-20, 0.5, 1.0, 1e20]
    assert weights(ratios, form, low=1e-300, high=1e300, advantage=advantage) == [1, 1, 1, 1]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("difference", [-1e4, -200.0, 200.0, 1e4, -math.inf, math.inf])
def test_extreme_differences_stay_finite(form: RatioForm, difference: float) -> None:
    old, sampling, flags = torch.tensor([difference]), torch.tensor([-1.0]), torch.tensor([True])
    weight = context_ratio_weights(old, sampling, flags, low=LOW, high=HIGH, form=form)
    assert torch.isfinite(weight).all()
    if form == "hard":
        assert weight.tolist() == [0.0]


@pytest.mark.parametrize("form", FORMS)
def test_a_ratio_that_is_nan_shows_where_the_token_counts_and_nowhere_else(form: RatioForm) -> None:
    old, sampling = torch.tensor([math.nan, math.nan, -1.0]), torch.tensor([-1.0, math.nan, -1.0])
    rule = LossRule(ratio_form=form)
    flags = torch.ones(3, dtype=torch.bool)
    for advantage in (-1.0, 1.0):
        advantages = torch.full((3,), advantage)
        weights_T = context_weighted(rule, torch.tensor([1.0, 0.0, 0.5]), old, sampling, flags, advantages)
        assert weights_T.isnan().tolist() == [True, False, False]
        assert weights_T[1:].tolist() == [0.0, 0.5]
