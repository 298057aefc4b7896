"""Two agents of `p2o` on this machine, as on two nodes: their ranks stand in node order."""

import socket
import subprocess
import sys
from pathlib import Path

AGENT = """
import sys
from torch.distributed.launcher.api import elastic_launch
from megatron_p2o.launch import agent_settings
from megatron_p2o.nodes import nodes_from_options

node_rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
settings = agent_settings(2, nodes_from_options(2, node_rank, f"127.0.0.1:{port}"), timeout_s=60)
elastic_launch(settings, sys.executable)("-c", sys.argv[4], folder, str(node_rank))
"""

RANK = """
import os, sys
from pathlib import Path
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
Path(sys.argv[1], os.environ["RANK"]).write_text(" ".join([sys.argv[2], *(os.environ[name] for name in names)]))
"""


def test_ranks_of_two_nodes_stand_in_node_order_and_meet_at_the_head(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port = str(holder.getsockname()[1])
    # The second node first: who comes first must not decide.
    agents = [
        subprocess.Popen([sys.executable, "-c", AGENT, str(node_rank), port, str(tmp_path), RANK])
        for node_rank in (1, 0)
    ]
    try:
        assert [agent.wait(timeout=120) for agent in agents] == [0, 0]
    finally:
        for agent in agents:
            agent.kill()
    told = {int(path.name): path.read_text() for path in tmp_path.iterdir()}
    assert told == {rank: f"{rank // 2} {rank} {rank % 2} 4 127.0.0.1 {port}" for rank in range(4)}
