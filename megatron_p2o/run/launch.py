"""Starts the ranks of a run on this node under torch's elastic agent (what torchrun runs), and reports how it ended.

A run on several nodes starts `p2o` once on each, under `srun` or by hand; see `nodes`. The agent runs inside the `p2o`
process, so that a failed run ends in one message, that of the rank which failed first: the others fail because of it.
"""

import logging
import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, LogsDest, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megatron_p2o.config.read import dump_config, with_template_date
from megatron_p2o.config.tree import Config
from megatron_p2o.files import limit_readers, write_whole
from megatron_p2o.machine.layout import with_layout
from megatron_p2o.machine.nodes import Nodes, nodes_of_slurm
from megatron_p2o.machine.rendezvous import BACKEND
from megatron_p2o.rollout.servers.server import EngineStartFailed
from megatron_p2o.rollout.servers.server_arguments import check_arguments
from megatron_p2o.run.ranks.environment import (
    conductor_secrets,
    meeting_file,
    prepare_environment,
    prepare_gpus,
    prepare_network,
    withheld_secrets,
)
from megatron_p2o.run.ranks.rank_errors import STOP_TIMEOUT_S, failure_message, forget_errors, host_name
from megatron_p2o.run.ranks.signals import evaluation_notice, stop_file_on_sigusr1, told_at_once, training_notice
from megatron_p2o.run.resume.resumption import check_resume, finished
from megatron_p2o.run_folder.lock import hold_run
from megatron_p2o.terminal import say

SHARED_FILE_POLL_S = 0.5

REQUEUED_PATIENCE_S = 2.0 * STOP_TIMEOUT_S


def launch(config: Config, arguments: Sequence[str] = (), nodes: Nodes | None = None) -> int:
    """Save the resolved settings, run `megatron_p2o.run.train` on every rank of this node, and return the exit status.

    Without `nodes` they are those of the `srun` step, or this machine alone. SIGINT and SIGTERM end the ranks; SIGUSR1
    makes them save and end after the current step.

    Raises:
        ValueError: the ranks cannot be laid out on the nodes, SGLang does not take its settings, the nodes do not share
            the run's folder and settings, or another `p2o` works in that folder.
    """
    nodes = nodes or nodes_of_slurm(os.environ) or this_machine()
    config = with_layout(config, nodes.count)
    num_ranks = ranks_per_node(config, nodes)
    check_engines(config)
    run_dir = config.run.folder
    limit_readers(run_dir, config.run.readable_by)
    # Queued again after a lost node, a job may start while what is left of its last start is still ending.
    patience_s = REQUEUED_PATIENCE_S if os.environ.get("SLURM_RESTART_COUNT", "0") != "0" else 0.0
    with hold_run(run_dir, patience_s) if nodes.is_head else nullcontext():
        return start_ranks(config, run_dir, num_ranks, nodes, arguments)


def start_ranks(config: Config, run_dir: Path, num_ranks: int, nodes: Nodes, arguments: Sequence[str]) -> int:
    """Run the ranks of this node to their end; see `launch`."""
    trains, dated = not arguments, with_template_date(config, run_dir / "config.yaml")
    # Before the settings are written, and on every node: none waits for another that ends here.
    how = check_resume(dated, run_dir) if trains else None
    if ending := finished(dated, run_dir, how):
        say(ending)
        return 0
    if nodes.is_head:
        forget_errors(run_dir)  # before the settings, which the other nodes wait for
    resolved = share_settings(config, run_dir, nodes)
    prepare_environment(config)
    prepare_gpus(config.parallel)
    prepare_network(nodes)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    secrets = conductor_secrets(config) if nodes.is_head else ()
    command = ("-m", "megatron_p2o.run.train", str(resolved), "--parent", str(os.getpid()), *arguments)
    notice = signal_notice(run_dir, trains=trains, is_head=nodes.is_head)
    with (
        told_at_once(notice),
        stop_file_on_sigusr1(run_dir / "stop"),
        meeting_file(nodes),
        withheld_secrets() as withheld,
    ):
        given = {name: withheld[name] for name in secrets if name in withheld}
        settings = agent_settings(num_ranks, nodes, config.parallel.timeout_s, given)
        return run_agent(settings, command, run_dir, nodes, config.parallel.timeout_s)


def run_agent(settings: LaunchConfig, command: Sequence[str], run_dir: Path, nodes: Nodes, timeout_s: float) -> int:
    """Run Python with `command` on every rank of this node, tell how it failed, and return the exit status."""
    try:
        elastic_launch(settings, sys.executable)(*command)
    except ChildFailedError as error:
        say(failure_message(error.failures, run_dir, node_name(nodes)), sys.stderr)
        return 1
    except DistError as error:
        say(
            f"p2o: {node_name(nodes)} did not meet the other {nodes.count - 1} nodes at {nodes.head_address}:"
            f"{nodes.head_port} within parallel.timeout_s={timeout_s:g} s: {error}",
            sys.stderr,
        )
        return 1
    except SignalException as error:
        return 128 + error.sigval
    return 0


def signal_notice(run_dir: Path, *, trains: bool, is_head: bool) -> Callable[[int], str]:
    """Return what tells what a signal does; one node of a run tells it."""
    if not is_head:
        return lambda number: ""
    return partial(training_notice, run_dir) if trains else evaluation_notice


def check_engines(config: Config) -> None:
    """Raise `ValueError` unless the installed SGLang takes the settings of `sglang`. Ranks take minutes to start."""
    try:
        check_arguments(config)
    except EngineStartFailed as error:
        raise ValueError(str(error)) from error


def this_machine() -> Nodes:
    """Return the nodes of a run with one node. Nothing listens, because no other node connects."""
    return Nodes(count=1, rank=0, head_address="127.0.0.1", head_port=0, launch_id=uuid.uuid4().hex)


def node_name(nodes: Nodes) -> str:
    """Return how messages call this node."""
    return host_name() if nodes.count == 1 else f"{host_name()} (node {nodes.rank} of {nodes.count})"


def ranks_per_node(config: Config, nodes: Nodes) -> int:
    """Return how many ranks each node starts.

    Raises:
        ValueError: they do not divide evenly, or this node has fewer GPUs.
    """
    parallel = config.parallel
    product = (
        f"parallel.tensor={parallel.tensor} x parallel.pipeline={parallel.pipeline} x "
        f"parallel.context={parallel.context} x parallel.data={parallel.num_replicas}"
    )
    num_ranks, rest = divmod(parallel.world_size, nodes.count)
    if rest:
        raise ValueError(f"{product} = {parallel.world_size} ranks must divide evenly over {nodes.count} nodes")
    if torch.cuda.is_available() and torch.cuda.device_count() < num_ranks:
        raise ValueError(
            f"{product} puts {num_ranks} ranks on each node, but {node_name(nodes)} shows {torch.cuda.device_count()} "
            "GPUs: lower parallel.data or use more nodes"
        )
    return num_ranks


def share_settings(config: Config, run_dir: Path, nodes: Nodes) -> Path:
    """Return the file of the resolved settings: written by the head, awaited and compared by every other node.

    Raises:
        ValueError: the head's settings did not appear here within `parallel.timeout_s`.
    """
    path = run_dir / "config.yaml"

    def text() -> str:
        dated = with_template_date(config, path)  # by the head's file, on every node
        return f"# Resolved settings of start {nodes.launch_id}\n{dump_config(dated)}"

    if nodes.is_head:
        write_whole(path, text())
        return path
    deadline = time.monotonic() + config.parallel.timeout_s
    while not path.exists() or path.read_text(encoding="utf-8") != text():
        if time.monotonic() > deadline:
            raise ValueError(
                f"{node_name(nodes)} waited parallel.timeout_s={config.parallel.timeout_s:g} s for the head node to "
                f"write its own settings to {path}: run.directory must be a filesystem that all nodes share, and all "
                "nodes must be given the same settings"
            )
        time.sleep(SHARED_FILE_POLL_S)
    return path


def agent_settings(
    num_ranks: int, nodes: Nodes, timeout_s: float, conductor_secrets: Mapping[str, str] | None = None
) -> LaunchConfig:
    """Return how this node's agent starts `num_ranks` ranks: once, node by node in order.

    `conductor_secrets`: environment variables of rank 0 alone; on the head only.
    """
    return LaunchConfig(
        min_nodes=nodes.count,
        max_nodes=nodes.count,
        nproc_per_node=num_ranks,
        run_id=nodes.launch_id,
        rdzv_backend=BACKEND,
        rdzv_configs={"nodes": nodes, "timeout_s": timeout_s},
        local_addr=nodes.head_address if nodes.count == 1 else None,
        max_restarts=0,
        logs_specs=RankEnvironments(conductor_secrets or {}),
    )


class RankEnvironments(DefaultLogsSpecs):
    """Redirects nothing and gives rank 0 variables of its own: agents ask it, and nothing else, about each rank."""

    def __init__(self, conductor_secrets: Mapping[str, str]) -> None:
        super().__init__(log_dir=os.devnull)  # without it there is an empty folder in /tmp after each start
        self._conductor_secrets = conductor_secrets

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        for environment in envs.values():
            if environment["RANK"] == "0":
                environment.update(self._conductor_secrets)
        return super().reify(envs)
