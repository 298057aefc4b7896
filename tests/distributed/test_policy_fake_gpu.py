"""The policy's GPU path on fake tensors: devices and types fit, and the host waits for the device only where it must.

On a machine without a GPU. What is computed is not shown: nothing is (`fake_gpu`).
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_p2o.config.tree import ParallelConfig
from megatron_p2o.policy.training.ranks import build_policy
from megatron_p2o.testing.policy_oracle import policy_config
from megatron_p2o.testing.tiny_model import write_kernel_sized_qwen3

pytestmark = pytest.mark.skipif(
    torch.version.cuda is not None, reason="torch's CPU build alone lets itself be deceived"
)

HEAD = "item in advantage/triton_path.py:active_token_index_triton"
SHIFTS = "to host in rl/context_shift.py:on_cpu"
UPDATE = {
    # How many rows the head computes decides its chunks.
    HEAD: 1,
    # Megatron divides by the tokens of all ranks unless there are none.
    "item in distributed/finalize_model_grads.py:finalize_model_grads": 1,
    # A gradient that is not finite is not applied; then Megatron asks again, to clip it.
    "item in optimizer/clip_grads.py:get_grad_norm_fp32": 2,
    # The result, when the gradients are there, and of each pack the shift of its context: sums, and its first tokens.
    "to host in policy/training/forward.py:on_cpu": 2,
    SHIFTS: 2,
    "to host in rl/objective.py:stats_on_cpu": 1,
}
SCORES = {
    # The rows whose log-probs are asked for are known to the host by their number.
    "nonzero in policy/model/head.py:_logprobs": 1,
    "nonzero in policy/training/forward.py:_on_positions": 1,
    # The result: log-probs and whose they are, when the device has nothing left to do.
    "mask in policy/training/forward.py:_by_sample": 2,
    "to host in policy/training/forward.py:_by_sample": 2,
}
P2P = "pipeline_parallel/p2p_communication.py"
SENT = {
    # Stages tell one another the length of a pack, and Megatron waits for each exchange.
    f"from host in {P2P}:_communicate_shapes": 1,
    f"synchronize in {P2P}:_communicate": 1,
    f"synchronize in {P2P}:_communicate_shapes": 1,
}
RECEIVED = {
    f"item in {P2P}:_communicate_shapes": 3,
    f"synchronize in {P2P}:_communicate": 1,
    f"synchronize in {P2P}:_communicate_shapes": 1,
}
# What is lent is free when its copy on the host is complete.
FREED = "synchronize in policy/training/lending.py:finish"
OTHERS = {
    "diverged": {"item in policy/weights/hf_weights.py:_are_finite"},
    "refresh through the host": {
        "item in rollout/buckets/device_memory.py:checksum",
        "synchronize in rollout/buckets/device_memory.py:finish_copies",
        FREED,
    },
    "refresh over the device": {"synchronize in rollout/buckets/device_memory.py:finish_copies", FREED},
    "stage": {
        "barrier in dist_checkpointing/serialization.py:metadata_finalize_fn",
        "to host in policy/training/checkpoint.py:save",
        "to host in optimizer/distrib_optimizer.py:get_parameter_state_dp_zero",
    },
    "load": {
        "from host in dist_checkpointing/strategies/torch.py:load",
        "from host in optimizer/distrib_optimizer.py:_set_main_param_and_optimizer_states",
    },
}
"""Where these passes may wait; how often depends on the number of weights."""

BOTH = {"target_logits_kernel", "exponentials_kernel", "softmax_rows_kernel"}
GRADIENTS = {"token_losses_kernel", "hidden_grad_kernel", "scale_rows_kernel", "add_target_rows_kernel"}
ROWS = {"count_active_kernel", "active_token_index_kernel"}

LAYOUTS = (
    *("one GPU", "recomputed, later", "with a reference", "gspo, later", "cispo"),
    *("sharded", "tensor", "context", "data"),
)
LENDING = ("lends nothing", "lends optimizer, sharded", "lends all", "lends all, sharded")
STAGES = ("first stage", "last stage")
TRANSFORMER_ENGINE = ("one GPU", "recomputed, later", "sharded", "tensor", "context", "last stage")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a checkpoint of it with either optimizer."""
    folder = tmp_path_factory.mktemp("fake-gpu")
    (folder / "model").mkdir()
    model = write_kernel_sized_qwen3(folder / "model")
    for name, is_sharded in (("whole", False), ("sharded", True)):
        parallel = ParallelConfig(distributed_optimizer=is_sharded)
        with closing(build_policy(policy_config(model, parallel=parallel, dtype="bfloat16"))) as policy:
            policy.save(folder / name).result(timeout=60)
    return folder


def reports(folder: Path, layouts: Sequence[str], *paths: Path) -> dict[str, Any]:
    """Return what the passes of each layout did, in a process that finds the packages of `paths`."""
    pytest.importorskip("triton", reason="triton is not installed: there is no GPU path")
    program = Path(__file__).parent / "fake_gpu" / "passes.py"
    command = [sys.executable, "-W", "ignore", str(program), str(folder), *layouts]
    found = os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")])
    # What torch would compile runs as it is written: the compiler takes no tensors that are fake already.
    environment = {**os.environ, "PYTHONPATH": found, "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def local(folder: Path) -> dict[str, Any]:
    return reports(folder, [*LAYOUTS, *LENDING, *STAGES])


@pytest.fixture(scope="module")
def transformer_engine(folder: Path) -> dict[str, Any]:
    return reports(folder, TRANSFORMER_ENGINE, Path(__file__).parents[1] / "stand_ins")


def test_the_device_is_waited_for_only_where_its_answer_is_needed(local: dict[str, Any]) -> None:
    for name in LAYOUTS:
        # A sequence's ratio takes its log-probs before the loss.
        expected = UPDATE | {HEAD: 2} if name == "gspo, later" else UPDATE
        assert local[name]["update"]["waits"] == expected, name
        assert local[name]["logprobs"]["waits"] == SCORES, name
    assert local["with a reference"]["reference_logprobs"]["waits"] == SCORES


def test_lent_memory_comes_back_without_a_wait_and_goes_to_pinned_memory_once(local: dict[str, Any]) -> None:
    for name in (*LAYOUTS, *LENDING):
        later = local[name]["update of what was lent"]
        assert later["waits"] == local[name]["update"]["waits"], name
        assert num_pinned(later) == num_pinned(local[name]["refresh over the device"]) == 0, "what is pinned stays"
    counts = {name: num_pinned(local[name]["refresh through the host"]) for name in ("one GPU", *LENDING)}
    assert counts["lends nothing"] == counts["one GPU"] == 0
    # Two moments and a float32 copy of each parameter; then the parameters, or the one buffer that holds all.
    assert 3 * counts["lends all"] == 4 * counts["lends optimizer, sharded"] > 0
    assert counts["lends all, sharded"] == counts["lends optimizer, sharded"] + 1


def num_pinned(report: dict[str, Any]) -> int:
    """Return how many tensors in pinned memory lending asked for."""
    return sum(count for place, count in report["pinned"].items() if place.startswith("policy/training/lending.py:"))


def test_stages_wait_for_one_another_besides(local: dict[str, Any]) -> None:
    first, last = (local[name] for name in STAGES)
    rest = {wait: count for wait, count in UPDATE.items() if wait not in (HEAD, SHIFTS)}
    assert first["update"]["waits"] == rest | SENT | RECEIVED | twice(P2P)
    assert last["update"]["waits"] == UPDATE | SENT | RECEIVED | twice(P2P)
    assert (first["logprobs"]["waits"], last["logprobs"]["waits"]) == (SENT, SCORES | RECEIVED)


def twice(place: str) -> dict[str, int]:
    """Return the waits of an exchange forward and one backward."""
    return {f"synchronize in {place}:{name}": 2 for name in ("_communicate", "_communicate_shapes")}


def test_a_refresh_and_a_checkpoint_wait_where_numbers_leave_the_device(local: dict[str, Any]) -> None:
    for name, report in local.items():
        for other in OTHERS.keys() & report.keys():
            assert set(report[other]["waits"]) <= OTHERS[other], (name, other)
    assert all("load" in local[name] for name in ("one GPU", "sharded", "first stage"))


def test_every_kernel_of_the_head_is_launched_where_it_belongs(local: dict[str, Any]) -> None:
    for name in LAYOUTS:
        assert set(local[name]["update"]["launches"]) == BOTH | GRADIENTS | ROWS, name
        assert set(local[name]["logprobs"]["launches"]) == BOTH, name
    assert not local["first stage"]["update"]["launches"]


def test_layers_of_transformer_engine_add_no_wait(transformer_engine: dict[str, Any], local: dict[str, Any]) -> None:
    for name in TRANSFORMER_ENGINE:
        for each in ("update", "logprobs"):
            assert transformer_engine[name][each]["waits"] == local[name][each]["waits"], (name, each)
