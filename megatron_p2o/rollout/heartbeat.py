"""Notices an engine that hangs: its process lives, but no token comes out of it."""

import asyncio
from collections.abc import Callable
from typing import Protocol

from megatron_p2o.rollout.servers.answers import EngineRefused


class EngineStalled(RuntimeError):
    """An engine made no progress for `rollout.stall_timeout_s`, or did not answer a call for as long."""


class Probed(Protocol):
    """The part of `EngineClient` a heartbeat needs."""

    async def probe(self, timeout_s: float) -> None:
        """Return once the engine has sampled something after this call.

        Raises:
            TimeoutError, EngineRefused: it has not.
            EngineUnreachable: it is gone.
        """
        ...


async def watch(client: Probed, stall_timeout_s: float, busy_since: Callable[[], int | None]) -> None:
    """Return never while the engine makes progress.

    Progress is a sampled token of any request, so that requests that queue behind others in the engine do not
    look like a hang. An engine that has nothing to do is left alone: on a GPU its memory may be lent to the trainer.

    Args:
        stall_timeout_s: longest time from a hang to the error: half of it passes between probes, half in one.
        busy_since: a number that stays the same as long as the engine should be sampling without a break, None while
            it should not.

    Raises:
        EngineStalled: no progress during one probe.
        EngineUnreachable
    """
    half_s = stall_timeout_s / 2
    while True:
        await asyncio.sleep(half_s)
        before = busy_since()
        if before is None:
            continue
        try:
            await client.probe(half_s)
        except (TimeoutError, EngineRefused) as error:
            if busy_since() == before:
                raise EngineStalled(
                    f"no token within half of rollout.stall_timeout_s={stall_timeout_s:g} ({error})"
                ) from error
