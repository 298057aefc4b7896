"""Starts the ranks of a run under torchrun and passes signals on, so that none of them outlives the command."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from megatron_p2o.config import Config
from megatron_p2o.config_file import dump_config
from megatron_p2o.run_state import write_whole

STOP_TIMEOUT_S = 60.0
"""How long the ranks may take to end after SIGTERM before they are killed."""

PR_SET_PDEATHSIG = 1


def run_directory(config: Config) -> Path:
    """Return the folder of the run; it need not exist yet."""
    return Path(config.run.directory) / config.run.name


def launch(config: Config, arguments: Sequence[str] = ()) -> int:
    """Save the resolved settings, run `megatron_p2o.train` on every rank of this machine, and return its exit status.

    SIGINT and SIGTERM end the ranks; SIGUSR1 makes them save and end after the current step.
    """
    run_dir = run_directory(config)
    resolved = run_dir / "config.yaml"
    write_whole(resolved, dump_config(config))
    ranks = subprocess.Popen(
        torchrun_command(config.parallel.world_size, [str(resolved), *arguments]),
        env=rank_environment(os.environ),
        start_new_session=True,
        preexec_fn=end_with_parent,
    )
    forward_signals(ranks, stop_file=run_dir / "stop")
    try:
        return ranks.wait()
    finally:
        end_process_group(ranks)


def torchrun_command(num_ranks: int, arguments: Sequence[str]) -> list[str]:
    """Return the command that starts `num_ranks` ranks on this machine, at a port that torchrun finds free."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    return [*torchrun, "--max-restarts=0", "-m", "megatron_p2o.train", *arguments]


def rank_environment(environment: os._Environ[str] | dict[str, str]) -> dict[str, str]:
    """Return the environment of a rank: one OpenMP thread unless chosen, and nothing imported from the working folder.

    Several processes with a thread per core each slow one another down by an order of magnitude.
    """
    return {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **environment, "PYTHONSAFEPATH": "1"}


def end_with_parent() -> None:
    """Ask the kernel to end this process when its parent dies, however it dies. Call between fork and exec."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def forward_signals(ranks: subprocess.Popen[bytes], stop_file: Path) -> None:
    """Pass SIGINT and SIGTERM on to the ranks, the second time by force; turn SIGUSR1 into the stop file.

    The stop file, because torchrun itself would die of SIGUSR1 and take the ranks with it.
    """
    asked: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        signal_group(ranks, signal.SIGTERM if len(asked) == 1 else signal.SIGKILL)

    def stop_after_step(number: int, frame: FrameType | None) -> None:
        stop_file.touch()

    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGUSR1, stop_after_step)


def signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    """Signal every process of the session that `process` leads; nothing happens when all have ended."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


def end_process_group(process: subprocess.Popen[bytes]) -> None:
    """End what is left of the session that `process` leads: politely, then after `STOP_TIMEOUT_S` by force."""
    signal_group(process, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    signal_group(process, signal.SIGKILL)
