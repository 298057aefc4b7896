"""Batched attention of CPU engines: right by a loop over tokens in float64, the same to the last bit in any company."""

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

NUM_SLOTS, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 4096, 4, 2, 32
PACKAGE = "sglang.srt.layers.attention"
MODULE = "megatron_p2o.rollout.inside_sglang.cpu_attention"


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Yield the module, with empty stand-ins for what it imports of SGLang, whose own import takes seconds."""
    parts = PACKAGE.split(".")
    names = [".".join(parts[: count + 1]) for count in range(len(parts))]
    for name in (*names, f"{PACKAGE}.attention_registry", f"{PACKAGE}.torch_native_backend"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    registry, backend = sys.modules[f"{PACKAGE}.attention_registry"], sys.modules[f"{PACKAGE}.torch_native_backend"]
    monkeypatch.setattr(registry, "register_attention_backend", None, raising=False)
    monkeypatch.setattr(backend, "TorchNativeAttnBackend", object, raising=False)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield importlib.import_module(MODULE)
    sys.modules.pop(MODULE, None)


class Batch:
    """Sequences whose keys lie anywhere in the cache, each with some new tokens."""

    def __init__(self, num_new: list[int], num_cached: list[int], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.num_new = torch.tensor(num_new)
        self.lengths = self.num_new + torch.tensor(num_cached)
        self.table = torch.stack([torch.randperm(NUM_SLOTS, generator=generator)[:256] for _ in num_new]).int()
        self.requests = torch.randperm(len(num_new), generator=generator)
        self.query = torch.randn(sum(num_new), NUM_HEADS, HEAD_SIZE, generator=generator)
        self.keys, self.values = torch.randn(2, NUM_SLOTS, NUM_KV_HEADS, HEAD_SIZE, generator=generator)

    def attended(self, attention: Any, chosen: list[int] | None = None) -> Tensor:
        """Return the output of the new tokens of the chosen sequences, sent as one batch."""
        chosen = list(range(len(self.num_new))) if chosen is None else chosen
        rows = torch.cat([torch.arange(len(self.query)).split(self.num_new.tolist())[number] for number in chosen])
        query = self.query[rows]
        given = (self.table, self.requests[chosen], self.lengths[chosen], self.num_new[chosen])
        blocks = list(attention.extend_blocks(*given))
        unset = torch.full_like(query, torch.nan)
        return attention.attend(blocks, query, unset, self.keys, self.values, None)

    def by_hand(self) -> Tensor:
        outputs: list[Tensor] = []
        for number, queries in enumerate(self.query.double().split(self.num_new.tolist())):
            for place, query in enumerate(queries):
                seen = int(self.lengths[number] - self.num_new[number]) + place + 1
                slots = self.table[self.requests[number], :seen].long()
                keys, values = (
                    cache[slots].double().repeat_interleave(NUM_HEADS // NUM_KV_HEADS, dim=1)
                    for cache in (self.keys, self.values)
                )
                weights = (torch.einsum("hd,khd->hk", query, keys) / HEAD_SIZE**0.5).softmax(-1)
                outputs.append(torch.einsum("hk,khd->hd", weights, values))
        return torch.stack(outputs)


MIXED = Batch([1, 3, 70, 4, 5, 1, 64], [0, 62, 10, 60, 59, 200, 64])
"""Sequences below and above `MAX_FEW_TOKENS`, with keys below, at and above multiples of `KEY_STEP`."""


def test_every_new_token_attends_to_the_keys_up_to_its_own(attention: Any) -> None:
    assert attention.MAX_FEW_TOKENS == 4, "sequences on both sides of it"
    # Float32 sums of up to 201 products of values near 1, against float64.
    torch.testing.assert_close(MIXED.attended(attention).double(), MIXED.by_hand(), atol=2e-6, rtol=0)


def test_a_sequence_has_the_same_bits_in_any_company(attention: Any) -> None:
    together = MIXED.attended(attention).split(MIXED.num_new.tolist())
    for number, expected in enumerate(together):
        assert torch.equal(MIXED.attended(attention, [number]), expected), number
    some = [5, 0, 3]
    assert torch.equal(MIXED.attended(attention, some), torch.cat([together[number] for number in some]))


def test_a_token_has_the_same_bits_whether_it_comes_with_many_or_alone(attention: Any) -> None:
    whole = Batch([70], [10])
    prefilled = whole.attended(attention)
    last = Batch([70], [10])
    last.num_new, last.query = torch.tensor([1]), whole.query[-1:]
    assert torch.equal(last.attended(attention), prefilled[-1:])


def test_sequences_are_few_calls(attention: Any) -> None:
    rollouts = Batch([2] * 100, [20] * 100)
    given = (rollouts.table, rollouts.requests, rollouts.lengths, rollouts.num_new)
    assert len(list(attention.extend_blocks(*given))) == 1
    assert attention.MAX_PADDED_TOKENS >= 200 * attention.KEY_STEP
