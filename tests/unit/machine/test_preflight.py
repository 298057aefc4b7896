"""What a run needs of disk, ports and time is found before it starts."""

import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_p2o.config.read import load_config
from megatron_p2o.machine.nodes import Nodes
from megatron_p2o.machine.preflight import Pace, Preflight, checkpoint_bytes, preflight, rollout_bytes
from megatron_p2o.policy.model.architecture import read_architecture
from megatron_p2o.testing.tiny_model import write_tiny_qwen3

NUM_STEPS = 10


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("tiny"))


def found(
    model: Path, *overrides: str, nodes: Nodes | None = None, pace: Pace | None = None, **environment: str
) -> Preflight:
    named = ["run.name=run", f"run.directory={model}", f"model.path={model}", "data.train=train.jsonl"]
    config = load_config(None, [*named, *overrides])
    return preflight(config, read_architecture(model), NUM_STEPS, nodes, environment, pace=pace, now=1_000_000.0)


@pytest.mark.parametrize(("dtype", "expected"), [("float32", 4 + 8), ("bfloat16", 2 + 4 + 8)])
def test_a_checkpoint_holds_weights_and_the_state_of_the_optimizer(dtype: str, expected: int, model: Path) -> None:
    num_parameters = (model / "model.safetensors").stat().st_size // 4  # float32, and a head of some bytes
    assert checkpoint_bytes(read_architecture(model), dtype) == pytest.approx(expected * num_parameters, rel=0.02)


def test_a_disk_without_room_for_the_checkpoints_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = [10 << 30]
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=free[0]))
    small = ("rollout.max_new_tokens=100", "schedule.keep_checkpoints=3", "evaluation.best_set=null")
    fine = found(model, *small)
    assert fine.problems == []
    assert fine.lines[0].startswith(f"disk: 10.0 GiB free in {model}; 5 checkpoints of ")
    free[0] = 1 << 10
    (problem,) = found(model, *small).problems
    assert f"disk: {model} has 0.0 MiB free, and 5 checkpoints take" in problem
    assert "lower schedule.keep_checkpoints" in problem
    free[0] = 100 << 20
    short = found(model, "rollout.max_new_tokens=12288")
    assert short.problems == [] and "disk may become short" in short.lines[1]


def test_rollouts_take_what_their_settings_say(model: Path) -> None:
    def size(*overrides: str) -> int:
        named = ["run.name=run", f"model.path={model}", "data.train=train.jsonl", "rollout.max_new_tokens=100"]
        return rollout_bytes(load_config(None, [*named, *overrides]), NUM_STEPS)

    assert size() == 10 * 128 * 6 * (1500 + 500)
    assert size("logging.rollouts_every_steps=5") == 2 * 128 * 6 * 2000
    assert size("logging.rollouts_every_steps=0") == 0
    further = ("evolution.plain_rollouts=300", "schedule.epochs=4")
    assert size(*further) == (10 * 128 * 6 + 4 * 300) * 2000
    assert size(*further, "evolution.enabled=false") == size()
    assert size("schedule.max_tokens=1000") == 1000 * (1500 + 5) + 128 * 6 * 2000, "and not that of the epochs it ends"
    assert size("schedule.max_tokens=100000000") == size()


def node(rank: int, port: int) -> Nodes:
    return Nodes(count=2, rank=rank, head_address="127.0.0.1", head_port=port, launch_id="1")


def test_a_port_that_is_in_use_is_named_by_the_head_alone(model: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        port = holder.getsockname()[1]
        (problem,) = found(model, nodes=node(0, port)).problems
        assert problem == f"port {port}, at which the nodes meet, is in use: --head names another one"
        assert found(model, nodes=node(1, port)).problems == []
    assert f"port {port}, at which the nodes meet, is free" in found(model, nodes=node(0, port)).lines


@pytest.mark.parametrize(
    ("overrides", "is_warned"),
    [
        (["evolution.beside_training=false", "evolution.round_timeout_s=3601"], True),
        (["evolution.beside_training=false", "evolution.round_timeout_s=3599"], False),
        (["evolution.round_timeout_s=3601"], False),
        (["evolution.enabled=false"], False),
        (["evolution.beside_training=false", "evolution.round_timeout_s=3601", "evolution.plain_rollouts=9"], False),
    ],
)
def test_a_round_that_may_outlast_the_job_is_told(overrides: Sequence[str], is_warned: bool, model: Path) -> None:
    lines = found(model, *overrides, SLURM_JOB_END_TIME=str(1_000_000 + 3600)).lines
    assert "time: 60 minutes are left of the job" in lines
    assert any("time may become short" in line for line in lines) == is_warned
    without: Any = found(model, *overrides).lines
    assert not any(line.startswith("time") for line in without)


@pytest.mark.parametrize(
    ("left_s", "num_fitting"), [(3600, 29), (250, 2), (249, 1), (130, 1), (129, 0), (5, 0), (-60, 0)]
)
def test_the_steps_that_fit_into_a_job_are_counted_by_the_run_s_own_pace(
    left_s: int, num_fitting: int, model: Path
) -> None:
    pace = Pace(num_steps=20, step_s=120.0, save_s=10.0)
    known = found(model, pace=pace, SLURM_JOB_END_TIME=str(1_000_000 + left_s))
    (line,) = (line for line in known.lines if line.startswith("time: "))
    assert line.endswith(
        f"enough for about {num_fitting} steps: the last 20 took 120.0 s (median), a checkpoint 10.0 s"
    )
    assert len(known.problems) == (num_fitting == 0)
    assert all("not enough for one step and a checkpoint" in problem for problem in known.problems)
    assert all("sbatch --time" in problem for problem in known.problems)


def test_what_is_not_known_of_a_run_is_left_out_and_the_rest_is_looked_at(model: Path) -> None:
    config = load_config(None, ["run.name=run", f"run.directory={model}", "model.path=gone", "data.train=gone.jsonl"])
    environment = {"SLURM_JOB_END_TIME": str(1_000_000 + 600)}
    assert preflight(config, None, None, None, environment, now=1_000_000.0).lines == [
        "time: 10 minutes are left of the job"
    ]
    (disk,) = preflight(config, read_architecture(model), None, None, {}).lines
    assert disk.startswith("disk: ") and "rollouts" not in disk
