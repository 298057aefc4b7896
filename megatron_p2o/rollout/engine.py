"""The engines of a run: starts the servers, samples through the broker, refreshes the weights."""

import json
import logging
import queue
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from megatron_p2o.config import Config
from megatron_p2o.interfaces import NamedWeights
from megatron_p2o.rollout.broker import NOBODY, Broker
from megatron_p2o.rollout.client import EngineClient
from megatron_p2o.rollout.server import EngineServer
from megatron_p2o.rollout.weight_message import LOAD_FORMAT
from megatron_p2o.rollout.weight_sync import BUCKET_BYTES, WeightSync
from megatron_p2o.types import Completion, Prompt, SamplingParams

CPU_ARGUMENTS: Mapping[str, Any] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "mem_fraction_static": 0.3,
    "disable_overlap_schedule": True,  # there is no device whose work could hide the scheduler's
    "sleep_on_idle": True,  # an idle scheduler would otherwise spin on a core that the trainer needs
}
"""Of a server on a machine without CUDA; `sglang` in the configuration wins."""

CPU_KV_TOKENS = 65536
"""KV cache on a machine without CUDA when `rollout.max_total_tokens` is not set: SGLang would take 30 % of memory."""

DECIDED_BY: Mapping[str, str] = {
    "model_path": "model.path",
    "dtype": "model.dtype",
    "tp_size": "rollout.tensor_parallel",
    "max_running_requests": "rollout.max_running_requests",
    "max_total_tokens": "rollout.max_total_tokens",
    "random_seed": "run.seed",
}
"""Server arguments that other settings decide."""

logger = logging.getLogger(__name__)


class EngineStalled(RuntimeError):
    """Requests are waiting but none has finished for longer than one may take."""


class SglangEngine:
    """The serving copies of the policy: a `RolloutEngine`. Made by `start_engines`; close it or use it in `with`."""

    def __init__(self, config: Config, run_dir: Path, servers: Sequence[EngineServer]) -> None:
        """Take ownership of `servers`, all of them ready."""
        rollout = config.rollout
        self._config = config
        self._run_dir = run_dir
        self._servers = list(servers)
        self._is_verified = False
        self.broker = Broker(slots_per_engine=rollout.max_running_requests, request_timeout_s=rollout.request_timeout_s)
        self._sync = WeightSync(
            self.broker,
            run_dir / "engines",
            tensor_parallel=rollout.tensor_parallel,
            timeout_s=rollout.refresh_timeout_s,
            bucket_bytes=BUCKET_BYTES,
        )
        stop_token_ids = end_of_sequence_ids(Path(config.model.path))
        for server in servers:
            self.broker.add_engine(
                server.name,
                lambda server=server: EngineClient(server.base_url, server.api_key, server.admin_key, stop_token_ids),
                server.log_tail,
            )

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Iterator[tuple[int, Completion]]:
        """Yield (index into `prompts`, completion) as completions finish, each index once.

        Closing the iterator early aborts what is still running.

        Raises:
            EnginesLost: no engine is left; its message holds their logs' last lines.
            RefreshFailed: the last refresh failed, so the engines' weights are not to be sampled.
            EngineStalled: nothing finished for too long.
        """
        finished: queue.SimpleQueue[tuple[int, Future[Completion]]] = queue.SimpleQueue()
        futures = [self.broker.submit(prompt, sampling) for prompt in prompts]
        for index, future in enumerate(futures):
            future.add_done_callback(lambda done, index=index: finished.put((index, done)))
        # A slot may first be taken by an evolution request, for as long as any request may take.
        patience_s = 2 * self._config.rollout.request_timeout_s + 60
        try:
            for num_done in range(len(futures)):
                try:
                    index, future = finished.get(timeout=patience_s)
                except queue.Empty:
                    raise EngineStalled(
                        f"{len(futures) - num_done} of {len(futures)} completions are missing and none came for "
                        f"{patience_s:g} s; see the logs in {self._run_dir / 'engines'}"
                    ) from None
                yield index, future.result()
        finally:
            for future in futures:
                future.cancel()

    def refresh(self, weights: NamedWeights, version: int) -> None:
        """Load `weights` into every engine, verify, and only then serve under `version`.

        Requests that are running (evolution's) are kept: they go on under the new weights, their completions list both
        versions.

        Raises:
            RefreshFailed, EnginesLost: like any other error here, `generate` raises it too until a refresh succeeds.
        """
        setting = self._config.rollout.verify_weights
        verify = setting == "always" or (setting == "first" and not self._is_verified)
        self.broker.admit(NOBODY)
        try:
            self._sync.refresh(weights, version, verify=verify)
        except Exception as error:
            self.broker.suspend(error)
            raise
        self._is_verified = self._is_verified or verify
        self.broker.serve(version)

    def start_reflection_server(self) -> tuple[str, str]:
        """Serve the frozen initial policy; see `start_reflection_server`. It ends with this engine."""
        server = start_reflection_server(self._config, self._run_dir)
        self._servers.append(server)
        return f"{server.base_url}/v1", server.api_key

    def close(self) -> None:
        """End the servers and everything they started. Idempotent."""
        self.broker.close()
        self._sync.close()
        stop_all(self._servers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def start_engines(config: Config, run_dir: Path) -> SglangEngine:
    """Start `rollout.num_engines` servers of `model.path` at version 0 and wait for all of them.

    Logs go to `run_dir`/engines.

    Raises:
        ValueError: `sglang` holds an unknown argument, or one that another setting decides.
        EngineStartFailed: a server died or took too long; the message ends with its log.
    """
    servers: list[EngineServer] = []
    try:
        for index in range(config.rollout.num_engines):
            arguments = server_arguments(config, index, torch.cuda.device_count())
            servers.append(EngineServer(f"engine {index}", arguments, run_dir / "engines" / f"engine-{index}.log"))
        for server in servers:
            server.wait_until_ready(config.rollout.startup_timeout_s)
        return SglangEngine(config, run_dir, servers)
    except BaseException:
        stop_all(servers)
        raise


def start_reflection_server(config: Config, run_dir: Path) -> EngineServer:
    """Start a server of the initial policy with its tokenizer and wait for it; the caller must `stop` it.

    It speaks OpenAI's chat completions at `base_url`/v1 for the bearer of `api_key`, and its weights never change.
    """
    arguments = server_arguments(config, config.rollout.num_engines, torch.cuda.device_count())
    arguments["skip_tokenizer_init"] = False
    server = EngineServer("reflection server", arguments, run_dir / "engines" / "reflection.log")
    server.wait_until_ready(config.rollout.startup_timeout_s)
    return server


def server_arguments(config: Config, index: int, num_gpus: int) -> dict[str, Any]:
    """Return the ServerArgs of engine `index` on a machine with `num_gpus`; 0 means that it serves on the CPU.

    Engines take the GPUs in turn, and share them when there are more ranks than GPUs.

    Raises:
        ValueError: `sglang` holds an argument that another setting decides.
    """
    given = {name.replace("-", "_"): value for name, value in config.sglang.items()}
    for name, setting in DECIDED_BY.items():
        if name in given:
            raise ValueError(f"sglang.{name} is decided by {setting}: set that instead")
    rollout = config.rollout
    machine = {"base_gpu_id": index * rollout.tensor_parallel % num_gpus} if num_gpus else CPU_ARGUMENTS
    return {
        **machine,
        "skip_tokenizer_init": True,
        "grammar_backend": "none",
        "log_level_http": "warning",
        **given,
        "model_path": config.model.path,
        "dtype": config.model.dtype,
        "tp_size": rollout.tensor_parallel,
        "max_running_requests": rollout.max_running_requests,
        "max_total_tokens": rollout.max_total_tokens or (None if num_gpus else CPU_KV_TOKENS),
        "random_seed": config.run.seed + index,
        "custom_weight_loader": [LOAD_FORMAT],
        "weight_version": "0",
    }


def end_of_sequence_ids(model_directory: Path) -> tuple[int, ...]:
    """Return the ids that end a response: those of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        path = model_directory / name
        ids = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    raise ValueError(f"model.path={model_directory} names no eos_token_id in generation_config.json or config.json")


def stop_all(servers: Sequence[EngineServer]) -> None:
    """Stop servers side by side: each may take seconds."""
    if servers:
        with ThreadPoolExecutor(len(servers)) as pool:
            list(pool.map(EngineServer.stop, servers))
