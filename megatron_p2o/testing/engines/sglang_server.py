"""A stand-in for an SGLang server that keeps its rules about pauses, updates and memory, and samples from no model.

It speaks HTTP to the real client and loads weights with the real loader. Where SGLang 0.5.21 fails an assertion, which
ends the server, this one cuts all connections and is dead.
"""

import asyncio
import base64
import pickle
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from aiohttp import web
from torch import Tensor, nn

from megatron_p2o.rollout.inside_sglang import weight_loader

START_TIMEOUT_S = 120.0
POLL_S = 0.01


class FusedModel(nn.Module):
    """An engine's model as SGLang builds it: q, k, v in one parameter, the embedding padded with zero rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.full((8, 3), 9.0))
        self.qkv = nn.Parameter(torch.zeros(7, 3, dtype=torch.bfloat16))
        self.norm = nn.Parameter(torch.zeros(3))
        self.num_loads = 0

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.num_loads += 1
        rows = {"q.weight": (0, 3), "k.weight": (3, 2), "v.weight": (5, 2)}
        for name, weight in weights:
            if name in rows:
                self.qkv.data.narrow(0, *rows[name]).copy_(weight)
            elif name == "embed.weight":
                self.embed.data[:5].copy_(weight)
                self.embed.data[5:].fill_(0)
            elif name == "norm.weight":
                self.norm.data.copy_(weight)


def fused_model_weights(seed: int = 0) -> list[tuple[str, Tensor]]:
    """Return random weights of `FusedModel` under their trainer's names."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (5, 3), "q.weight": (3, 3), "k.weight": (2, 3), "v.weight": (2, 3), "norm.weight": (3,)}
    return [
        (name, torch.randn(shape, generator=generator).to(torch.bfloat16 if name[0] in "qkv" else torch.float32))
        for name, shape in shapes.items()
    ]


class FakeSglangServer:
    """Implements `server.Server` in a thread of this process."""

    api_key, admin_key, mirror, relay = "user", "admin", None, None
    log_path = Path("log")

    def __init__(self, name: str, journal: list[str]) -> None:
        """Args:
        journal: gets "<name> <what>" of every call but generations.
        """
        self.name = name
        self.journal = journal
        self.model = FusedModel()
        self.version = "0"
        self.released: set[str] = set()
        self.refused: set[str] = set()
        """Routes that answer with an error."""
        self.fatal: set[str] = set()
        """Routes at which the server dies."""
        self.num_waiting = 0
        """Generations that are not answered yet."""
        self.answers = threading.Event()
        """Generations are finished while it is set."""
        self.answers.set()
        self._is_open = self._is_dead = False
        self._running = asyncio.Event()
        self._running.set()
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        threading.Thread(target=self._serve, args=(started,), daemon=True).start()
        assert started.wait(START_TIMEOUT_S)

    def is_alive(self) -> bool:
        return not self._is_dead

    def wait_until_ready(self, timeout_s: float) -> None:
        self.journal.append(f"{self.name} start")

    def log_tail(self) -> str:
        return f"log of {self.name}"

    def stop(self) -> None:
        """Die without a word. Idempotent."""
        if not self._is_dead:
            self._is_dead = True
            self._loop.call_soon_threadsafe(self._loop.stop)

    def _serve(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application()
        app.router.add_route("*", "/{path}", self._answer)
        runner = web.AppRunner(app)
        self._loop.run_until_complete(runner.setup())
        self._loop.run_until_complete(web.TCPSite(runner, "127.0.0.1", 0).start())
        self.base_url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        started.set()
        self._loop.run_forever()
        assert runner.server is not None
        for connection in list(runner.server.connections):
            if connection.transport is not None:
                connection.transport.abort()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    async def _answer(self, request: web.Request) -> web.Response:
        path = request.match_info["path"]
        if path in self.refused:
            return web.json_response({"error": f"{path} is refused"}, status=400)
        try:
            assert path not in self.fatal
            answer = await getattr(self, f"_{path}")(await request.json() if request.can_read_body else {})
        except (AssertionError, KeyError) as error:
            self.journal.append(f"{self.name} dies in {path} {error}")
            self.stop()
            await asyncio.sleep(START_TIMEOUT_S)  # never answered: the connection is cut before
            raise
        return web.json_response(answer)

    def _note(self, what: str) -> None:
        self.journal.append(f"{self.name} {what}")

    async def _generate(self, body: dict[str, Any]) -> dict[str, Any]:
        self.num_waiting += 1
        while not (self.answers.is_set() and self._running.is_set()):
            await asyncio.sleep(POLL_S)
        self.num_waiting -= 1
        assert not self.released, "sampled without memory"
        meta = {"output_token_logprobs": [[-0.5, 7, None]], "finish_reason": {"type": "length"}}
        return {"meta_info": {**meta, "weight_version": self.version}}

    async def _server_info(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"max_total_num_tokens": 2**30}

    async def _health_generate(self, body: dict[str, Any]) -> None:
        await self._running.wait()

    async def _abort_request(self, body: dict[str, Any]) -> None:
        self._note("abort")

    async def _pause_generation(self, body: dict[str, Any]) -> None:
        self._note("pause")
        self._running.clear()

    async def _continue_generation(self, body: dict[str, Any]) -> None:
        self._note("continue")
        self._running.set()

    async def _release_memory_occupation(self, body: dict[str, Any]) -> None:
        assert not self._running.is_set(), "release_memory_occupation should be called only when server is idle"
        self._note(f"release {' '.join(body['tags'])}")
        self.released.update(body["tags"])
        for parameter in self.model.parameters():
            parameter.data.fill_(torch.nan)

    async def _resume_memory_occupation(self, body: dict[str, Any]) -> None:
        self._note(f"resume {' '.join(body['tags'])}")
        for tag in body["tags"]:
            self.released.remove(tag)

    async def _begin_weight_update(self, body: dict[str, Any]) -> dict[str, Any]:
        if self._is_open:
            return {"success": False, "message": "a weight-update session is already open"}
        self._note("begin")
        self._is_open = True
        return {"success": True}

    async def _update_weights_from_tensor(self, body: dict[str, Any]) -> dict[str, Any]:
        assert "weights" not in self.released, "loaded without memory"
        self._note("check" if body["flush_cache"] else "load")
        for payload in body["serialized_named_tensors"]:
            weight_loader.load(self.model, pickle.loads(base64.b64decode(payload)))
        return {"success": self._is_open, "message": "no weight-update session is open"}

    async def _end_weight_update(self, body: dict[str, Any]) -> dict[str, Any]:
        assert "weights" not in self.released, "finished weights without memory"
        self._note("end")
        self._is_open = False
        return {"success": True}

    async def _update_weight_version(self, body: dict[str, Any]) -> dict[str, Any]:
        self.version = body["new_version"]
        self._note(f"version {self.version}")
        return {"success": True}
