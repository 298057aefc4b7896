"""Rank 0's end of a relay: the connection of one engine."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

import aiohttp
import msgspec

from megatron_p2o.rollout.servers.answers import GONE, EngineUnreachable, check_status
from megatron_p2o.rollout.servers.relay import FORGET, MAX_MESSAGE_BYTES, WRONG_KEY, Asked, Relayed


@dataclass(frozen=True, kw_only=True, slots=True)
class RelayRoute:
    """How rank 0 reaches an engine through its node's relay."""

    url: str
    headers: Mapping[str, str]


class RelayLink:
    """The connection of one engine. Lives on the broker's loop; is opened by the first request, once."""

    def __init__(self, session: aiohttp.ClientSession, route: RelayRoute) -> None:
        self._session = session
        self._route = route
        self._waiting: dict[int, asyncio.Future[Relayed]] = {}
        self._opening: asyncio.Task[aiohttp.ClientWebSocketResponse] | None = None
        self._reader: asyncio.Task[None] | None = None

    async def ask(self, asked: Asked) -> Relayed:
        """Return the engine's answer; cancelled, it has the relay forget the request.

        Raises:
            EngineUnreachable: the relay is gone, and the engine with it as far as rank 0 is concerned.
        """
        if self._opening is None:
            self._opening = asyncio.get_running_loop().create_task(self._open())
        socket = await asyncio.shield(self._opening)
        if self._reader is None or self._reader.done():
            raise self._gone("the connection was closed")
        answer = self._waiting[asked.number] = asyncio.get_running_loop().create_future()
        try:
            await self._send(socket, asked)
            return await answer
        except asyncio.CancelledError:
            if not socket.closed:
                await self._send(socket, Asked(number=asked.number, path=FORGET))
            raise
        finally:
            del self._waiting[asked.number]

    async def close(self) -> None:
        """Close the connection; requests that wait fail."""
        if self._opening is None:
            return
        self._opening.cancel()
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._opening, self._reader, return_exceptions=True)

    async def _open(self) -> aiohttp.ClientWebSocketResponse:
        try:
            socket = await self._session.ws_connect(
                self._route.url, headers=self._route.headers, max_msg_size=MAX_MESSAGE_BYTES
            )
        except aiohttp.WSServerHandshakeError as error:
            check_status(self._route.url, WRONG_KEY if error.status == WRONG_KEY else GONE, error.message.encode())
            raise
        except aiohttp.ClientError as error:
            raise self._gone(repr(error)) from error
        self._reader = asyncio.get_running_loop().create_task(self._read(socket))
        return socket

    async def _send(self, socket: aiohttp.ClientWebSocketResponse, asked: Asked) -> None:
        try:
            await socket.send_bytes(msgspec.msgpack.encode(asked))
        except ConnectionError as error:
            raise self._gone(repr(error)) from error

    async def _read(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        """Hand out answers until the connection ends, then fail those who wait."""
        try:
            async with socket:
                async for message in socket:
                    relayed = msgspec.msgpack.decode(message.data, type=Relayed)
                    answer = self._waiting.get(relayed.number)
                    if answer is not None and not answer.done():
                        answer.set_result(relayed)
        finally:
            for answer in self._waiting.values():
                if not answer.done():
                    answer.set_exception(self._gone("the connection was closed"))

    def _gone(self, why: str) -> EngineUnreachable:
        return EngineUnreachable(f"the relay of its node, {self._route.url}: {why}")
