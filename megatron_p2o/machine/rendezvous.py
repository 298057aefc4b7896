"""Lets the nodes' agents and the ranks of a run find one another, in stores that outsiders neither read nor write.

torch's own rendezvous listens on every address of the machine, and that of its default backend unpickles what anybody
may have left there. The ranks of a single machine meet in a file that only their user can open. Those of several nodes
meet at the head's address, which the other nodes get. Nothing that is read there is unpickled.
"""

import errno
import ipaddress
import os
import socket
import sys
from datetime import timedelta

from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from megatron_p2o.machine.nodes import HEAD_VARIABLE, Nodes
from megatron_p2o.rollout.servers.remote import ADDRESS_VARIABLE
from megatron_p2o.terminal import say

BACKEND = "p2o"
"""Its name in torch's registry of rendezvous."""

LISTEN_BACKLOG = 4096
"""Ranks may all connect at once."""

EVERY_ADDRESS = ("0.0.0.0", "::")


class NodeOrder(RendezvousHandler):
    """Puts the nodes' agents in the order of the nodes, because tensor-parallel ranks must be neighbours."""

    def __init__(self, nodes: Nodes, timeout_s: float) -> None:
        self._nodes = nodes
        self._timeout = timedelta(seconds=timeout_s)
        self._store: Store | None = None

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        """Whether ranks meet in the agents' store too; a single machine's meet in a file (`STORE_FILE_VARIABLE`)."""
        return self._nodes.count > 1

    def next_rendezvous(self) -> RendezvousInfo:
        """Return this node's place and the agents' store.

        Raises:
            ValueError: the head cannot listen at its address.
            DistError: the other nodes were not met in time.
        """
        nodes = self._nodes
        if self._store is None:
            self._store = HashStore() if nodes.count == 1 else meet_at_head(nodes, self._timeout)
        store = PrefixStore(nodes.launch_id, self._store)
        meeting = RendezvousStoreInfo(nodes.head_address, nodes.head_port)
        return RendezvousInfo(store, nodes.rank, nodes.count, meeting)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._nodes.launch_id

    def shutdown(self) -> bool:
        return True


def _handler(parameters: RendezvousParameters) -> NodeOrder:
    return NodeOrder(parameters.config["nodes"], parameters.config["timeout_s"])


rendezvous_handler_registry.register(BACKEND, _handler)


def meet_at_head(nodes: Nodes, timeout: timedelta) -> TCPStore:
    """Return the store of several nodes once all agents have come; the head's agent serves it.

    Raises:
        ValueError, DistError: see `NodeOrder.next_rendezvous`.
    """
    listener = head_listener(nodes).detach() if nodes.is_head else None
    return TCPStore(nodes.head_address, nodes.head_port, nodes.count, nodes.is_head, timeout, master_listen_fd=listener)


def head_listener(nodes: Nodes) -> socket.socket:
    """Return a socket that listens at the head's address in the nodes' network and at no other.

    Raises:
        ValueError: this machine cannot listen there.
    """
    try:
        return listener_at(nodes.head_address, nodes.head_port)
    except OSError as error:
        elsewhere = os.environ.get(ADDRESS_VARIABLE)
        if elsewhere is not None and error.errno == errno.EADDRNOTAVAIL:
            return listener_at(elsewhere, nodes.head_port)
        raise ValueError(
            f"the head node cannot listen at {nodes.head_address}:{nodes.head_port} ({error}): name the head by an "
            f"address of its own ({HEAD_VARIABLE} under srun, or --head). If the others reach it only by an address "
            f"that is not its own, set {ADDRESS_VARIABLE} on the head to one that is"
        ) from error


def listener_at(host: str, port: int) -> socket.socket:
    """Return a socket that listens at one address of `host`, this machine.

    Where its name is a loopback address on the machine itself, as Debian sets it up, its network cannot be told from
    it: it listens everywhere then, and says so. Raises `OSError`.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, *_, place = min(found, key=lambda known: distance(known[0], str(known[4][0])))
    if is_loopback(str(place[0])) and not is_address(host):
        say(
            f"p2o: {host} is {place[0]} here, which other nodes do not reach: listening on every address. Set "
            f"{HEAD_VARIABLE} to this node's address in the network of the nodes",
            sys.stderr,
        )
        place = (EVERY_ADDRESS[family == socket.AF_INET6], *place[1:])
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen(LISTEN_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def distance(family: int, address: str) -> tuple[bool, bool]:
    """Return the key that puts first what other nodes reach: networks before loopback, then IPv4, which all have."""
    return is_loopback(address), family != socket.AF_INET


def is_address(text: str) -> bool:
    """Return whether `text` is an IP address, not a name."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def is_loopback(address: str) -> bool:
    """Return whether only this machine reaches an IP address."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
