"""The engines of a run: samples through the broker, refreshes the weights, replaces servers that are lost."""

import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from megatron_p2o.config.tree import Config, RolloutConfig
from megatron_p2o.interfaces import NamedWeights
from megatron_p2o.processes import HostMemory
from megatron_p2o.rollout.broker import Broker
from megatron_p2o.rollout.refresh.outlet import WeightOutlet
from megatron_p2o.rollout.refresh.weight_sync import WeightSync
from megatron_p2o.rollout.requests import NOBODY, Priority
from megatron_p2o.rollout.servers.client import EngineClient
from megatron_p2o.rollout.servers.remote import DaemonAddress
from megatron_p2o.rollout.servers.server import Server
from megatron_p2o.rollout.servers.start import HeadRelay, start_reflection_server
from megatron_p2o.rollout.supervisor import Supervisor, stop_all
from megatron_p2o.seeds import seed_of
from megatron_p2o.types import Completion, Logprobs, Prompt, SamplingParams, TokenIds

SCORING = SamplingParams(temperature=1.0, max_new_tokens=0)
"""How a request of log-probs is sampled: not at all."""


class RolloutStalled(RuntimeError):
    """Requests are waiting but none has finished for longer than one may take."""


class SglangEngines:
    """The serving copies of the policy: a `RolloutEngines`. Made by `start_engines`; close it or use it in `with`.

    An engine that dies or hangs is replaced by one that serves the same weights under the same version; its requests
    are sent again, to the other engines at once.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        servers: Sequence[Server],
        restart: Callable[[str, int], Server],
        *,
        stop_token_ids: Sequence[int],
        releases_memory: bool,
        outlet: WeightOutlet | None = None,
        relay: HeadRelay | None = None,
        daemons: Sequence[DaemonAddress] = (),
    ) -> None:
        """Take ownership of `servers`, all of them ready, and of `relay`.

        Args:
            restart: starts a server in the place of one, given its name and how many restarts that makes in the run.
            stop_token_ids: every token that ends a response.
            releases_memory: whether `release_memory` does anything; see `does_release_memory`.
            outlet: see `open_outlet`.
            relay: of this node, if completions come through one.
            daemons: of the other nodes with engines.
        """
        rollout = config.rollout
        self._config = config
        self._run_dir = run_dir
        self._releases_memory = releases_memory
        self._stop_token_ids = stop_token_ids
        self._relay, self._daemons = relay, daemons
        self._num_refreshes = 0
        self._stats: Mapping[str, float] = {}
        self._weights_lock = threading.Lock()
        """Held while the staged weights change or are read."""
        self._reflection_servers: list[Server] = []
        self.broker = Broker(
            slots_per_engine=rollout.max_running_requests,
            request_timeout_s=rollout.request_timeout_s,
            stall_timeout_s=rollout.stall_timeout_s,
            on_loss=lambda name: self._supervisor.replace(name),
            max_slowdown=config.evolution.max_slowdown,
        )
        self._sync = WeightSync(
            self.broker,
            run_dir / "engines",
            tensor_parallel=rollout.tensor_parallel,
            answer_timeout_s=rollout.stall_timeout_s,
            bucket_bytes=rollout.refresh_bucket_mib << 20,
            outlet=outlet,
        )
        self._supervisor = Supervisor(
            servers,
            start=restart,
            join=self._join,
            lose=self.broker.lose_engine,
            give_up=self.broker.suspend,
            max_restarts=rollout.max_restarts,
            startup_timeout_s=rollout.startup_timeout_s,
        )
        for server in servers:
            self._join(server)

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, places: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (index into `prompts`, completion) as completions finish, each index once; see `RolloutEngines`.

        Closing the iterator early aborts what is still running.

        Raises:
            EnginesLost: no engine is left and none can be started; its message holds their logs' last lines.
            RefreshFailed: the last refresh failed, so the engines' weights are not to be sampled.
            RolloutStalled: nothing finished for too long.
        """
        yield from self._finished(
            [
                self.broker.submit(prompt, own)
                for prompt, own in zip(prompts, own_sampling(prompts, sampling, places), strict=True)
            ]
        )

    def score(self, prompts: Sequence[Prompt], responses: Sequence[TokenIds]) -> list[Logprobs | None]:
        """Return log pi(response | prompt.sampling_ids) of each pair at temperature 1; see `RolloutEngines`.

        Requests are training's, like those of `generate`, and raise what it raises.
        """
        futures = [self.submit_score(prompt, ids) for prompt, ids in zip(prompts, responses, strict=True)]
        scores: dict[int, Logprobs | None] = {}
        for index, completion in self._finished(futures):
            scores[index] = None if completion.is_aborted else completion.logprobs
        return [scores[index] for index in range(len(futures))]

    def submit_score(self, prompt: Prompt, response: TokenIds, priority: Priority = "training") -> "Future[Completion]":
        """Return a future of `response` with its log-probs under `prompt.sampling_ids` at temperature 1, [R].

        A request that was refused or took too long completes as aborted; see `Broker.submit`.
        """
        whole = replace(prompt, sampling_ids=np.concatenate([prompt.sampling_ids, response]).astype(np.int32))
        return self.broker.submit(whole, SCORING, priority, num_scored=len(response))

    def _finished(self, futures: Sequence["Future[Completion]"]) -> Iterator[tuple[int, Completion]]:
        """Yield (index, completion) as the futures are done; see `generate`."""
        finished: queue.SimpleQueue[tuple[int, Future[Completion]]] = queue.SimpleQueue()
        for index, future in enumerate(futures):
            future.add_done_callback(lambda done, index=index: finished.put((index, done)))
        patience_s = longest_silence_s(self._config.rollout)
        try:
            for num_done in range(len(futures)):
                try:
                    index, future = finished.get(timeout=patience_s)
                except queue.Empty:
                    raise RolloutStalled(
                        f"{len(futures) - num_done} of {len(futures)} completions are missing and none came for "
                        f"{patience_s:g} s; see the logs in {self._run_dir / 'engines'}"
                    ) from None
                yield index, future.result()
        finally:
            for future in futures:
                future.cancel()

    def release_memory(self) -> None:
        """Lend the memory of weights and KV cache to the trainer, if `rollout.release_memory` says so.

        Until the next refresh nothing is sampled and no server is started. An engine that is lost meanwhile is replaced
        when the memory is back. Waits for an engine that is being started.

        Raises:
            RefreshFailed, EnginesLost, TimeoutError: `generate` raises it too until a refresh succeeds.
        """
        if not self._releases_memory:
            return
        try:
            self._supervisor.hold(longest_restarts_s(self._config.rollout))
            self.broker.admit(NOBODY)
            with self._weights_lock:
                self._sync.lend()
        except Exception as error:  # whatever it is, the engines may have lent their memory: no one may sample
            self.broker.suspend(error)
            raise

    def refresh(self, weights: NamedWeights, version: int) -> None:
        """Load `weights` into every engine, verify, and only then serve under `version`.

        Engines get their memory back if it was lent. Requests that are running (evolution's) are kept: they go on under
        the new weights, their completions list both versions.

        Raises:
            RefreshFailed, EnginesLost: like any other error here, `generate` raises it too until a refresh succeeds.
        """
        every = self._config.rollout.verify_every
        verify = every > 0 and self._num_refreshes % every == 0
        self._supervisor.renew()
        with self._weights_lock:
            try:
                self.broker.admit(NOBODY)
                self._stats = self._sync.refresh(weights, version, verify=verify).metrics()
            except Exception as error:  # whatever it is, the engines' weights are not to be sampled
                self.broker.suspend(error)
                raise
            finally:
                self._supervisor.let_go()
            self.broker.serve(version)
        self._num_refreshes += 1

    def metrics(self) -> Mapping[str, float]:
        """Return, by metric key, the cost of the last refresh and how often engines were restarted in this run.

        Beside them what completions were given up since the last call, of which this warns, and what evolution sampled.
        """
        restarts = {"engine/restarts_count": float(self._supervisor.num_restarts)}
        evolution = self.broker.meter.take() if self._config.evolution.searches else {}
        return {**self._stats, **restarts, **self.broker.given_up.take(), **evolution}

    @property
    def busy_s(self) -> float:
        """Seconds in which an engine had requests, summed over engines; the reflection server is left out."""
        return self.broker.busy_s

    def host_memory(self) -> list[HostMemory]:
        """Return what each engine holds, and the reflection server if there is one."""
        return [server.host_memory() for server in (*self._supervisor.servers, *self._reflection_servers)]

    def relay_memory(self) -> list[HostMemory]:
        """Return what the relay of each node holds: of another node its daemon, with the weights for its engines."""
        here = [] if self._relay is None else [self._relay.host_memory()]
        return [*here, *(daemon.host_memory() for daemon in self._daemons)]

    def start_reflection_server(self) -> tuple[str, str]:
        """Serve the frozen initial policy; see `start_reflection_server`. It ends with this engine."""
        num_engines_here = sum(server.mirror is None for server in self._supervisor.servers)
        server = start_reflection_server(self._config, self._run_dir, num_engines_here)
        self._reflection_servers.append(server)
        return f"{server.base_url}/v1", server.api_key

    def close(self) -> None:
        """End the servers and everything they started. Idempotent."""
        self._supervisor.close()
        self.broker.close()
        self.broker.given_up.take()  # warns of those after the last step
        self._sync.close()
        stop_all(self._reflection_servers)
        if self._relay is not None:
            self._relay.close()

    def _join(self, server: Server) -> None:
        """Let a server that is ready take requests, once it holds what the others serve."""
        with self._weights_lock:
            prepare = None
            # Without a version the engines serve the model they were started with, or nothing before the next refresh.
            if self._sync.version is not None:
                prepare = partial(self._sync.restore, verify=self._config.rollout.verify_every > 0)
            self.broker.add_engine(server.name, lambda: self._client_of(server), server.log_tail, prepare)

    def _client_of(self, server: Server) -> EngineClient:
        return EngineClient(
            server.base_url,
            server.api_key,
            server.admin_key,
            self._stop_token_ids,
            self._config.rollout.stall_timeout_s,
            server.mirror,
            server.relay,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def longest_silence_s(rollout: RolloutConfig) -> float:
    """Return how long no completion may come while the engines are being looked after."""
    # A slot may first be taken by an evolution request, for as long as any request may take.
    return 2 * rollout.request_timeout_s + longest_restarts_s(rollout) + 60


def longest_restarts_s(rollout: RolloutConfig) -> float:
    """Return how long the restarts of an engine between two refreshes may take."""
    return rollout.max_restarts * (rollout.startup_timeout_s + rollout.stall_timeout_s)


def own_sampling(
    prompts: Sequence[Prompt], sampling: SamplingParams, places: Sequence[int] | None = None
) -> Iterator[SamplingParams]:
    """Yield how each prompt is sampled: seeded by its problem and its place among that problem's prompts."""
    for prompt, place in zip(prompts, counted_places(prompts) if places is None else places, strict=True):
        seed = None if sampling.seed is None else seed_of(sampling.seed, prompt.problem.id, place)
        yield replace(sampling, seed=seed)


def counted_places(prompts: Sequence[Prompt]) -> Iterator[int]:
    """Yield how many prompts of the same problem come before each."""
    num_seen: Counter[str] = Counter()
    for prompt in prompts:
        yield num_seen[prompt.problem.id]
        num_seen[prompt.problem.id] += 1
