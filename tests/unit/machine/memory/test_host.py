"""The memory of a run without GPUs: counted by hand, and refused where the machine has less."""

from pathlib import Path
from typing import Any

import pytest

from megatron_p2o.config.tree import Config, ParallelConfig
from megatron_p2o.machine.memory.host import host_lines, host_parts, machine_bytes
from megatron_p2o.policy.model.architecture import Architecture, read_architecture
from megatron_p2o.testing.fakes import fake_config
from megatron_p2o.testing.tiny_model import write_tiny_qwen3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def architecture(model: Path) -> Architecture:
    return read_architecture(model)


@pytest.fixture(scope="module")
def num_parameters(model: Path) -> int:
    """Return the parameters that the file holds."""
    from safetensors.torch import load_file

    return sum(tensor.numel() for tensor in load_file(model / "model.safetensors").values())


def config_of(dtype: str = "float32", **settings: Any) -> Config:
    dotted = {name.replace("__", "."): value for name, value in settings.items()}
    return fake_config({"evolution.enabled": False, "sglang": {}, "model.dtype": dtype, **dotted})


@pytest.mark.parametrize(("dtype", "trained", "served"), [("float32", (4, 4, 8), 4), ("bfloat16", (2, 4, 4 + 8), 2)])
def test_every_parameter_is_held_as_weight_gradient_optimizer_state_and_in_the_engine(
    dtype: str, trained: tuple[int, int, int], served: int, architecture: Architecture, num_parameters: int
) -> None:
    parts = host_parts(config_of(dtype), architecture)
    assert list(parts) == ["weights", "gradients", "optimizer", "weights of the engine"]
    assert list(parts.values()) == [num_parameters * size for size in (*trained, served)]


def test_replicas_hold_copies_and_share_what_a_distributed_optimizer_shares(
    architecture: Architecture, num_parameters: int
) -> None:
    copies = host_parts(config_of(parallel=ParallelConfig(data=3)), architecture)
    assert list(copies.values())[:3] == [3 * num_parameters * size for size in (4, 4, 8)]
    shared = ParallelConfig(data=3, tensor=2, distributed_optimizer=True)
    parts = host_parts(config_of(parallel=shared), architecture)
    assert list(parts.values())[:3] == [num_parameters * size for size in (3 * 4, 3 * 4, 8)]


def test_each_engine_and_the_reflection_server_hold_the_weights(
    architecture: Architecture, num_parameters: int
) -> None:
    config = config_of(rollout__num_engines=2, evolution__enabled=True)
    assert config.evolution.searches and config.evolution.reflection.backend == "self"
    assert host_parts(config, architecture)["weights of 3 servers"] == 3 * 4 * num_parameters


def test_a_run_that_takes_more_than_the_machine_has_is_refused_on_a_single_machine(
    architecture: Architecture, num_parameters: int
) -> None:
    need = 20 * num_parameters
    lines = host_lines(config_of(), architecture, num_nodes=1, num_bytes=need)
    assert lines[0].startswith(f"memory without a GPU: at least {need / 2**20:.1f} MiB (this machine has ")
    assert lines[1].startswith("memory not counted: activations, the KV cache of an engine (")
    with pytest.raises(ValueError, match=r"at least .* and this machine has .*: weights .*gradients.*--plan 8x80"):
        host_lines(config_of(), architecture, num_nodes=1, num_bytes=need - 1)
    assert "on 2 nodes" in host_lines(config_of(), architecture, num_nodes=2, num_bytes=1)[0]
    assert machine_bytes() > 1 << 28


@pytest.mark.parametrize(("limit", "is_taken"), [("1048576", True), ("max", False), (str(1 << 62), False)])
def test_a_container_has_what_its_limit_says(limit: str, is_taken: bool, tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    found = machine_bytes([tmp_path / "memory.max", tmp_path / "absent"])
    assert found == (1 << 20 if is_taken else machine_bytes([]))
