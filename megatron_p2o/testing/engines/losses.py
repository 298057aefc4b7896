"""What tests of lost engines wait for, on real engines."""

import asyncio
import time

from megatron_p2o.rollout.engines import SglangEngines

ENGINE_START_TIMEOUT_S = 300
HANG_TIMEOUT_S = 8
"""How soon an engine that hangs is found, where one is to hang."""


def wait_for_engines(engines: SglangEngines, count: int, num_restarts: float = 0) -> None:
    """Wait until `count` engines serve and this run has had `num_restarts`.

    An engine that ends when it has nothing to do is taken for one that serves until somebody looks.
    """
    deadline = time.monotonic() + ENGINE_START_TIMEOUT_S
    while engines._supervisor.num_restarts < num_restarts or engines.broker.num_engines < count:
        state = f"{engines.broker.num_engines} engines after {engines._supervisor.num_restarts} restarts"
        assert time.monotonic() < deadline, state
        time.sleep(0.2)


def find_hang_soon(engines: SglangEngines, name: str) -> None:
    """Lose patience with one engine, which is to hang. With the others it is so long that none is lost by mistake."""
    broker = engines.broker
    (engine,) = [each for each in broker._engines if each.name == name]

    async def watch_again() -> None:
        engine.client._answer_timeout_s = HANG_TIMEOUT_S
        assert engine.heartbeat is not None
        engine.heartbeat.cancel()
        usual_s, broker._stall_timeout_s = broker._stall_timeout_s, HANG_TIMEOUT_S
        engine.heartbeat = broker._thread.later(broker._watch(engine))
        await asyncio.sleep(0)  # it begins, and takes the limit
        broker._stall_timeout_s = usual_s

    broker._thread.finish(watch_again(), f"watch {name}")
