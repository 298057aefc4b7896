"""Checkpoints of the policy in one process: what they bring back, and what is not loaded."""

import io
import pickle
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_p2o.files import digest_of
from megatron_p2o.interfaces import PolicyDiverged
from megatron_p2o.policy.rank_channel import PolicyError
from megatron_p2o.policy.training.checkpoint import Staged
from megatron_p2o.policy.training.safe_pickle import RefusedPickle
from megatron_p2o.testing.policy_oracle import policy_config
from megatron_p2o.testing.tested_policy import SAMPLES, assert_same_weights, policy_of, weights_of


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_policy_that_is_not_finite_is_neither_served_nor_saved_until_a_good_one_is_loaded(
    model: Path, tmp_path: Path, value: float
):
    with policy_of(policy_config(model)) as policy:
        policy.save(tmp_path / "good").result(60)
        expected = weights_of(policy)
        policy.update(SAMPLES, None, 120)
        with torch.no_grad():
            policy._shard.models[0].decoder.layers[1].mlp.linear_fc1.weight[3, 2] = value
        policy.update([], None, 0)
        named = r"diverged: 2 of .* model\.layers\.1\.mlp\.gate_proj\.weight, model\.layers\.1\.mlp\.up_proj\.weight"
        for hand_over in (policy.weights, partial(policy.save, tmp_path / "bad")):
            with pytest.raises(PolicyDiverged, match=named):
                hand_over()
        assert not (tmp_path / "bad").exists()
        policy.load(tmp_path / "good")
        assert_same_weights(weights_of(policy), expected, atol=0)


@pytest.mark.parametrize("num_updates", [0, 1], ids=["before the first step", "after it"])
def test_training_continues_identically_after_save_and_load(model: Path, tmp_path: Path, num_updates: int):
    with policy_of(policy_config(model)) as policy:
        for _ in range(num_updates):
            policy.update(SAMPLES, None, 120)
        seed_every_generator(7)
        saving = policy.save(tmp_path / "checkpoint")
        # Training goes on while the files are written; what they hold is the state of now.
        expected = [policy.update(SAMPLES, None, 120) for _ in range(2)]
        weights = weights_of(policy)
        drawn = draw_from_every_generator()
    with policy_of(policy_config(model)) as policy:
        policy.load(tmp_path / "checkpoint")
        assert [policy.update(SAMPLES, None, 120) for _ in range(2)] == expected
        assert_same_weights(weights_of(policy), weights, atol=0)
        assert draw_from_every_generator() == drawn
    digests = saving.result(0)
    assert set(digests) == {path.name for path in (tmp_path / "checkpoint").iterdir()}
    assert all(digest_of(tmp_path / "checkpoint" / name) == digest for name, digest in digests.items())


def seed_every_generator(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def draw_from_every_generator() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.standard_normal(), torch.rand(()).item()]


class Malicious:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("file", [".metadata", "common.pt", "sharded object"])
def test_a_checkpoint_that_would_run_code_is_refused(model: Path, tmp_path: Path, file: str):
    directory, trace = tmp_path / "checkpoint", tmp_path / "code was run"
    with policy_of(policy_config(model)) as policy:
        policy.save(directory).result(60)
        if file == ".metadata":
            (directory / file).write_bytes(pickle.dumps(Malicious(trace)))
        elif file == "common.pt":
            torch.save({"optimizer": Malicious(trace)}, directory / file)
        else:
            replace_first_object(directory, Malicious(trace))
        with pytest.raises((RefusedPickle, PolicyError), match=r"touch|eights.only"):
            policy.load(directory)
    assert not trace.exists()


def replace_first_object(directory: Path, value: Any) -> None:
    """Put `value` in the place of an object that lies among the tensors."""
    index = pickle.loads((directory / ".metadata").read_bytes())
    name = next(key for key, entry in index.state_dict_metadata.items() if isinstance(entry, BytesStorageMetadata))
    stored = next(info for key, info in index.storage_data.items() if key.fqn == name)
    content = io.BytesIO()
    torch.save([value], content)
    path = directory / stored.relative_path
    stored.offset, stored.length = path.stat().st_size, len(content.getvalue())
    path.write_bytes(path.read_bytes() + content.getvalue())
    (directory / ".metadata").write_bytes(pickle.dumps(index))


def test_the_state_common_to_all_ranks_is_one_file_also_where_megatron_passes_it_with_the_shards(
    model: Path, tmp_path: Path
):
    common = {"scheduler": {"num_steps": 3}}
    with policy_of(policy_config(model)):
        staged = Staged()
        staged.save({"common_state": ShardedObject("common_state", common, (1,), (0,))}, tmp_path)
    assert torch.load(tmp_path / "common.pt", weights_only=True) == common
    assert staged.state == {}


def test_a_missing_checkpoint_is_named(model: Path, tmp_path: Path):
    with policy_of(policy_config(model)) as policy, pytest.raises(ValueError, match="holds no checkpoint"):
        policy.load(tmp_path)
