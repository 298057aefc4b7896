"""Starts the servers of a run on this machine, each with its log."""

from pathlib import Path

import torch

from megatron_p2o.config.tree import Config
from megatron_p2o.rollout.servers.server import EngineServer
from megatron_p2o.rollout.servers.server_arguments import EnginePlace, longest_tokens, server_arguments


def start_server(config: Config, run_dir: Path, place: EnginePlace, restart: int) -> EngineServer:
    """Start an engine on this machine without waiting for it. A restarted one has a log of its own.

    Raises:
        ValueError: `sglang` holds an argument that another setting decides.
    """
    arguments = server_arguments(config, place, torch.cuda.device_count())
    log_path = engine_log(run_dir, place, restart)
    return EngineServer(place.name, arguments, log_path, longest_tokens(config))


def start_reflection_server(config: Config, run_dir: Path, num_engines_here: int) -> EngineServer:
    """Start a server of the initial policy with its tokenizer and wait for it; the caller must `stop` it.

    It speaks OpenAI's chat completions at `base_url`/v1 for the bearer of `api_key`, and its weights never change.
    `num_engines_here`: engines on this machine, whose GPUs it leaves alone while there are others.
    """
    place = EnginePlace(index=config.rollout.num_engines, node=0, slot=num_engines_here)
    arguments = server_arguments(config, place, torch.cuda.device_count())
    arguments["skip_tokenizer_init"] = False
    arguments["enable_memory_saver"] = False  # evolution goes on while the policy is trained
    server = EngineServer("reflection server", arguments, run_dir / "engines" / "reflection.log")
    server.wait_until_ready(config.rollout.startup_timeout_s)
    return server


def engine_log(run_dir: Path, place: EnginePlace, restart: int) -> Path:
    """Return where an engine's output goes."""
    suffix = f".restart-{restart}" if restart else ""
    return run_dir / "engines" / f"engine-{place.index}{suffix}.log"
