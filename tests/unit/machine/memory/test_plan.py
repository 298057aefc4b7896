"""What trainer and engines take of a shared GPU, against published sizes and what a real policy holds."""

import json
import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megatron_p2o.cli import main
from megatron_p2o.config.read import load_config
from megatron_p2o.config.tree import Config, OptimizerConfig, ParallelConfig
from megatron_p2o.machine.layout import with_layout
from megatron_p2o.machine.memory.engine import Gpus
from megatron_p2o.machine.memory.here import num_nodes_for
from megatron_p2o.machine.memory.plan import GIB, RESERVE_BYTES, MemoryPlan, memory_plan
from megatron_p2o.machine.memory.trainer import trainer_memory
from megatron_p2o.machine.memory.words import check_fits, described, warning_of
from megatron_p2o.policy.model.architecture import Architecture, read_architecture
from megatron_p2o.policy.training.ranks import build_policy
from megatron_p2o.testing.fakes import fake_config
from megatron_p2o.testing.policy_oracle import policy_config, random_samples
from megatron_p2o.testing.tested_policy import held_bytes
from megatron_p2o.testing.tiny_model import write_tiny_qwen3

EXAMPLES = Path(__file__).parents[4] / "examples"

QWEN3 = {
    "model_type": "qwen3",
    "hidden_act": "silu",
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
}
SIZES: dict[str, dict[str, Any]] = {
    "4B": {
        **{"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
        "tie_word_embeddings": True,
    },
    "32B": {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64},
}
"""From the published config.json files."""

NUM_PARAMETERS = {"4B": 4_022_468_096, "32B": 32_762_123_264}
"""Parameters of the published checkpoints."""

BUCKETS_4B = 2 * 151936 * 2560 * 2
"""Two, each as large as the embedding, which is larger than `rollout.refresh_bucket_mib`."""

GPU_80 = Gpus(count=8, num_bytes=80 * GIB, num_nodes=1)


def qwen3(size: str, folder: Path) -> Architecture:
    (folder / "config.json").write_text(json.dumps(QWEN3 | SIZES[size]))
    return read_architecture(folder)


def config_of(**settings: Any) -> Config:
    """Return a run with an engine per GPU of eight."""
    dotted = {name.replace("__", "."): value for name, value in settings.items()}
    return fake_config({"rollout.num_engines": 8, "evolution.enabled": False, "sglang": {}, **dotted})


def plan_of(config: Config, architecture: Architecture, gpus: Gpus = GPU_80, releases: bool = True) -> MemoryPlan:
    return memory_plan(config, architecture, gpus, releases_memory=releases)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_trainer_holds_what_is_planned_to_the_byte(tmp_path: Path, dtype: str) -> None:
    directory = write_tiny_qwen3(tmp_path, vocab_size=131, tie_embeddings=True)
    config = policy_config(directory, dtype=dtype)
    with closing(build_policy(config)) as policy:
        assert policy.update(random_samples((3, 4), vocab_size=131), None, 100).outcome == "applied"
        held = held_bytes(policy)
    planned = trainer_memory(config, read_architecture(directory))
    assert {name: getattr(planned, name) for name in held} == held


def test_the_estimate_of_activations_is_what_autograd_keeps_of_the_layers(tmp_path: Path) -> None:
    sizes = {"vocab_size": 131, "hidden_size": 64, "intermediate_size": 192, "num_heads": 8, "head_dim": 16}
    num_tokens, kept, estimated = 200, [], []
    for num_layers in (1, 3):
        directory = write_tiny_qwen3(tmp_path / str(num_layers), num_layers=num_layers, **sizes)
        config = policy_config(directory, optimizer=OptimizerConfig(micro_batch_tokens=num_tokens))
        estimated.append(trainer_memory(config, read_architecture(directory)).likely_activations)
        storages: dict[int, int] = {}
        tensors: list[Tensor] = []  # while they live no other has their address

        def keep(tensor: Tensor, storages: dict[int, int] = storages, tensors: list[Tensor] = tensors) -> Tensor:
            tensors.append(tensor)
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with closing(build_policy(config)) as policy, saved_tensors_hooks(keep, lambda tensor: tensor):
            policy.update(random_samples((num_tokens - 4,), vocab_size=131), None, num_tokens)
            weights = {each.untyped_storage().data_ptr() for each in policy._shard.models[0].parameters()}
        kept.append(sum(size for address, size in storages.items() if address not in weights))
    # Two layers' worth: head and embedding cancel. Rotary tables and the norms' factors are the last percents.
    assert kept[1] - kept[0] == pytest.approx(estimated[1] - estimated[0], rel=0.05)


def test_a_rank_of_a_4b_policy_by_hand(tmp_path: Path) -> None:
    count = NUM_PARAMETERS["4B"]
    config = config_of(parallel=ParallelConfig(data=8, distributed_optimizer=True))
    planned = trainer_memory(config, qwen3("4B", tmp_path))
    assert (planned.parameters, planned.gradients) == (2 * count, 4 * count)
    assert (planned.masters, planned.moments) == (4 * count / 8, 8 * count / 8)
    assert planned.activations == 16384 * 2560 * 2 * 36
    whole = trainer_memory(replace(config, parallel=ParallelConfig(data=8)), qwen3("4B", tmp_path))
    assert whole.resident == 18 * count


def test_a_cache_without_a_size_gets_what_the_others_leave(tmp_path: Path) -> None:
    config = config_of(parallel=ParallelConfig(data=8, distributed_optimizer=True))
    plan = plan_of(config, qwen3("4B", tmp_path))
    count, token = NUM_PARAMETERS["4B"], 2 * 36 * 8 * 128 * 2
    left = 80 * GIB - RESERVE_BYTES - (2 + 12 / 8) * count - 2 * count - BUCKETS_4B
    assert plan.cache_tokens == left // token == 363_701
    training = 7.5 * count + 16384 * 2560 * 2 * 36 + BUCKETS_4B
    assert sum(plan.phases["training"].values()) == training, "engines lend theirs"
    by_host = replace(config, rollout=replace(config.rollout, weight_transfer="host"))
    assert plan_of(by_host, qwen3("4B", tmp_path)).cache_tokens == (left + BUCKETS_4B) // token == 374_252
    # An engine that keeps its memory leaves room for the activations as well, or what one response needs.
    recomputing = replace(config, megatron={"recompute_granularity": "full"})
    kept = plan_of(recomputing, qwen3("4B", tmp_path), releases=False)
    assert kept.cache_tokens == (left - 4 * count - kept.trainer.likely_activations) // token
    needed = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    assert plan_of(config, qwen3("4B", tmp_path), releases=False).cache_tokens == needed


@pytest.mark.parametrize(
    ("lend", "bytes_of_parameter", "cache_gib"),
    [("none", 2 + 4 + 12 / 8, 35.0), ("gradients", 2 + 12 / 8, 49.9), ("optimizer", 2.0, 55.6), ("all", 0.0, 63.1)],
)
def test_the_cache_grows_by_what_the_trainer_lends(
    tmp_path: Path, lend: str, bytes_of_parameter: float, cache_gib: float
) -> None:
    config = config_of(parallel=ParallelConfig(data=8, distributed_optimizer=True), optimizer__lend=lend)
    plan = plan_of(config, qwen3("4B", tmp_path))
    count, token = NUM_PARAMETERS["4B"], 2 * 36 * 8 * 128 * 2
    left = 80 * GIB - RESERVE_BYTES - bytes_of_parameter * count - 2 * count - BUCKETS_4B
    assert plan.cache_tokens == left // token and plan.cache / GIB == pytest.approx(cache_gib, abs=0.05)
    assert sum(plan.phases["training"].values()) == 7.5 * count + 16384 * 2560 * 2 * 36 + BUCKETS_4B, "all is back"
    # Over the devices engines wake their weights while what is copied to the host is still here.
    refresh = plan.phases.get("refresh", {})
    assert sum(refresh.values()) == ((2 + 12 / 8 + 2) * count + BUCKETS_4B if lend in ("optimizer", "all") else 0)
    by_host = replace(config, rollout=replace(config.rollout, weight_transfer="host"))
    assert "refresh" not in plan_of(by_host, qwen3("4B", tmp_path)).phases
    # An engine that keeps its memory has no use for what is back in every update.
    kept = [plan_of(each, qwen3("4B", tmp_path), releases=False).cache for each in (config, lending_nothing(config))]
    assert kept[0] == kept[1]


def lending_nothing(config: Config) -> Config:
    return replace(config, optimizer=replace(config.optimizer, lend="none"))


def test_a_cache_larger_than_what_is_left_gets_what_is_left(tmp_path: Path) -> None:
    config = config_of(parallel=ParallelConfig(data=8, distributed_optimizer=True))
    architecture = qwen3("4B", tmp_path)
    left = plan_of(config, architecture).cache_tokens
    for asked, planned in ((left - 1, left - 1), (left + 1, left), (100 * left, left)):
        asking = replace(config, rollout=replace(config.rollout, max_total_tokens=asked))
        plan = plan_of(asking, architecture)
        assert plan.cache_tokens == planned
        check_fits(plan, asking)


def test_an_engine_s_share_is_of_what_it_finds_before_the_first_step(tmp_path: Path) -> None:
    config = config_of(parallel=ParallelConfig(data=8, distributed_optimizer=True), rollout__num_engines=16)
    plan = plan_of(replace(config, sglang={"mem-fraction-static": 0.4}), qwen3("4B", tmp_path))
    count = NUM_PARAMETERS["4B"]
    free = 80 * GIB - RESERVE_BYTES - BUCKETS_4B - 2.5 * count  # the moments come later, gradients are lent
    first, second = 0.4 * free, 0.4 * 0.6 * free
    assert 2 * (plan.weights + plan.cache) == pytest.approx(first + second, rel=1e-6)


def test_the_reflection_server_shares_a_gpu_and_keeps_its_memory(tmp_path: Path) -> None:
    sharded = ParallelConfig(data=8, distributed_optimizer=True)
    config = config_of(evolution__enabled=True, rollout__max_total_tokens=50_000, parallel=sharded)
    config = replace(config, megatron={"recompute_granularity": "full"})
    plan = plan_of(config, qwen3("4B", tmp_path))
    assert (plan.num_lending, plan.num_staying) == (1, 1)
    assert plan.phases["training"]["KV cache"] == 50_000 * 2 * 36 * 8 * 128 * 2
    for nobody in ({"templates_file": "templates.txt"}, {"plain_rollouts": 9}):
        unread = replace(config, evolution=replace(config.evolution, **nobody))
        assert plan_of(unread, qwen3("4B", tmp_path)).num_staying == 0, "nothing is reflected on"
    alone = plan_of(replace(config, rollout=replace(config.rollout, num_engines=7)), qwen3("4B", tmp_path))
    assert (alone.num_lending, alone.num_staying) == (0, 1), "it is beside the trainer also without an engine"


def test_what_cannot_fit_is_refused_with_every_number_and_the_settings_to_change(tmp_path: Path) -> None:
    config = config_of(parallel=ParallelConfig(data=8), optimizer__lend="none")
    with pytest.raises(ValueError) as refused:
        check_fits(plan_of(config, qwen3("4B", tmp_path), Gpus(count=8, num_bytes=70 * GIB, num_nodes=1)), config)
    message = str(refused.value)
    # 18 bytes a parameter, 2 in the engine, two buckets: 76.4 GiB.
    assert message.startswith(
        "sampling does not fit a GPU: parameters 7.5, gradients 15.0, optimizer 45.0, weight buckets 1.4, engine "
        "weights 7.5; together 76.4 of 70.0 GiB. Remedies: set parallel.distributed_optimizer; raise parallel.tensor"
    )
    sharded = replace(config, parallel=ParallelConfig(data=8, distributed_optimizer=True))
    check_fits(plan_of(sharded, qwen3("4B", tmp_path), Gpus(count=8, num_bytes=70 * GIB, num_nodes=1)), sharded)


def test_activations_that_likely_do_not_fit_are_warned_of_until_they_are_recomputed(tmp_path: Path) -> None:
    config = config_of(parallel=ParallelConfig(data=8, distributed_optimizer=True))
    architecture = qwen3("4B", tmp_path)
    plan = plan_of(config, architecture)
    check_fits(plan, config)
    # By hand: 36 layers of 16,384 tokens, 6 hidden states and queries, 5 of keys and the MLP, 2 bytes each.
    elements = 6 * (2560 + 4096) + 5 * (1024 + 9728)
    assert plan.trainer.likely_activations == 36 * 16384 * elements * 2
    assert "activations about 102.9" in warning_of(plan) and "recompute" in warning_of(plan)
    recomputing = replace(config, megatron={"recompute_granularity": "full", "recompute_num_layers": 1})
    assert plan_of(recomputing, architecture).trainer.likely_activations == 16384 * 2 * (36 * 2560 + elements)
    assert warning_of(plan_of(recomputing, architecture)) == ""
    # 20 of the 36 layers are recomputed; 16 keep theirs, and one at a time of the others has it again.
    block = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 20}
    kept = plan_of(replace(config, megatron=block), architecture).trainer
    assert kept.likely_activations == 16384 * 2 * (36 * 2560 + 17 * elements)
    assert kept.activations == plan_of(recomputing, architecture).trainer.activations == 16384 * 2 * 36 * 2560
    # With the whole optimizer on each rank, its step takes more: 4 bytes for each parameter of 2.
    whole = plan_of(replace(recomputing, parallel=ParallelConfig(data=8)), architecture).trainer
    assert whole.likely_activations == 2 * whole.parameters > 15e9


def test_a_cache_too_small_for_one_response_is_refused(tmp_path: Path) -> None:
    config = config_of(parallel=ParallelConfig(data=8, distributed_optimizer=True), rollout__max_new_tokens=12288)
    config, gpus = lending_nothing(config), Gpus(count=8, num_bytes=43 * GIB, num_nodes=1)
    with pytest.raises(ValueError, match=r"would hold \d+ tokens, fewer than .*rollout\.max_new_tokens = 16384"):
        check_fits(plan_of(config, qwen3("4B", tmp_path), gpus), config)


def test_the_doctor_plans_for_gpus_that_are_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    architecture, example = qwen3("32B", tmp_path), EXAMPLES / "p2o_qwen3_32b.yaml"
    command = ["doctor", str(example), "--set", f"model.path={tmp_path}", "--strict", "--plan"]
    assert main([*command, "8x80"]) == 0
    planned = [line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines() if line.startswith("plan ")]
    plan = plan_of(with_layout(load_config(example), 4, 8), architecture, replace(GPU_80, num_nodes=4))
    assert planned[0].startswith(
        "layout: tensor 8 x pipeline 2 x context 1 x data 2 = 32 ranks, sequence parallelism on"
    )
    assert planned[1] == "memory of 4 x 8 GPUs of 80.0 GiB, engines lend theirs to the trainer"
    assert planned[2:] == described(plan)
    assert main([*command, "8x20"]) == 1
    assert re.search(r"plan +MISSING \w+ does not fit a GPU: .* of 20\.0 GiB\. Remedies: ", capsys.readouterr().out)
    assert main([*command, "80"]) == 2
    assert "--plan=80 must be GPUS-OF-A-NODExGIB-OF-EACH" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*qwen3*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("releases", [True, False], ids=["memory lent", "memory kept"])
def test_every_example_for_80_gb_gpus_fits_them(path: Path, releases: bool, tmp_path: Path) -> None:
    settings = load_config(path)
    size = "32B" if "32b" in path.stem else "4B"
    gpus = replace(GPU_80, num_nodes=num_nodes_for(settings, 8))
    assert gpus.num_nodes == (4 if size == "32B" else 1)
    config = with_layout(settings, gpus.num_nodes, gpus.count)
    plan = plan_of(config, qwen3(size, tmp_path), gpus, releases)
    check_fits(plan, config)
    assert warning_of(plan) == ""
    for parts in plan.phases.values():
        assert sum(parts.values()) <= 80 * GIB - RESERVE_BYTES, parts
