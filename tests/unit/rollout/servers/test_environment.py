"""What an engine's process is told by its environment, and the stand-ins that it finds without a GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_p2o.processes import STORE_FILE_VARIABLE
from megatron_p2o.rollout.servers.environment import CPU_SITE, engine_environment
from megatron_p2o.rollout.servers.server_arguments import CPU_ARGUMENTS, GPU_ARGUMENTS


def test_an_engine_does_not_inherit_the_trainer_s_process_group(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    of_ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
    for name in (*of_ranks, STORE_FILE_VARIABLE, "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("RANKING", "kept")
    environment = engine_environment({"device": "cpu"}, tmp_path, own_port=1234)
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", STORE_FILE_VARIABLE} & environment.keys()
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("127.0.0.1", "1234")
    assert (environment["GLOO_SOCKET_IFNAME"], environment["NCCL_SOCKET_IFNAME"]) == ("lo", "=lo")
    assert environment["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] == f"file://{tmp_path}/store"
    assert environment["RANKING"] == "kept"
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(CPU_SITE)
    assert environment["TMPDIR"] == str(tmp_path)
    assert "SGLANG_CPU_OMP_THREADS_BIND" not in environment
    assert "SGLANG_USE_CPU_ENGINE" not in engine_environment({}, tmp_path)


def test_names_that_sglang_would_ignore_or_refuse_are_known_to_the_installed_one(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0]) / "srt"
    fields = (root / "arg_groups/field_order.py").read_text()
    assert [name for name in (*GPU_ARGUMENTS, *CPU_ARGUMENTS) if f'"{name}"' not in fields] == []
    sources = (root / "environ.py").read_text() + (root / "entrypoints/http_server.py").read_text()
    told = [name for name in engine_environment({}, tmp_path) if name.startswith("SGLANG_")]
    assert len(told) == 4 and [name for name in told if name not in sources] == []


def test_an_engine_that_gives_memory_away_has_no_growing_segments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    environment = engine_environment({"enable_memory_saver": True}, tmp_path)
    assert "PYTORCH_CUDA_ALLOC_CONF" not in environment
    assert environment["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:64"
    assert "PYTORCH_CUDA_ALLOC_CONF" in engine_environment({"enable_memory_saver": False}, tmp_path)


def test_an_engine_that_gives_memory_away_finds_the_cuda_runtime_of_pip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = tmp_path / "nvidia" / "cu13" / "lib" / "libcudart.so.13"
    runtime.parent.mkdir(parents=True)
    runtime.touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("LD_LIBRARY_PATH", "/chosen")
    folders = engine_environment({"enable_memory_saver": True}, tmp_path)["LD_LIBRARY_PATH"].split(os.pathsep)
    assert folders[0] == "/chosen" and str(runtime.parent) in folders
    assert engine_environment({"enable_memory_saver": False}, tmp_path)["LD_LIBRARY_PATH"] == "/chosen"
    monkeypatch.delenv("LD_LIBRARY_PATH")
    assert str(runtime.parent) in engine_environment({"enable_memory_saver": True}, tmp_path)["LD_LIBRARY_PATH"]


def test_each_rank_of_a_cpu_engine_is_bound_to_a_core(tmp_path: Path) -> None:
    bound = engine_environment({"device": "cpu", "tp_size": 3}, tmp_path)["SGLANG_CPU_OMP_THREADS_BIND"].split("|")
    assert len(bound) == 3
    assert {int(core) for core in bound} <= os.sched_getaffinity(0)


def run_in_engine_environment(program: str, site: Path, tmp_path: Path) -> str:
    environment = engine_environment({"device": "cpu"}, tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join([str(CPU_SITE), str(site)])
    # -S: no site-packages, so that what is installed there cannot decide the outcome; the site module is run by hand.
    start = "import sitecustomize\n"
    return subprocess.run(
        [sys.executable, "-S", "-c", start + program], env=environment, check=True, capture_output=True, text=True
    ).stdout


def test_missing_packages_are_stood_in_for(tmp_path: Path) -> None:
    program = """
import triton, triton.language as tl
from triton.runtime import driver
from torchvision.transforms import InterpolationMode
from sgl_kernel import top_k_renorm_prob

@triton.autotune(configs=[triton.Config({}, num_warps=4)], key=[])
@triton.jit
def kernel(x: tl.constexpr):
    return x + 1

assert kernel(1) == 2 and triton.cdiv(7, 2) == 4 and triton.next_power_of_2(5) == 8
assert "cpu" not in triton.backends.backends
assert InterpolationMode.BICUBIC != InterpolationMode.NEAREST
for attempt in (lambda: top_k_renorm_prob(1), lambda: __import__("sgl_kernel.scalar_type")):
    try:
        attempt()
    except (NotImplementedError, ModuleNotFoundError) as error:
        print(type(error).__name__)
"""
    assert run_in_engine_environment(program, tmp_path, tmp_path).split() == [
        "NotImplementedError",
        "ModuleNotFoundError",
    ]


def test_an_installed_package_wins_over_its_stand_in(tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("mark = 'real'")
    assert run_in_engine_environment("import triton; print(triton.mark)", tmp_path, tmp_path) == "real\n"


def test_stand_ins_are_for_cpu_engines_only(tmp_path: Path) -> None:
    environment = engine_environment({}, tmp_path) | {"PYTHONPATH": str(CPU_SITE)}
    program = "import sitecustomize, importlib.util; print(importlib.util.find_spec('sgl_kernel'))"
    answer = subprocess.run(
        [sys.executable, "-S", "-c", program], env=environment, check=True, capture_output=True, text=True
    )
    assert answer.stdout == "None\n"
