"""Engines in this process: the weight routes of a client, with the real loader on a small model."""

import base64
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor, nn

from megatron_p2o.rollout.buckets.staging import StagingBuffer
from megatron_p2o.rollout.buckets.weight_message import MemoryAddress
from megatron_p2o.rollout.inside_sglang import weight_loader
from megatron_p2o.rollout.servers.answers import EngineRefused
from megatron_p2o.testing.engines.sglang_server import FusedModel


class InProcessClient:
    """The weight routes of an engine, with the loader in this process."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.calls: list[str] = []
        self.is_open = False
        self.version = 0

    async def pause(self) -> None:
        self.calls.append("pause")

    async def resume(self) -> None:
        self.calls.append("resume")

    async def begin_weight_update(self) -> None:
        if self.is_open:
            raise EngineRefused("a weight-update session is already open")
        self.is_open = True

    async def place(self, bucket: StagingBuffer) -> MemoryAddress:
        return bucket.address

    async def update_weights(self, payloads: Sequence[str], load_format: str | None, flush_cache: bool) -> None:
        assert self.is_open
        for payload in payloads:
            self.load(pickle.loads(base64.b64decode(payload)))

    def load(self, named_tensors: list[tuple[str, Tensor]]) -> None:
        weight_loader.load(self.model, named_tensors)

    async def end_weight_update(self) -> None:
        self.is_open = False

    async def set_weight_version(self, version: int) -> None:
        self.version = version


class InProcessFleet:
    """Engines that answer before the call returns."""

    def __init__(self, *clients: InProcessClient) -> None:
        self.clients = clients

    def call_every_engine(self, call: Callable[[str, Any], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            answers: dict[str, Any] = {}
            for index, client in enumerate(self.clients):
                try:
                    call(f"engine {index}", client).send(None)
                except StopIteration as stop:
                    answers[f"engine {index}"] = stop.value
            future.set_result(answers)
        except EngineRefused as error:
            future.set_exception(error)
        return future


def assert_holds(model: FusedModel, sent: Sequence[tuple[str, Tensor]]) -> None:
    by_name = dict(sent)
    assert torch.equal(model.qkv, torch.cat([by_name["q.weight"], by_name["k.weight"], by_name["v.weight"]]))
    assert torch.equal(model.embed, torch.cat([by_name["embed.weight"], torch.zeros(3, 3)]))
    assert torch.equal(model.norm, by_name["norm.weight"])
