"""Where agents and ranks meet: outsiders neither read nor write there, and nothing that is read there is unpickled."""

import json
import socket
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from torch.distributed import DistError, TCPStore

from megatron_p2o.machine.nodes import Nodes, nodes_from_options
from megatron_p2o.machine.rendezvous import distance, head_listener, meet_at_head

ALONE = """
import sys
from megatron_p2o.run.launch import agent_settings, this_machine
from megatron_p2o.run.ranks.environment import meeting_file, prepare_network
from torch.distributed.launcher.api import elastic_launch

sys.addaudithook(lambda event, given: print("unpickled", given) if event == "pickle.find_class" else None)
nodes = this_machine()
prepare_network(nodes)
with meeting_file(nodes):
    settings = agent_settings(2, nodes, timeout_s=60, conductor_secrets={"WANDB_API_KEY": "0123456789"})
    elastic_launch(settings, sys.executable)("-c", sys.argv[1], sys.argv[2])
"""

RANK = """
import json, os, sys
from pathlib import Path
import psutil, torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store
from megatron_p2o.config.tree import ParallelConfig
from megatron_p2o.policy.model.parallel import initialize_parallel

initialize_parallel(ParallelConfig(tensor=2, timeout_s=60, sequence=False), seed=1)
rank = torch.tensor([float(dist.get_rank())])
dist.all_reduce(rank)
first = _get_default_store().compare_set("first", "", f"rank {dist.get_rank()}").decode()
dist.barrier()

def listening(process):
    return [each.laddr.ip for each in process.net_connections("inet") if each.status == "LISTEN"]

folder = Path(os.environ["P2O_STORE_FILE"]).parent
told = {
    **{"sum": rank.item(), "first": first, "of agent": listening(psutil.Process().parent())},
    "key": psutil.Process().environ().get("WANDB_API_KEY"),
    **{"of rank": listening(psutil.Process()), "mode": folder.stat().st_mode & 0o777, "folder": str(folder)},
}
Path(sys.argv[1], os.environ["RANK"]).write_text(json.dumps(told))
"""


def test_ranks_of_a_single_machine_meet_behind_a_closed_door(tmp_path: Path) -> None:
    outcome = subprocess.run(
        [sys.executable, "-c", ALONE, RANK, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (outcome.returncode, outcome.stdout) == (0, ""), outcome.stderr
    told = [json.loads((tmp_path / name).read_text()) for name in ("0", "1")]
    assert [each["sum"] for each in told] == [1.0, 1.0]
    assert told[0]["first"] == told[1]["first"] in ("rank 0", "rank 1")
    assert [each["of agent"] for each in told] == [[], []]
    assert {address for each in told for address in each["of rank"]} <= {"127.0.0.1"}, "gloo's"
    assert [each["mode"] for each in told] == [0o700, 0o700]
    assert not Path(told[0]["folder"]).exists()
    assert [each["key"] for each in told] == ["0123456789", None], "rank 0 alone is given secrets"


def free_port() -> int:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        return holder.getsockname()[1]


def other_addresses() -> list[str]:
    """Return addresses of this machine that are not 127.0.0.1."""
    known = [each for all_known in psutil.net_if_addrs().values() for each in all_known]
    networks = [each.address for each in known if each.family == socket.AF_INET and each.address != "127.0.0.1"]
    return ["127.0.0.2", *networks]


def test_the_store_of_several_nodes_is_at_the_address_of_the_head_alone() -> None:
    port = free_port()
    first, second = (nodes_from_options(2, rank, f"127.0.0.1:{port}") for rank in (0, 1))
    stores: list[TCPStore] = []
    head = threading.Thread(target=lambda: stores.append(meet_at_head(first, timedelta(seconds=60))), daemon=True)
    head.start()
    store = meet_at_head(second, timedelta(seconds=60))
    head.join(60)
    store.set("key", "ours")
    for address in other_addresses():
        with pytest.raises(DistError):
            TCPStore(address, port, is_master=False, timeout=timedelta(seconds=0.2), wait_for_workers=False)
        with socket.socket() as foreign, pytest.raises(ConnectionRefusedError):
            foreign.connect((address, port))
    assert stores[0].get("key") == b"ours"


def test_a_head_that_cannot_listen_at_its_address_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    elsewhere = nodes_from_options(2, 0, f"203.0.113.7:{port}")  # of a network that is for documentation
    with pytest.raises(ValueError, match=rf"cannot listen at 203.0.113.7:{port}.*P2O_HEAD_ADDRESS.*P2O_NODE_ADDRESS"):
        head_listener(elsewhere)
    monkeypatch.setenv("P2O_NODE_ADDRESS", "127.0.0.1")
    with head_listener(elsewhere) as listener:
        assert listener.getsockname() == ("127.0.0.1", port)
    monkeypatch.setenv("P2O_NODE_ADDRESS", "127.0.0.3")  # of its agent, where the others know the head well
    with head_listener(nodes_from_options(2, 0, f"127.0.0.2:{port}")) as listener:
        assert listener.getsockname() == ("127.0.0.2", port)


def test_a_head_whose_name_is_a_loopback_address_listens_everywhere_and_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    named = Nodes(count=2, rank=0, head_address="localhost", head_port=free_port(), launch_id="1")
    with head_listener(named) as listener:
        assert listener.getsockname()[0] in ("0.0.0.0", "::")
    assert "listening on every address. Set P2O_HEAD_ADDRESS" in capsys.readouterr().err


def test_of_a_name_s_addresses_the_one_that_others_reach_comes_first() -> None:
    v4, v6 = socket.AF_INET, socket.AF_INET6
    known = [(v6, "::1"), (v6, "fe80::1%eth0"), (v4, "127.0.1.1"), (v4, "10.0.0.7")]
    ordered = sorted(known, key=lambda each: distance(*each))
    assert [address for _, address in ordered] == ["10.0.0.7", "fe80::1%eth0", "127.0.1.1", "::1"]
