"""Starts the engines of a run, here and on its other nodes."""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch

from megatron_p2o.config.tree import Config, RolloutConfig
from megatron_p2o.processes import allow_many_files
from megatron_p2o.rollout.engines import SglangEngines
from megatron_p2o.rollout.refresh.outlet import WeightOutlet
from megatron_p2o.rollout.servers.remote import DaemonAddress, NodeMirror, RemoteServer
from megatron_p2o.rollout.servers.server import EngineServer, Server
from megatron_p2o.rollout.servers.server_arguments import does_release_memory, engine_places
from megatron_p2o.rollout.servers.start import HeadRelay, engine_log, start_server, wait_until_all_answer
from megatron_p2o.rollout.supervisor import stop_all

logger = logging.getLogger(__name__)

SPARE_FILES = 256
"""Open files of a relay that are not connections to engines."""


def start_engines(
    config: Config,
    run_dir: Path,
    stop_token_ids: Sequence[int],
    daemons: Sequence[DaemonAddress] = (),
    outlet: WeightOutlet | None = None,
    *,
    started: Mapping[str, EngineServer] | None = None,
    releases_memory: bool | None = None,
) -> SglangEngines:
    """Start `rollout.num_engines` servers of `model.path` at version 0 and wait for all of them.

    Args:
        run_dir: gets their logs, in engines/.
        stop_token_ids: every token that ends a response.
        daemons: of the other nodes that get engines, in order.
        outlet: see `open_outlet`.
        started: what `start_servers` has started.
        releases_memory: whether to lend the engines' memory; None as `rollout.release_memory` says.

    Raises:
        ValueError: `sglang` holds an unknown argument, or one that another setting decides.
        EngineStartFailed: a server died or took too long; the message ends with its log.
    """
    places = {place.name: place for place in engine_places(config.rollout.num_engines, 1 + len(daemons))}
    mirrors = [NodeMirror(address, config.rollout.stall_timeout_s) for address in daemons]

    def start(name: str, restart: int) -> Server:
        place = places[name]
        if place.node == 0:
            server = waiting.pop(name, None) or start_server(config, run_dir, place, restart)
            server.begin()
            reader = relay.current()
            server.serve_through(reader.route_to(server.base_url, server.api_key), reader.is_alive)
            return server
        log_path = engine_log(run_dir, place, restart)
        return RemoteServer(daemons[place.node - 1], place, restart, log_path, mirrors[place.node - 1])

    allow_connections(config.rollout)
    waiting = dict(started or {})
    servers: list[Server] = []
    with ExitStack() as unless_all_start:
        relay = HeadRelay(run_dir / "engines")
        unless_all_start.callback(relay.close)
        waits = unless_all_start.enter_context(ThreadPoolExecutor(len(places), thread_name_prefix="engine-start"))
        unless_all_start.callback(stop_all, servers)  # which ends the waits
        for name in places:
            servers.append(start(name, 0))
        wait_until_all_answer("engines", servers, config.rollout.startup_timeout_s, waits)
        lends = does_release_memory(config, torch.cuda.device_count()) if releases_memory is None else releases_memory
        engines = SglangEngines(
            *(config, run_dir, servers, start),
            stop_token_ids=stop_token_ids,
            releases_memory=lends,
            outlet=outlet,
            relay=relay,
            daemons=daemons,
        )
        unless_all_start.pop_all()
        return engines


def allow_connections(rollout: RolloutConfig) -> None:
    """Allow relays, which inherit the limit, a connection for every request that may run, or warn that it cannot be."""
    num_files, num_requests = allow_many_files(), rollout.num_engines * rollout.max_running_requests
    if num_files < num_requests + SPARE_FILES:
        logger.warning(
            "this machine lets a process open %d files, rollout.num_engines x rollout.max_running_requests keep %d "
            "requests open: raise the hard limit (ulimit -Hn) or lower rollout.max_running_requests",
            num_files,
            num_requests,
        )
