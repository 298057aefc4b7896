"""The environment of an engine process, without secrets and without the variables of the trainer's process group."""

import importlib.util
import itertools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_p2o.processes import LOOPBACK_ONLY, STORE_FILE_VARIABLE, child_environment

HOST = "127.0.0.1"
"""Servers are never reachable from another machine: SGLang's weight routes and ZMQ sockets trust their callers."""

CPU_SITE = Path(__file__).parents[1] / "inside_sglang" / "cpu_site"
ENGINE_SITE = CPU_SITE.with_name("engine_site")
"""On the path of engines with priorities: names the plugin `preemption` to SGLang."""

TORCHRUN_VARIABLES = re.compile(
    r"((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+|TORCH_NCCL_\w+"
    rf"|{STORE_FILE_VARIABLE})$"
)
"""Variables of the trainer's process group, which an engine must not join."""

ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")

KEEP_ALIVE_S = 3600
"""Time a server keeps idle connections; the client closes them long before."""


def engine_environment(arguments: Mapping[str, Any], scratch: Path, own_port: int = 0) -> dict[str, str]:
    """Return the environment of an engine process: this one's, without secrets and what binds it to ranks.

    `own_port`: one that no other engine of this machine has.
    """
    environment = {name: value for name, value in child_environment().items() if not TORCHRUN_VARIABLES.match(name)}
    environment |= {
        "TMPDIR": str(scratch),  # holds SGLang's ZMQ sockets, which it never removes
        "HF_HUB_OFFLINE": "1",
        # SGLang's processes meet in a file: torch's store would listen on every address, for everybody.
        "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": f"file://{scratch}/store",
        **LOOPBACK_ONLY,
        # Nobody listens there. On some CPUs SGLang names shared memory by them, which another engine must not find.
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(own_port),
        # An idle connection that the server closes while the client sends on it would look like the server's death.
        "SGLANG_TIMEOUT_KEEP_ALIVE": str(KEEP_ALIVE_S),
        # The heartbeat sets its own limit; SGLang's would call an engine hung that is busy with a long prefill.
        "SGLANG_HEALTH_CHECK_TIMEOUT": str(KEEP_ALIVE_S),
        # The trainer holds more of some GPUs than of others, which SGLang would take for foreign processes and refuse.
        "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",
    }
    if arguments.get("enable_priority_scheduling"):
        environment |= _with_search_path(ENGINE_SITE, environment)
    if arguments.get("enable_memory_saver"):
        environment = _for_memory_saver(environment)
    if arguments.get("device") == "cpu":
        environment |= _for_cpu(environment, arguments.get("tp_size", 1))
    return environment


def _for_memory_saver(environment: Mapping[str, str]) -> dict[str, str]:
    """Return `environment` with what SGLang needs to lend its memory."""
    # The trainer may want segments that grow; the memory saver refuses to work in a process with them.
    kept = {
        name: value
        for name, value in environment.items()
        if name not in ALLOCATOR_VARIABLES or "expandable_segments:True" not in value
    }
    # torch_memory_saver is preloaded, before torch could point it to pip's CUDA runtime.
    library_path = [*filter(None, [environment.get("LD_LIBRARY_PATH")]), *cuda_runtime_folders()]
    return kept | ({"LD_LIBRARY_PATH": os.pathsep.join(library_path)} if library_path else {})


def _for_cpu(environment: Mapping[str, str], num_ranks: int) -> dict[str, str]:
    """Return the variables with which SGLang serves without a GPU."""
    variables = {
        **_with_search_path(CPU_SITE, environment),
        "SGLANG_USE_CPU_ENGINE": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "OMP_NUM_THREADS": "1",  # more threads spin against the trainer for the same cores
    }
    if num_ranks > 1:
        cores = itertools.cycle(sorted(os.sched_getaffinity(0)))
        bound = [str(core) for core in itertools.islice(cores, num_ranks)]
        variables["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(bound)
    return variables


def _with_search_path(folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variable that has Python look into `folder` first."""
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [environment.get("PYTHONPATH")])])}


def cuda_runtime_folders() -> list[str]:
    """Return the folders of the CUDA runtimes that pip has installed."""
    spec = importlib.util.find_spec("nvidia")
    packages = (spec.submodule_search_locations if spec else None) or ()
    return sorted({str(file.parent) for package in packages for file in Path(package).glob("*/lib/libcudart.so.*")})
