"""Two agents of `p2o` on this machine, as on two nodes: their ranks stand in node order, and fail as one run."""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_p2o.config.read import dump_config
from megatron_p2o.config.tree import Config, DataConfig, ModelConfig, ParallelConfig, RolloutConfig, RunConfig, one_task
from megatron_p2o.rollout.servers.server import reserve_port

END_TIMEOUT_S = 300

AGENT = """
import sys
from pathlib import Path
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import elastic_launch
from megatron_p2o.run.launch import agent_settings
from megatron_p2o.machine.nodes import nodes_from_options
from megatron_p2o.run.ranks.rank_errors import failure_message

sys.addaudithook(lambda event, given: print("unpickled", given) if event == "pickle.find_class" else None)
node_rank, folder = int(sys.argv[1]), sys.argv[2]
for port, script in zip(sys.argv[3:5], sys.argv[5:]):
    settings = agent_settings(2, nodes_from_options(2, node_rank, f"127.0.0.1:{port}"), timeout_s=240)
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
word, deadline = Path(sys.argv[1], "error-rank-3.txt"), time.monotonic() + 240
while not word.exists() and time.monotonic() < deadline:
    time.sleep(0.05)
time.sleep(1.1)  # agents note whole seconds
sys.exit(4)
"""


def test_ranks_of_two_nodes_stand_in_node_order_and_both_nodes_name_the_one_that_fails(tmp_path: Path) -> None:
    with reserve_port() as first, reserve_port() as second:
        ports = [str(holder.getsockname()[1]) for holder in (first, second)]
        scripts = (RANK, RANK_OF_A_RUN_THAT_FAILS)
        printed = printed_by_nodes(AGENT, [str(tmp_path), *ports, *scripts])
    names = {path.name: path.read_text() for path in tmp_path.iterdir() if path.name.isdigit()}
    assert names == {f"{rank}": f"{rank // 2} {rank} {rank % 2} 4 127.0.0.1 {ports[0]}" for rank in range(4)}
    told = f"p2o: rank 3 on host1 was ended by SIGKILL; the run is in {tmp_path}\np2o: the kernel sends SIGKILL"
    assert [each[: len(told)] for each in printed] == [told, told]


def printed_by_nodes(program: str, arguments: Sequence[str]) -> list[str]:
    """Return what the agents of two nodes print; each is given its node's rank before `arguments`."""
    agents = [
        subprocess.Popen([sys.executable, "-c", program, str(rank), *arguments], stdout=subprocess.PIPE, text=True)
        for rank in (1, 0)  # who comes first must not decide
    ]
    try:
        return [agent.communicate(timeout=END_TIMEOUT_S)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()


AGENT_OF_ENGINES = """
import sys
from torch.distributed.launcher.api import elastic_launch
from megatron_p2o.run.launch import agent_settings
from megatron_p2o.machine.nodes import nodes_from_options

nodes = nodes_from_options(2, int(sys.argv[1]), f"127.0.0.1:{sys.argv[2]}")
elastic_launch(agent_settings(1, nodes, timeout_s=240), sys.executable)("-c", *sys.argv[3:])
"""

MEETS_DAEMONS = """
import sys, urllib.error
from dataclasses import replace
from pathlib import Path
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store
from megatron_p2o.config.read import load_config
from megatron_p2o.rollout.servers.remote import meet_daemons

def refusal(daemon):
    try:
        daemon.call("GET", "/servers/1")
    except urllib.error.HTTPError as error:
        return error.code

dist.init_process_group("gloo")
path = Path(sys.argv[1])
daemons = meet_daemons(load_config(path), path)
if dist.get_rank() == 0:
    (daemon,) = daemons
    store = _get_default_store()
    told = [key for key in store.list_keys() if b"daemon-" in store.get(key) or daemon.key.encode() in store.get(key)]
    values = [store.get(key).decode() for key in told]
    print(refusal(daemon), refusal(replace(daemon, key="another")), daemon.key in str(values), values)
dist.barrier()
"""


def test_the_key_of_a_node_s_daemon_reaches_rank_0_and_is_not_in_the_store(tmp_path: Path) -> None:
    config = Config(
        run=RunConfig(name="run"),
        model=ModelConfig(path="model"),
        data=DataConfig(train=one_task("unused")),
        rollout=RolloutConfig(num_engines=2, max_total_tokens=4096),
        parallel=ParallelConfig(data=2, timeout_s=240),
    )
    (tmp_path / "config.yaml").write_text(dump_config(config))
    with reserve_port() as holder:
        port = str(holder.getsockname()[1])
        printed = printed_by_nodes(AGENT_OF_ENGINES, [port, MEETS_DAEMONS, str(tmp_path / "config.yaml")])
    # With its key the daemon looks for an engine that nobody has started; without, it does not look.
    assert re.fullmatch(r"500 401 False \['daemon-1-[0-9a-f]{32}\.json'\]\n", "".join(printed)), printed
    assert [path.name for path in (tmp_path / "engines").iterdir()] == ["daemon-1.log"]
