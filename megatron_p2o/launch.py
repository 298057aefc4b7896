"""Starts the ranks of a run on this machine under torch's elastic agent (what torchrun runs), and reports how it ended.

The agent runs inside the `p2o` process, so that a failed run ends in the failing rank's one message rather than in the
agent's traceback.
"""

import ctypes
import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megatron_p2o.config import Config
from megatron_p2o.config_file import dump_config
from megatron_p2o.run_state import write_whole

STOP_TIMEOUT_S = 60
"""How long the ranks may take to end their engines after SIGTERM before they are killed."""

PR_SET_PDEATHSIG = 1


def run_directory(config: Config) -> Path:
    """Return the folder of the run; it need not exist yet."""
    return Path(config.run.directory) / config.run.name


def launch(config: Config, arguments: Sequence[str] = ()) -> int:
    """Save the resolved settings, run `megatron_p2o.train` on every rank of this machine, and return the exit status.

    SIGINT and SIGTERM end the ranks; SIGUSR1 makes them save and end after the current step.
    """
    run_dir = run_directory(config)
    resolved = run_dir / "config.yaml"
    write_whole(resolved, dump_config(config))
    prepare_environment()
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    ranks = elastic_launch(agent_settings(config.parallel.world_size), sys.executable)
    try:
        with stop_file_on_sigusr1(run_dir / "stop"):
            ranks("-m", "megatron_p2o.train", str(resolved), *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"p2o: rank {rank} ended with status {failure.exitcode}; the run is in {run_dir}", file=sys.stderr)
        return 1
    except SignalException as error:
        return 128 + error.sigval
    return 0


def agent_settings(num_ranks: int) -> LaunchConfig:
    """Return how the agent starts `num_ranks` ranks: once, at a port of this machine that it finds free."""
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        shutdown_timeout=STOP_TIMEOUT_S,
    )


def prepare_environment() -> None:
    """Set what every rank inherits: one OpenMP thread unless chosen, and no imports from the working folder.

    Several processes with a thread per core each slow one another down by an order of magnitude.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ["PYTHONSAFEPATH"] = "1"


def end_with_parent() -> None:
    """Have the kernel kill this process when the one that started it dies, however it dies.

    Engines, graders and evolution watch this process in turn, so nothing of a run is left.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def stop_file_on_sigusr1(stop_file: Path) -> Iterator[None]:
    """Turn SIGUSR1 into the run's stop file, which the ranks look at between steps; the agent would die of it."""

    def stop_after_step(number: int, frame: FrameType | None) -> None:
        stop_file.touch()

    previous = signal.signal(signal.SIGUSR1, stop_after_step)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, previous)
