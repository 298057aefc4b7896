"""What the trainer lends the engines from one update to the next: memory goes, and everything comes back as it was."""

import ctypes
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch

from megatron_p2o.config.tree import Config, ObjectiveConfig, OptimizerConfig, ParallelConfig
from megatron_p2o.machine.memory.trainer import PARTS, trainer_memory
from megatron_p2o.policy.model.architecture import read_architecture
from megatron_p2o.policy.training.megatron_settings import check_lending
from megatron_p2o.policy.training.ranks import MegatronPolicy
from megatron_p2o.policy.training.settings import policy_settings
from megatron_p2o.processes import own_host_memory
from megatron_p2o.testing.policy_oracle import policy_config
from megatron_p2o.testing.tested_policy import (
    SAMPLES,
    allocated_bytes,
    assert_same_weights,
    held_bytes,
    policy_of,
    weights_of,
)
from megatron_p2o.testing.tiny_model import write_tiny_qwen3

Lend = Literal["none", "gradients", "optimizer", "all"]
LENDS: tuple[Lend, ...] = get_args(Lend)
MIB = 2**20
NUM_READINGS = 5
"""The kernel may take pages back between two readings, when memory is short; what leaks is in all of them."""
KINDS = [(dtype, is_sharded) for dtype in ("float32", "bfloat16") for is_sharded in (False, True)]


def config_of(model: Path, lend: Lend, dtype: str = "bfloat16", is_sharded: bool = False, **settings: Any) -> Config:
    optimizer = OptimizerConfig(lr=1e-3, eps=1e-4, weight_decay=0.1, micro_batch_tokens=48, lend=lend)
    parallel = ParallelConfig(timeout_s=30.0, distributed_optimizer=is_sharded)
    return policy_config(model, parallel=parallel, optimizer=optimizer, dtype=dtype, **settings)


def step(policy: MegatronPolicy) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return gradient norms of two updates, and the weights that are then handed over."""
    before = policy.logprobs(SAMPLES)
    norms = [policy.update(SAMPLES, None, 120).grad_norm, policy.update(SAMPLES, before, 120).grad_norm]
    return norms, weights_of(policy)


@pytest.mark.parametrize(("dtype", "is_sharded"), KINDS)
def test_updates_are_the_same_whatever_is_lent_and_memory_is_what_is_planned(
    model: Path, dtype: str, is_sharded: bool
) -> None:
    expected: list[tuple[list[float], dict[str, torch.Tensor]]] = []
    for lend in LENDS:
        config = config_of(model, lend, dtype, is_sharded)
        planned = trainer_memory(config, read_architecture(model))
        with policy_of(config) as policy:
            policy.wait_for_ranks()
            for number in range(3):
                result = step(policy)
                if lend == "none":
                    expected.append(result)
                assert result[0] == expected[number][0], lend
                assert_same_weights(result[1], expected[number][1], atol=0)
                allocated, held = allocated_bytes(policy), held_bytes(policy)
                for part in PARTS:
                    # Megatron rounds what it shards up.
                    kept = 0 if part in planned.lent else held[part]
                    assert kept <= allocated[part] <= 1.02 * kept, (lend, part)
            policy.update(SAMPLES, None, 120)
            assert all(allocated_bytes(policy)[part] >= held[part] for part in PARTS), "all is back"


@pytest.mark.parametrize("lend", ["gradients", "optimizer", "all"])
def test_the_process_gives_back_the_memory_of_all_it_lends(tmp_path: Path, lend: Lend) -> None:
    config = config_of(write_tiny_qwen3(tmp_path, vocab_size=20_000, hidden_size=256), lend)
    with policy_of(config) as policy:
        policy.update(SAMPLES, None, 120)
        policy._shard.lend()  # makes the copies on the host, which stay
        lent = given_back = 0
        for _ in range(NUM_READINGS):
            policy.update(SAMPLES, None, 120)
            lent = sum(held_bytes(policy)[part] for part in trainer_memory(config, read_architecture(tmp_path)).lent)
            before = resident_bytes()
            policy._shard.lend()
            given_back = before - resident_bytes()
            # Pages that tensors share with others stay.
            if given_back == pytest.approx(lent, abs=2 * MIB):
                break
        assert lent > 32 * MIB
        assert given_back == pytest.approx(lent, abs=2 * MIB)


def resident_bytes() -> int:
    ctypes.CDLL(None).malloc_trim(0)
    return own_host_memory().resident_bytes


@pytest.mark.parametrize(("dtype", "is_sharded"), KINDS)
def test_a_checkpoint_of_what_is_lent_is_that_of_what_is_here(
    model: Path, tmp_path: Path, dtype: str, is_sharded: bool
) -> None:
    """Before the first step and after one; and what goes on from it, lent or not, goes the same way."""
    going_on: dict[str, Any] = {}
    for lend in LENDS:
        with policy_of(config_of(model, lend, dtype, is_sharded)) as policy:
            policy.wait_for_ranks()
            policy.save(tmp_path / lend / "0").result(60)
            step(policy)
            policy.save(tmp_path / lend / "2").result(60)
            allocated = allocated_bytes(policy)
            assert (allocated["moments"] == 0) == (lend in ("optimizer", "all")), "it is read where it is"
            going_on[lend] = step(policy)
    crossed: list[tuple[Lend, Lend]] = [("none", "all"), ("all", "none")]
    same: list[tuple[Lend, Lend]] = [("none", "none"), ("gradients", "none"), ("optimizer", "none")]
    for name, ways in (("0", crossed), ("2", [*crossed, *same])):
        for saved, lend in ways:
            with policy_of(config_of(model, lend, dtype, is_sharded)) as policy:
                policy.wait_for_ranks()
                policy.load(tmp_path / saved / name)
                if name == "0":
                    step(policy)
                norms, weights = step(policy)
            assert norms == going_on["none"][0] == going_on[saved][0], (saved, lend)
            assert_same_weights(weights, going_on["none"][1], atol=0)


def test_a_handover_that_is_cut_short_or_repeated_leaves_all_in_place(model: Path) -> None:
    results: list[Any] = []
    for lend in ("none", "all"):
        with policy_of(config_of(model, lend)) as policy:
            first = weights_of(policy)
            assert_same_weights(weights_of(policy), first, atol=0)
            step(policy)
            begun = policy._shard.export()
            next(begun)
            begun.close()
            results.append(step(policy))
            handed = policy.weights()
            next(handed)
            handed.close()
            policy.update([], None, 120)
            results.append((step(policy), policy.logprobs(SAMPLES)))
    assert results[0][0] == results[2][0]
    assert_same_weights(results[0][1], results[2][1], atol=0)
    assert results[1][0][0] == results[3][0][0]
    for ours, theirs in zip(results[1][1], results[3][1], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_initial_policy_answers_where_the_weights_were_lent(model: Path) -> None:
    objective = ObjectiveConfig(kl_coefficient=0.1)
    rows: list[Any] = []
    for lend in ("none", "all"):
        with policy_of(config_of(model, lend, objective=objective)) as policy:
            policy.wait_for_ranks()
            initial = policy.reference_logprobs(SAMPLES)
            samples = [replace(sample, reference_logprobs=row) for sample, row in zip(SAMPLES, initial, strict=True)]
            policy.update(samples, None, 120)
            weights_of(policy)
            rows.append([*initial, *policy.reference_logprobs(SAMPLES), *policy.logprobs(SAMPLES)])
    for ours, theirs in zip(*rows, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_an_update_that_is_not_finite_leaves_the_lent_state_as_it_was(model: Path) -> None:
    results: list[Any] = []
    for lend in ("none", "all"):
        with policy_of(config_of(model, lend)) as policy:
            step(policy)
            broken = [replace(sample, advantage=float("nan")) for sample in SAMPLES]
            assert policy.update(broken, None, 120).outcome == "non_finite"
            weights_of(policy)
            results.append(step(policy))
    assert results[0][0] == results[1][0]
    assert_same_weights(results[0][1], results[1][1], atol=0)


@pytest.mark.parametrize(
    ("megatron", "lend", "remedy"),
    [({"nccl_ub": True}, "gradients", "none"), ({"optimizer_cpu_offload": True}, "optimizer", "gradients")],
)
def test_what_megatron_has_placed_is_not_lent(model: Path, megatron: dict[str, Any], lend: Lend, remedy: Any) -> None:
    offload = {"optimizer_offload_fraction": 1.0, "use_precision_aware_optimizer": True}
    config = replace(config_of(model, lend, is_sharded=True), megatron=megatron | offload)
    message = rf"^optimizer\.lend={lend} is impossible: megatron\.{next(iter(megatron))} .*; set it to {remedy}$"
    with pytest.raises(ValueError, match=message):
        policy_settings(config)
    check_lending(config.megatron, replace(config.optimizer, lend=remedy))
