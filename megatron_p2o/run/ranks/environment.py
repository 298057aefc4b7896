"""What the ranks that a node starts find in their environment: threads, network, where they meet, and no secrets."""

import ipaddress
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import psutil

from megatron_p2o.config.tree import Config, ParallelConfig
from megatron_p2o.evolve.reflection.reflectors import reflection_keys, secrets_of
from megatron_p2o.machine.nodes import Nodes
from megatron_p2o.metrics.sinks.registry import sink_keys, sink_secrets
from megatron_p2o.processes import (
    LOOPBACK_ONLY,
    SECRET_NAMES_VARIABLE,
    STORE_FILE_VARIABLE,
    child_environment,
)
from megatron_p2o.rewards.tasks import reward_keys, reward_secrets
from megatron_p2o.rollout.servers.remote import own_address
from megatron_p2o.rollout.servers.scratch import Scratch
from megatron_p2o.run.ranks.rank_errors import STOP_TIMEOUT_S


def conductor_secrets(config: Config) -> tuple[str, ...]:
    """Return the environment variables that may hold secrets and that rank 0 needs; the other ranks need none."""
    names = secrets_of(config.evolution.reflection) if config.evolution.searches else ()
    return (*names, *reward_secrets(config), *sink_secrets(config.logging))


@contextmanager
def withheld_secrets() -> Iterator[Mapping[str, str]]:
    """Take the secrets out of this process's environment, which agents pass on to ranks, and yield them."""
    withheld = {name: os.environ[name] for name in os.environ.keys() - child_environment().keys()}
    for name in withheld:
        del os.environ[name]
    try:
        yield withheld
    finally:
        os.environ.update(withheld)


@contextmanager
def meeting_file(nodes: Nodes) -> Iterator[None]:
    """Tell the ranks of a single machine where to meet: in a folder that only this user can enter."""
    if nodes.count > 1:
        yield
        return
    folder = Scratch()
    os.environ[STORE_FILE_VARIABLE] = str(folder.path / "store")
    try:
        yield
    finally:
        del os.environ[STORE_FILE_VARIABLE]
        folder.remove()


def prepare_environment(config: Config) -> None:
    """Set what every child inherits: one OpenMP thread unless chosen, no imports from the working folder, and which
    variables the settings say hold a key.

    Several processes with a thread per core each slow one another down by an order of magnitude.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ["PYTHONSAFEPATH"] = "1"
    named = os.environ.get(SECRET_NAMES_VARIABLE, "").split(",")
    keys = {*reflection_keys(config.evolution.reflection), *reward_keys(config), *sink_keys(config.logging)}
    os.environ[SECRET_NAMES_VARIABLE] = ",".join({*filter(None, named), *keys})
    # For the agent. torch 2.11 has neither this variable nor the setting that later versions have, and waits 30 s.
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(STOP_TIMEOUT_S)


def prepare_gpus(parallel: ParallelConfig) -> None:
    """Set CUDA_DEVICE_MAX_CONNECTIONS=1 under tensor or context parallelism, unless the user set it.

    Up to Hopper Megatron's overlap of tensor-parallel communication and computation depends on it. SGLang sets a value
    of its own for its engines.
    """
    if parallel.tensor * parallel.context > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def prepare_network(nodes: Nodes) -> None:
    """Have gloo and NCCL stay on loopback where there is one node, and gloo use the network that leads to the head
    where there are several, unless it is chosen otherwise.

    By itself gloo takes the address that the host's own name resolves to: on many machines of several nodes, a loopback
    one, and on a single machine one that others reach.
    """
    if nodes.count == 1:
        os.environ |= LOOPBACK_ONLY
        return
    interface = interface_to(nodes.head_address)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def interface_to(address: str) -> str | None:
    """Return the network interface by which this machine reaches `address`; None for loopback and where none does."""
    try:
        own = own_address(address)
    except OSError:
        return None
    if ipaddress.ip_address(own).is_loopback:
        return None
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, addresses in interfaces if own in [known.address for known in addresses]), None)
