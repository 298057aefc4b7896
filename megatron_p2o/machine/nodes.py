"""The nodes of a run, and the number of this one: from the command line, or from Slurm inside `srun`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

HEAD_VARIABLE = "P2O_HEAD_ADDRESS"
"""Environment variable with the address of the head node, where its host name is not the one to be reached at."""

FIRST_PORT, NUM_PORTS = 20000, 10000
"""The head's port is chosen from these by job: below the range that Linux gives to outgoing connections."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Nodes:
    """The nodes of a run as one of them sees them; each runs `p2o` once with the same settings."""

    count: int
    rank: int
    """This node's place, from 0; node 0, the head, has trainer rank 0 and the engines."""
    head_address: str
    head_port: int
    """Port on which the head's agent listens for the others. 0 lets it choose, on a single node only."""
    launch_id: str
    """Tells this start of the run from earlier ones."""

    @property
    def is_head(self) -> bool:
        return self.rank == 0


def nodes_from_options(num_nodes: int, node_rank: int, head: str) -> Nodes:
    """Return what `--num-nodes`, `--node-rank` and `--head HOST:PORT` say.

    Raises:
        ValueError: they contradict each other.
    """
    if not 0 <= node_rank < num_nodes:
        raise ValueError(f"--node-rank={node_rank} must lie in 0..{num_nodes - 1}: --num-nodes={num_nodes}")
    address, _, port = head.rpartition(":")
    if not (address and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError(f"--head={head} must be HOST:PORT of node 0, the same on every node")
    return Nodes(count=num_nodes, rank=node_rank, head_address=address, head_port=int(port), launch_id=head)


def nodes_of_slurm(environment: Mapping[str, str]) -> Nodes | None:
    """Return the nodes of the `srun` step this process is a task of; None outside a step or with a single node.

    Raises:
        ValueError: the step has other than one task on each node.
    """
    count = int(environment.get("SLURM_STEP_NUM_NODES", "1"))
    if count == 1:
        return None
    tasks = int(environment["SLURM_STEP_NUM_TASKS"])
    if tasks != count:
        raise ValueError(f"srun started {tasks} tasks on {count} nodes: start one on each, srun --ntasks-per-node=1")
    job = environment["SLURM_JOB_ID"]
    return Nodes(
        count=count,
        rank=int(environment["SLURM_NODEID"]),
        head_address=environment.get(HEAD_VARIABLE) or first_host(environment["SLURM_STEP_NODELIST"]),
        head_port=FIRST_PORT + int(job) % NUM_PORTS,
        launch_id=f"{job}.{environment['SLURM_STEP_ID']}-restart-{environment.get('SLURM_RESTART_COUNT', '0')}",
    )


def first_host(node_list: str) -> str:
    """Return the first host of a Slurm node list: `rack[1-2]-node[07-09,12],login` gives `rack1-node07`.

    What `scontrol show hostnames` prints first, for containers that have no `scontrol`.
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", node_list)
    if first is None:
        raise ValueError(f"SLURM_STEP_NODELIST={node_list!r} names no host")
    return re.sub(r"\[([^,\-\]]+)[^\]]*\]", r"\1", first.group())
