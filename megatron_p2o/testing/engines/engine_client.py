"""A broker over engines that answer when a test tells them to."""

import asyncio
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import numpy as np

from megatron_p2o.rollout.broker import Broker
from megatron_p2o.rollout.requests import EVERYONE
from megatron_p2o.rollout.servers.answers import EngineRefused, EngineUnreachable, Generation, RequestRefused
from megatron_p2o.rollout.servers.client import EngineClient
from megatron_p2o.types import PLAIN, Problem, Prompt, SamplingParams

SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=8)
WAIT_S = 120


class FakeClient:
    """An engine that answers when told to, with the prompt's ids plus one."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.permits = asyncio.Semaphore(0)
        self.served: list[int] = []
        self.aborted: list[str] = []
        self.priorities: list[int] = []
        self.num_running = self.most_running = 0
        self.is_gone = self.ignores_abort = self.is_hung = False
        self.version = 3
        self.stopping: dict[str, asyncio.Event] = {}
        self.logprobs = np.zeros(1, np.float32)
        self.most_tokens_asked_for: defaultdict[int, list[int]] = defaultdict(list)

    async def generate(self, token_ids, sampling, request_id, *, priority) -> Generation:
        self.priorities.append(priority)
        self.most_tokens_asked_for[int(token_ids[0])].append(sampling.max_new_tokens)
        if token_ids[0] < 0:
            raise RequestRefused("400 no") if token_ids[0] == -1 else EngineRefused("401 no key")
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        stop = self.stopping[request_id] = asyncio.Event()
        go = asyncio.ensure_future(self.permits.acquire())
        abort = asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait([go, abort], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.num_running -= 1
            go.cancel()
            abort.cancel()
        if self.is_gone:
            raise EngineUnreachable("connection reset")
        if stop.is_set() and self.ignores_abort:
            raise TimeoutError("no answer")
        self.served.append(int(token_ids[0]))
        reason = "abort" if stop.is_set() else "stop"
        return Generation(
            token_ids=token_ids + 1, logprobs=self.logprobs, finish_reason=reason, weight_versions=(self.version,)
        )

    async def score(self, token_ids, num_scored, request_id, *, priority) -> Generation:
        logprobs = np.zeros(num_scored, np.float32)
        return Generation(
            token_ids=token_ids[-num_scored:], logprobs=logprobs, finish_reason="stop", weight_versions=(self.version,)
        )

    async def abort(self, request_id: str) -> None:
        """Like SGLang, take the id for the beginning of ids."""
        for running_id, stop in self.stopping.items():
            if running_id.startswith(request_id):
                self.aborted.append(running_id)
                stop.set()

    async def cache_tokens(self) -> int:
        return 2**30

    async def probe(self, timeout_s: float) -> None:
        if self.is_hung:
            await asyncio.sleep(timeout_s)
            raise TimeoutError("no answer")

    async def close(self) -> None:
        pass

    def release(self, count: int = 1000) -> None:
        """Let `count` requests finish; called by the test's thread."""

        async def add() -> None:
            for _ in range(count):
                self.permits.release()

        asyncio.run_coroutine_threadsafe(add(), self.loop).result(WAIT_S)

    def die(self) -> None:
        self.is_gone = True
        self.release()


@contextmanager
def broker_with(
    num_engines: int = 1,
    slots: int = 4,
    request_timeout_s: float = WAIT_S,
    stall_timeout_s: float = WAIT_S,
    on_loss: Callable[[str], None] | None = None,
    max_slowdown: float = math.inf,
) -> Iterator[tuple[Broker, list[FakeClient]]]:
    broker = Broker(
        slots_per_engine=slots,
        request_timeout_s=request_timeout_s,
        stall_timeout_s=stall_timeout_s,
        on_loss=on_loss,
        max_slowdown=max_slowdown,
    )
    clients: list[FakeClient] = []
    try:
        for index in range(num_engines):
            add_engine(broker, index, clients)
        yield broker, clients
    finally:
        broker.close()


def add_engine(broker: Broker, index: int, clients: list[FakeClient]) -> None:
    def make_client() -> FakeClient:
        clients.append(FakeClient())
        return clients[-1]

    broker.add_engine(
        f"engine {index}", cast("Callable[[], EngineClient]", make_client), lambda: f"log of engine {index}"
    )


def prompt(*tokens: int, problem: str | None = None) -> Prompt:
    ids = np.array(tokens, dtype=np.int32)
    return Prompt(
        problem=Problem(id=problem or str(tokens[0]), question="", answer=""),
        template=PLAIN,
        sampling_ids=ids,
        training_ids=ids,
    )


def settled(broker: Broker) -> None:
    """Return when the loop has seen everything submitted so far."""
    broker.admit(EVERYONE)
