import os
import signal
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_p2o.config.tree import (
    Config,
    DataConfig,
    EvolutionConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    one_task,
)
from megatron_p2o.rollout.servers import server
from megatron_p2o.rollout.servers.scratch import Scratch
from megatron_p2o.rollout.servers.server import EngineServer, EngineStartFailed, reserve_port
from megatron_p2o.rollout.servers.server_arguments import (
    EnginePlace,
    check_arguments,
    engine_places,
    is_deterministic,
    server_arguments,
)
from megatron_p2o.testing.fakes import fake_config

PLACE = EnginePlace(index=1, node=0, slot=1)


def config_with(sglang: dict | None = None, **rollout) -> Config:
    return Config(
        run=RunConfig(name="test", seed=10),
        model=ModelConfig(path="/models/policy", dtype="float32"),
        data=DataConfig(train=one_task("train.jsonl")),
        rollout=RolloutConfig(**rollout),
        sglang=sglang or {},
    )


def test_server_arguments_follow_the_settings() -> None:
    arguments = server_arguments(
        config_with({"chunked-prefill-size": 64}, max_running_requests=32, max_total_tokens=999), PLACE, num_gpus=0
    )
    assert arguments["model_path"] == "/models/policy"
    assert arguments["dtype"] == "float32"
    assert arguments["device"] == "cpu"
    assert arguments["max_running_requests"] == 32
    assert arguments["max_total_tokens"] == 999
    assert arguments["chunked_prefill_size"] == 64
    assert arguments["random_seed"] == 11, "engines of one run must not sample alike"


@pytest.mark.parametrize(
    ("setting", "num_gpus", "expected"),
    [(None, 0, True), (None, 8, False), (True, 8, True), (False, 0, False)],
)
def test_engines_are_deterministic_as_set_or_else_without_gpus(
    setting: bool | None, num_gpus: int, expected: bool
) -> None:
    config = fake_config({"rollout.deterministic": setting})
    assert is_deterministic(config, num_gpus) == expected
    arguments = server_arguments(config, PLACE, num_gpus)
    assert arguments["enable_deterministic_inference"] == expected


def test_engines_that_serve_evolution_put_training_first() -> None:
    shared = server_arguments(config_with(), PLACE, num_gpus=0)
    assert shared["enable_priority_scheduling"] is True
    assert shared["priority_scheduling_preemption_threshold"] == 0
    assert shared["retraction_policy"] == "priority"
    alone = server_arguments(replace(config_with(), evolution=EvolutionConfig(enabled=False)), PLACE, num_gpus=0)
    assert not {"enable_priority_scheduling", "retraction_policy"} & alone.keys()


def test_an_order_of_requests_without_priorities_is_refused_beside_evolution() -> None:
    longest_prefix = config_with({"schedule-policy": "lpm"})
    with pytest.raises(ValueError, match=r"sglang\.schedule_policy=lpm must be fcfs or lof .*leave it out"):
        server_arguments(longest_prefix, PLACE, num_gpus=0)
    without = replace(longest_prefix, evolution=EvolutionConfig(enabled=False))
    assert server_arguments(without, PLACE, num_gpus=0)["schedule_policy"] == "lpm"
    with pytest.raises(ValueError, match=r"sglang\.enable_priority_scheduling is decided by evolution\.enabled"):
        server_arguments(config_with({"enable_priority_scheduling": False}), PLACE, num_gpus=0)


def test_engines_on_gpus_follow_each_other() -> None:
    arguments = server_arguments(config_with(tensor_parallel=2), EnginePlace(index=11, node=1, slot=3), num_gpus=8)
    assert arguments["base_gpu_id"] == 6
    assert arguments["tp_size"] == 2
    assert "device" not in arguments
    assert arguments["max_total_tokens"] is None
    assert arguments["cuda_graph_backend_prefill"] == "disabled"
    chosen = config_with({"cuda-graph-backend-prefill": "full"})
    assert server_arguments(chosen, PLACE, num_gpus=8)["cuda_graph_backend_prefill"] == "full"
    assert "cuda_graph_backend_prefill" not in server_arguments(config_with(), PLACE, num_gpus=0)
    fifth = EnginePlace(index=12, node=1, slot=4)
    assert server_arguments(config_with(tensor_parallel=2), fifth, num_gpus=8)["base_gpu_id"] == 0


@pytest.mark.parametrize(
    ("num_engines", "num_nodes", "nodes", "slots"),
    [
        (1, 1, [0], [0]),
        (1, 4, [0], [0]),
        (2, 4, [0, 1], [0, 0]),
        (4, 2, [0, 0, 1, 1], [0, 1, 0, 1]),
        (5, 2, [0, 0, 0, 1, 1], [0, 1, 2, 0, 1]),
    ],
)
def test_engines_are_spread_over_the_nodes(num_engines: int, num_nodes: int, nodes: list, slots: list) -> None:
    places = engine_places(num_engines, num_nodes)
    assert [place.index for place in places] == list(range(num_engines))
    assert [place.node for place in places] == nodes
    assert [place.slot for place in places] == slots


def test_the_sglang_section_wins_over_our_choices_for_the_cpu() -> None:
    assert server_arguments(config_with({"sleep_on_idle": False}), PLACE, num_gpus=0)["sleep_on_idle"] is False


def test_arguments_that_other_settings_decide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sglang\.tp_size is decided by rollout\.tensor_parallel"):
        server_arguments(config_with({"tp-size": 2}), PLACE, num_gpus=0)


def test_a_server_s_address_and_keys_cannot_be_set(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sglang\.host is decided by the program"):
        EngineServer("engine 0", {"host": "0.0.0.0"}, tmp_path / "log")


def never_ready(folder: Path, monkeypatch: pytest.MonkeyPatch) -> EngineServer:
    """Return a server whose process reads its input for ever; the caller must stop it."""
    monkeypatch.setattr(server, "LAUNCHER", "code")
    return EngineServer("engine 0", {"model_path": "model", "device": "cpu"}, folder / "log")


def test_a_wait_ends_with_stop_even_where_the_process_cannot_be_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = never_ready(tmp_path, monkeypatch)
    try:
        with ThreadPoolExecutor(1) as threads:
            ready = threads.submit(engine.wait_until_ready, 600.0)
            monkeypatch.setattr(os, "killpg", lambda *_: None)
            monkeypatch.setattr(server, "KILL_TIMEOUT_S", 0.1)
            with pytest.raises(subprocess.TimeoutExpired):
                engine.stop()
            with pytest.raises(EngineStartFailed, match="engine 0 was stopped while it started"):
                ready.result(timeout=60)
    finally:
        monkeypatch.undo()
        engine.stop()


def test_a_server_whose_end_foreign_code_has_seen_is_one_that_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = never_ready(tmp_path, monkeypatch)
    try:
        assert engine.is_alive()
        os.kill(engine.pid, signal.SIGKILL)
        os.waitpid(engine.pid, 0)
        assert not engine.is_alive()
        with pytest.raises(EngineStartFailed, match="engine 0 ended while starting"):
            engine.wait_until_ready(60.0)
    finally:
        engine.stop()


def test_no_server_is_asked_where_nothing_is_set_or_another_setting_decides() -> None:
    check_arguments(config_with({}))
    with pytest.raises(ValueError, match=r"sglang\.tp_size is decided by rollout\.tensor_parallel"):
        check_arguments(config_with({"tp-size": 2}))
    with pytest.raises(ValueError, match=r"sglang\.host is decided by the program"):
        check_arguments(config_with({"host": "0.0.0.0"}))


def test_a_reserved_port_is_given_to_nobody_else_and_still_serves() -> None:
    with reserve_port() as holder:
        port = holder.getsockname()[1]
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind(("127.0.0.1", port))
        with socket.create_server(("127.0.0.1", port)) as listener, socket.create_connection(("127.0.0.1", port)):
            listener.settimeout(5)
            listener.accept()[0].close()


def test_reserved_ports_differ() -> None:
    holders = [reserve_port() for _ in range(50)]
    assert len({holder.getsockname()[1] for holder in holders}) == 50
    for holder in holders:
        holder.close()


ABANDON = """
import os, signal
from pathlib import Path
from megatron_p2o.rollout.servers.scratch import Scratch

scratch = Scratch()
shared = Path(f"/dev/shm/sglang_loads_test_{os.getpid()}.shm")
shared.touch()
scratch.note([shared])
print(scratch.path, shared, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_job_left_is_removed_by_the_next_engine_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    in_use = Scratch()
    mine = Path(f"/dev/shm/sglang_loads_test_{os.getpid()}.shm")
    mine.touch()
    in_use.note([mine])
    command = [sys.executable, "-c", ABANDON]
    killed = subprocess.run(command, env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, text=True)
    left = [Path(path) for path in killed.stdout.split()]
    assert [path.exists() for path in left] == [True, True], killed.stderr
    latest = Scratch()
    assert not [path for path in left if path.exists()]
    assert in_use.path.exists() and mine.exists()
    in_use.remove()
    late = mine.with_name(f"sglang_loads_late_{os.getpid()}.shm")
    late.touch()
    in_use.note([late])
    latest.remove()
    assert not mine.exists() and not late.exists() and list(tmp_path.iterdir()) == []
