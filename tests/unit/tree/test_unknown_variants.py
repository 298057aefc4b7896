"""A value that a setting may name and code was forgotten for is an error, never another value.

Reading settings refuses what is no value of a `Literal`; these are what a value meets that was added there alone.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
import torch

from megatron_p2o.config.read import load_config
from megatron_p2o.config.reference import docstrings_of
from megatron_p2o.config.source import annotation_at, is_section
from megatron_p2o.config.tree import (
    PRESETS,
    AdvantageConfig,
    AlarmsConfig,
    AssignmentConfig,
    Config,
    EvaluationConfig,
    HardConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ReflectionConfig,
)
from megatron_p2o.data.curriculum import weight_of
from megatron_p2o.evolve.reflection.reflectors import BACKENDS, build_reflector, check_settings
from megatron_p2o.evolve.search.publish import drawing_weight
from megatron_p2o.evolve.search.rules import RULES, rules_named
from megatron_p2o.files import limit_readers
from megatron_p2o.machine.memory.trainer import bucket_bytes
from megatron_p2o.metrics.values import Mean
from megatron_p2o.policy.model.architecture import element_bytes
from megatron_p2o.policy.model.layer_choice import Capabilities, choose_layers
from megatron_p2o.policy.training.forward import Denominator
from megatron_p2o.policy.training.optimizer import Optimization
from megatron_p2o.rl.grouping import make_groups, train_samples
from megatron_p2o.rl.hard_samples import HardSampleLedger, hard_problems
from megatron_p2o.rl.objective import (
    compares_with_sampling,
    has_kl_loss,
    loss_rule,
    samples_plainly,
    with_length_weights,
    zero_stats,
)
from megatron_p2o.rl.shaping import has_kl_reward, kl_sum
from megatron_p2o.rl.surrogate import BUILT_IN
from megatron_p2o.rollout.refresh.outlet import uses_devices
from megatron_p2o.run.observe.alarms import MISMATCH, MismatchWatch
from megatron_p2o.run.observe.evaluations import BestSoFar
from megatron_p2o.testing.fakes import fake_config, fake_problem, fake_rollout
from megatron_p2o.types import PLAIN
from p2o_kernels.lm_head.path import HeadOptions
from p2o_kernels.policy_loss.token_loss import LossRule, TokenInputs, context_weighted, token_losses_torch

UNKNOWN: Any = "median_of_means"
ONE = np.zeros(1, np.float32)
SIBLINGS = [fake_rollout(fake_problem(1), reward=reward) for reward in (1.0, 0.0)]
GROUPS = make_groups([SIBLINGS], AdvantageConfig(), [0.5])
WITH_ENGINE = Capabilities(has_cuda=False, flash_attn_problem=None, transformer_engine_problem=None)
WITHOUT_ENGINE = replace(WITH_ENGINE, transformer_engine_problem="is not installed")
TOKENS = TokenInputs(advantages_N=torch.ones(1), weights_N=torch.ones(1))


def contribution(**settings: Any) -> None:
    denominator = Denominator(objective=ObjectiveConfig(**settings), num_loss_tokens=8, num_samples=2, counts_here=True)
    denominator.contribution(torch.ones(()), zero_stats(), None, 0)  # pyright: ignore[reportArgumentType]


def context_weights(ratio_form: Any) -> None:
    flag, one = torch.ones(1, dtype=torch.bool), torch.ones(1)
    context_weighted(LossRule(ratio_form=ratio_form), one, one, one, flag, one)


def curriculum_weight(curriculum: Any) -> None:
    data = replace(fake_config().data, curriculum=curriculum)
    weight_of(fake_problem(0), data, HardSampleLedger(), 0)


def score(best_metric: Any) -> None:
    outcome: Any = {"aime": SimpleNamespace(accuracy=1.0, pass_at={}, samples_per_problem=1)}
    BestSoFar(EvaluationConfig(best_set="aime", best_metric=best_metric), None).take(1, outcome)


def mismatch(action: Any) -> None:
    numbers = {MISMATCH: Mean(1, 1), "mismatch/logprob_abs_max": Mean(1, 1), "mismatch/kl_mean": Mean(0, 1)}
    MismatchWatch(AlarmsConfig(mismatch=0.1, mismatch_action=action), []).look(1, numbers)


def transfer(where: Any) -> Config:
    return replace(fake_config(), rollout=replace(fake_config().rollout, weight_transfer=where))


def normalized(how: Any) -> None:
    with_length_weights([], [], ObjectiveConfig(normalization=how), 8)


def learning_rate(decay: Any) -> None:
    optimizer = SimpleNamespace(param_groups=[{}])
    update: Any = SimpleNamespace(_rates=OptimizerConfig(lr_decay=decay), _num_planned=8, optimizer=optimizer)
    Optimization._schedule(update)


USES: dict[str, list[Callable[[Any], object]]] = {
    "run.readable_by": [lambda value: limit_readers(Path(), value)],
    "model.dtype": [element_bytes],
    "model.layer_backend": [
        lambda value: choose_layers(value, WITH_ENGINE),
        lambda value: choose_layers(value, WITHOUT_ENGINE),
    ],
    "preset": [lambda value: load_config(None, [f"preset={value}"])],
    "rollout.weight_transfer": [
        lambda value: uses_devices(transfer(value)),
        lambda value: bucket_bytes(transfer(value), None),  # pyright: ignore[reportArgumentType]
    ],
    "data.curriculum": [curriculum_weight],
    "hard.counted": [lambda value: hard_problems(GROUPS, HardConfig(counted=value), 2)],
    "assignment.weight": [lambda value: drawing_weight(PLAIN, AssignmentConfig(weight=value))],
    "advantage.estimator": [lambda value: make_groups([SIBLINGS], AdvantageConfig(estimator=value), [0.5])],
    "advantage.baseline": [lambda value: make_groups([SIBLINGS], AdvantageConfig(baseline=value), [0.5])],
    "objective.context": [
        lambda value: train_samples(GROUPS, ObjectiveConfig(context=value)),
        compares_with_sampling,
        samples_plainly,
    ],
    "objective.ratio_form": [context_weights],
    "objective.surrogate": [
        lambda value: loss_rule(ObjectiveConfig(surrogate=value)),
        lambda value: token_losses_torch(LossRule(surrogate=value), torch.ones(1), TOKENS),
    ],
    "objective.normalization": [lambda value: contribution(normalization=value), normalized],
    "objective.kl_as": [
        lambda value: has_kl_loss(ObjectiveConfig(kl_as=value)),
        lambda value: has_kl_reward(ObjectiveConfig(kl_as=value)),
    ],
    "objective.kl_estimator": [
        lambda value: loss_rule(ObjectiveConfig(kl_estimator=value)),
        lambda value: kl_sum(ONE, ONE, ObjectiveConfig(kl_estimator=value)),
    ],
    "optimizer.lend": [
        lambda value: OptimizerConfig(lend=value).lends_gradients,
        lambda value: OptimizerConfig(lend=value).lends_state,
        lambda value: OptimizerConfig(lend=value).lends_parameters,
    ],
    "optimizer.lr_decay": [learning_rate],
    "head.kernel": [lambda value: HeadOptions(kernel=value)],
    "head.weight_grad": [lambda value: HeadOptions(weight_grad=value)],
    "evolution.rules": [rules_named],
    "evolution.reflection.backend": [
        lambda value: check_settings(ReflectionConfig(backend=value)),
        lambda value: build_reflector(ReflectionConfig(backend=value), 0, {}),
    ],
    "evaluation.best_metric": [score],
    "alarms.mismatch_action": [mismatch],
}
"""For each setting that names a variant, what is done by its value."""


OR_OWN = ("objective.surrogate", "evolution.rules", "evolution.reflection.backend")
"""Settings that name one of our variants or a callable of the user's, and so are no `Literal`."""


def choices(cls: type = Config, prefix: str = "") -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield every setting whose values are a `Literal`, and those."""
    for name in cls.__annotations__:
        annotation: Any = annotation_at(tuple(f"{prefix}{name}".split(".")))
        if is_section(annotation):
            yield from choices(annotation, f"{prefix}{name}.")
        elif get_origin(annotation) is Literal:
            yield prefix + name, get_args(annotation)


def test_every_setting_that_names_a_variant_is_tried_here() -> None:
    assert sorted(USES) == sorted([*OR_OWN, *(name for name, _ in choices())])


@pytest.mark.parametrize(
    "use", [pytest.param(use, id=f"{name} {number}") for name, uses in USES.items() for number, use in enumerate(uses)]
)
def test_a_variant_without_a_formula_is_an_error_that_names_it(use: Callable[[Any], object]) -> None:
    with pytest.raises(Exception, match=UNKNOWN):
        use(UNKNOWN)


def test_the_table_of_presets_holds_every_value_of_its_setting() -> None:
    assert set(PRESETS) == set(dict(choices())["preset"])


def test_what_a_setting_is_documented_to_name_is_in_its_table() -> None:
    documented: dict[str, set[str]] = {}
    for name in OR_OWN:
        section, _, field = name.rpartition(".")
        of_section: Any = annotation_at(tuple(section.split(".")))
        documented[name] = set(re.findall(r"`(\w+)`: ", docstrings_of(of_section)[field]))
    assert documented == {
        "objective.surrogate": set(BUILT_IN),
        "evolution.rules": set(RULES),
        "evolution.reflection.backend": set(BACKENDS),
    }
