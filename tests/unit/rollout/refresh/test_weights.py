from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_p2o.rollout.inside_sglang import weight_loader
from megatron_p2o.rollout.refresh.refresh_verdict import RefreshFailed
from megatron_p2o.rollout.refresh.weight_sync import WeightSync
from megatron_p2o.rollout.servers.answers import EngineRefused
from megatron_p2o.testing.engines.sglang_server import FusedModel
from megatron_p2o.testing.engines.sglang_server import fused_model_weights as weights
from megatron_p2o.testing.weight_fleet import InProcessClient, InProcessFleet, assert_holds

NAMES = ("embed.weight", "q.weight", "k.weight", "v.weight", "norm.weight")


@pytest.fixture
def model() -> FusedModel:
    return FusedModel()


def sync_of(*clients: InProcessClient, directory: Path, bucket_bytes: int = 1 << 16) -> WeightSync:
    fleet = InProcessFleet(*clients)
    return WeightSync(fleet, directory, tensor_parallel=1, answer_timeout_s=5, bucket_bytes=bucket_bytes)


@pytest.mark.parametrize("bucket_bytes", [16, 48, 1 << 16], ids=["each weight alone", "some together", "one bucket"])
def test_every_engine_holds_the_weights_after_each_refresh(tmp_path: Path, bucket_bytes: int) -> None:
    clients = [InProcessClient(FusedModel()), InProcessClient(FusedModel())]
    sync = sync_of(*clients, directory=tmp_path, bucket_bytes=bucket_bytes)
    for version in (1, 2, 3):
        sent = weights(seed=version)
        sync.refresh(iter(sent), version, verify=True)
        for client in clients:
            assert_holds(client.model, sent)
            assert client.version == version
            assert not client.is_open
            assert client.calls[-2:] == ["pause", "resume"]
    assert list(tmp_path.iterdir()) == []


def test_only_the_first_refresh_runs_the_model_s_own_loading(model: FusedModel, tmp_path: Path) -> None:
    sync = sync_of(InProcessClient(model), directory=tmp_path)
    for version in (1, 2, 3):
        sync.refresh(weights(version), version, verify=True)
    assert model.num_loads == 1


def test_a_parameter_that_moved_is_found_again(model: FusedModel, tmp_path: Path) -> None:
    sync = sync_of(InProcessClient(model), directory=tmp_path)
    sync.refresh(weights(1), 1, verify=True)
    model.qkv.data = model.qkv.data.clone()
    sync.refresh(weights(2), 2, verify=True)
    assert_holds(model, weights(2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing is page-locked")
def test_buckets_are_page_locked_on_both_sides_and_arrive_on_the_gpu(tmp_path: Path) -> None:
    model = FusedModel().cuda()
    sync = sync_of(InProcessClient(model), directory=tmp_path)
    for version in (1, 2, 3):
        sent = [(name, value.cuda()) for name, value in weights(version)]
        sync.refresh(sent, version, verify=True)
        by_name = dict(sent)
        assert torch.equal(model.qkv, torch.cat([by_name[f"{part}.weight"] for part in "qkv"]))
        assert torch.equal(model.norm, by_name["norm.weight"])
    mapped = weight_loader._LOADERS[model]._mapped.values()
    assert sync._staged.buckets[0].content.is_pinned() and mapped and all(bucket.is_pinned() for bucket in mapped)
    sync.close()


def test_a_model_that_derives_values_from_its_weights_always_loads_itself(tmp_path: Path) -> None:
    class Derived(FusedModel):
        def post_load_weights(self) -> None: ...

    model = Derived()
    sync = sync_of(InProcessClient(model), directory=tmp_path)
    for version in (1, 2):
        sync.refresh(weights(version), version, verify=True)
    assert model.num_loads == 2


@pytest.mark.parametrize("name", NAMES)
def test_one_flipped_bit_in_the_engine_fails_the_refresh_and_names_the_weight(name: str, tmp_path: Path) -> None:
    model = FusedModel()
    client = InProcessClient(model)
    sync = sync_of(client, directory=tmp_path)
    sync.refresh(weights(1), 1, verify=True)
    sync.load(sync.stage(weights(2), verify=True), verify=True)
    place = {"embed": model.embed[4], "q": model.qkv[2], "k": model.qkv[4], "v": model.qkv[5], "norm": model.norm}
    flip_lowest_bit(place[name.split(".")[0]].data)
    with pytest.raises(RefreshFailed, match=f"engine 0 .*1 weights that differ from the trainer's: {name}$"):
        sync.check(2, verify=True)
    assert client.version == 1
    assert client.calls == ["pause", "resume", "pause"]


def test_damage_on_the_way_to_the_engine_is_detected(model: FusedModel, tmp_path: Path) -> None:
    class DamagingClient(InProcessClient):
        def load(self, named_tensors: list[tuple[str, Tensor]]) -> None:
            for buffer in sync._staged.buckets:
                flip_lowest_bit(buffer._memory.content)
            super().load(named_tensors)

    client = DamagingClient(model)
    sync = sync_of(client, directory=tmp_path)
    with pytest.raises(RefreshFailed, match=r"embed\.weight"):
        sync.refresh(weights(), 1, verify=True)
    assert client.version == 0


def test_a_refresh_after_a_failed_one_repairs_the_engine(model: FusedModel, tmp_path: Path) -> None:
    client = InProcessClient(model)
    sync = sync_of(client, directory=tmp_path)
    sync.load(sync.stage(weights(1), verify=True), verify=True)
    flip_lowest_bit(model.norm.data)
    with pytest.raises(RefreshFailed):
        sync.check(1, verify=True)
    sync.refresh(weights(2), 2, verify=True)
    assert_holds(model, weights(2))
    assert client.version == 2


def test_a_weight_that_was_left_out_fails_the_refresh(model: FusedModel, tmp_path: Path) -> None:
    with pytest.raises(RefreshFailed, match="2 parameters that no traceable copy filled: qkv, norm;"):
        sync_of(InProcessClient(model), directory=tmp_path).refresh(weights()[:3], 1, verify=True)


def test_a_weight_the_model_does_not_know_fails_the_refresh(model: FusedModel, tmp_path: Path) -> None:
    sent = [*weights(), ("lm_head.bias", torch.ones(4))]
    with pytest.raises(RefreshFailed, match=r"no use for 1 weights it was sent: lm_head\.bias"):
        sync_of(InProcessClient(model), directory=tmp_path).refresh(sent, 1, verify=True)


def test_a_tied_weight_sent_twice_is_no_error(model: FusedModel, tmp_path: Path) -> None:
    sent = [*weights(), ("lm_head.weight", weights()[0][1])]
    sync_of(InProcessClient(model), directory=tmp_path).refresh(sent, 1, verify=True)
    assert_holds(model, weights())


def test_without_verification_nothing_is_compared(model: FusedModel, tmp_path: Path) -> None:
    client = InProcessClient(model)
    sync = sync_of(client, directory=tmp_path)
    sync.load(sync.stage(weights(), verify=False), verify=False)
    flip_lowest_bit(model.norm.data)
    sync.check(1, verify=False)
    sync.commit(1)
    assert client.version == 1


def test_a_policy_without_weights_is_an_error(model: FusedModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no weights"):
        sync_of(InProcessClient(model), directory=tmp_path).refresh(iter(()), 1, verify=True)


def test_a_refused_refresh_still_consumes_the_weights(model: FusedModel, tmp_path: Path) -> None:
    class RefusingClient(InProcessClient):
        def load(self, named_tensors: list[tuple[str, Tensor]]) -> None:
            raise EngineRefused("no")

    client = RefusingClient(model)
    remaining = iter(weights())
    with pytest.raises(RefreshFailed, match="version 1: no"):
        sync_of(client, directory=tmp_path, bucket_bytes=16).refresh(remaining, 1, verify=True)
    assert next(remaining, None) is None
    assert client.version == 0


def test_weights_are_taken_from_the_iterator_before_the_next_is_asked_for(model: FusedModel, tmp_path: Path) -> None:
    """A policy may yield the same memory again and again: gathered weights are not kept."""
    memory = torch.empty(15)

    def reused() -> Iterator[tuple[str, Tensor]]:
        for name, value in weights(4):
            view = memory[: value.numel()].view(value.shape) if value.dtype == torch.float32 else value
            yield name, view.copy_(value) if view is not value else value

    sync_of(InProcessClient(model), directory=tmp_path).refresh(reused(), 1, verify=True)
    assert_holds(model, weights(4))


def test_non_contiguous_weights_arrive_in_order(model: FusedModel, tmp_path: Path) -> None:
    sent = [(name, value.t().contiguous().t() if value.dim() == 2 else value) for name, value in weights(5)]
    sync_of(InProcessClient(model), directory=tmp_path).refresh(sent, 1, verify=True)
    assert_holds(model, weights(5))


def test_the_loader_gives_up_memory_that_the_trainer_no_longer_uses(model: FusedModel, tmp_path: Path) -> None:
    client = InProcessClient(model)
    for version in (1, 2):
        # Each has buckets of its own, as a trainer has that sends larger ones than before.
        sync_of(client, directory=tmp_path, bucket_bytes=48).refresh(weights(version), version, verify=True)
        assert len(weight_loader._LOADERS[model]._mapped) == 3
    assert_holds(model, weights(2))


def flip_lowest_bit(values: Tensor) -> None:
    flat = values.flatten().view(torch.uint8) if values.dtype != torch.uint8 else values
    assert flat.data_ptr() == values.data_ptr()
    flat[0] ^= 1
