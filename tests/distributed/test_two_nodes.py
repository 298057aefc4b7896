"""Two agents of `p2o` on this machine, as on two nodes: their ranks stand in node order, and fail as one run."""

import socket
import subprocess
import sys
from pathlib import Path

AGENT = """
import sys
from pathlib import Path
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import elastic_launch
from megatron_p2o.launch import agent_settings
from megatron_p2o.nodes import nodes_from_options
from megatron_p2o.rank_errors import failure_message

sys.addaudithook(lambda event, given: print("unpickled", given) if event == "pickle.find_class" else None)
node_rank, folder = int(sys.argv[1]), sys.argv[2]
for port, script in zip(sys.argv[3:5], sys.argv[5:]):
    settings = agent_settings(2, nodes_from_options(2, node_rank, f"127.0.0.1:{port}"), timeout_s=60)
    try:
        elastic_launch(settings, sys.executable)("-c", script, folder, str(node_rank))
    except ChildFailedError as error:
        print(failure_message(error.failures, Path(folder), f"host{node_rank}"))
"""

RANK = """
import os, sys
from pathlib import Path
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
Path(sys.argv[1], os.environ["RANK"]).write_text(" ".join([sys.argv[2], *(os.environ[name] for name in names)]))
"""


RANK_OF_A_RUN_THAT_FAILS = """
import os, signal, sys, time
from pathlib import Path
if os.environ["RANK"] == "3":
    os.kill(os.getpid(), signal.SIGKILL)
word, deadline = Path(sys.argv[1], "error-rank-3.txt"), time.monotonic() + 60
while not word.exists() and time.monotonic() < deadline:
    time.sleep(0.05)
time.sleep(1.1)  # agents note whole seconds
sys.exit(4)
"""


def test_ranks_of_two_nodes_stand_in_node_order_and_both_nodes_name_the_one_that_fails(tmp_path: Path) -> None:
    with socket.socket() as first, socket.socket() as second:
        for holder in (first, second):
            holder.bind(("127.0.0.1", 0))
        ports = [str(holder.getsockname()[1]) for holder in (first, second)]
    # The second node first: who comes first must not decide.
    agents = [
        subprocess.Popen(
            [sys.executable, "-c", AGENT, str(node_rank), str(tmp_path), *ports, RANK, RANK_OF_A_RUN_THAT_FAILS],
            stdout=subprocess.PIPE,
            text=True,
        )
        for node_rank in (1, 0)
    ]
    try:
        printed = [agent.communicate(timeout=120)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    names = {path.name: path.read_text() for path in tmp_path.iterdir() if path.name.isdigit()}
    assert names == {f"{rank}": f"{rank // 2} {rank} {rank % 2} 4 127.0.0.1 {ports[0]}" for rank in range(4)}
    told = f"p2o: rank 3 on host1 was ended by SIGKILL; the run is in {tmp_path}\np2o: the kernel sends SIGKILL"
    assert [each[: len(told)] for each in printed] == [told, told]
