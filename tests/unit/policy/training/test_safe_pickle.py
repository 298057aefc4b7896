"""What the index of a checkpoint, and what ranks tell one another, may be made of."""

import io
import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import safe_globals
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata
from torch.distributed.checkpoint.planner import WriteItemType

from megatron_p2o.policy.training.safe_pickle import (
    ErrorOfPeer,
    RefusedPickle,
    _PeerUnpickler,
    check_pickle,
    refuse_code_of_peers,
    weights_only_loading,
)
from megatron_p2o.rollout.buckets.weight_message import MemoryAddress
from megatron_p2o.rollout.servers.server import EngineServer
from megatron_p2o.testing.distributed import run_gloo_ranks


class ByGetattr:
    """Pickled as `getattr(owner, name)`: how Python 3.11.2 pickles a member of an enumeration."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.owner, self.name)


def pickled(value: object, path: Path) -> Path:
    path.write_bytes(pickle.dumps(value))
    return path


def test_members_of_allowed_enumerations_are_accepted_however_they_are_pickled(tmp_path: Path) -> None:
    member = next(iter(_MEM_FORMAT_ENCODING))
    check_pickle(pickled(member, tmp_path / "by_this_python"))
    check_pickle(pickled(ByGetattr(_MEM_FORMAT_ENCODING, member.name), tmp_path / "by_3.11.2"))


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"], ids=["other versions", "3.13"])
def test_a_path_is_accepted_as_each_version_of_python_pickles_it(module: str, tmp_path: Path) -> None:
    (tmp_path / "pickle").write_bytes(f"c{module}\nPosixPath\n(Vstep\ntR.".encode())
    check_pickle(tmp_path / "pickle")
    assert pickle.loads((tmp_path / "pickle").read_bytes()) == Path("step")


@pytest.mark.parametrize(
    ("owner", "name"), [(Metadata, "__init__"), (_MEM_FORMAT_ENCODING, "__class__"), (Path, "unlink")]
)
def test_getattr_gives_nothing_but_members(owner: type, name: str, tmp_path: Path) -> None:
    with pytest.raises(RefusedPickle, match=r"names builtins\.getattr, which has no place in a checkpoint"):
        check_pickle(pickled(ByGetattr(owner, name), tmp_path / "pickle"))


class Call:
    """Pickled as a call of something with arguments."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def received(value: object) -> Any:
    """Return what rank 1 gets of what rank 0 tells it."""

    def tell() -> Any:
        refuse_code_of_peers()
        told = [value if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(told, src=0)
        return told[0] if dist.get_rank() == 1 else None

    return run_gloo_ranks(tell, 2)[1]


class NoSuchPeerError(Exception):
    """An error of a package that is not ours."""


def test_peers_tell_one_another_records_arrays_tensors_and_errors() -> None:
    address = MemoryAddress(path="/proc/1/fd/2", buffer_id="b", num_bytes=256)
    ids = np.arange(5, dtype=np.int32)
    told = {"record": address, "ids": ids, "tensor": torch.tensor([1.5], dtype=torch.bfloat16), "places": {1, 2}}
    got = received({**told, "kind": WriteItemType.TENSOR, "size": torch.Size([2, 3]), "path": Path("a")})
    assert (got["record"], got["places"], got["kind"]) == (address, {1, 2}, WriteItemType.TENSOR)
    assert (got["size"], got["path"], got["tensor"]) == (torch.Size([2, 3]), Path("a"), told["tensor"])
    assert got["ids"].dtype == np.int32 and got["ids"].tolist() == ids.tolist()
    error = received(FileNotFoundError(2, "gone", "a/b"))
    assert isinstance(error, FileNotFoundError) and error.filename == "a/b"


@pytest.mark.parametrize(
    "error", [pickle.UnpicklingError("bad"), torch.OutOfMemoryError("of 80 GiB"), NoSuchPeerError(7)]
)
def test_an_error_of_a_class_that_is_not_made_keeps_its_name_and_its_words(error: Exception) -> None:
    got = received({"on rank 1": error})["on rank 1"]
    assert isinstance(got, ErrorOfPeer) and got.args == (type(error).__name__, *error.args)
    assert str(got) == f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    "function",
    [os.system, eval, subprocess.Popen, torch.load, EngineServer, refuse_code_of_peers, torch.hub.load],
)
def test_peers_cannot_have_a_rank_call_anything(function: Any, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"RefusedPickle: a peer of this rank sent"):
        received({"ordinary": Call(function, f"touch {tmp_path}/made")})
    assert not (tmp_path / "made").exists()


@pytest.fixture
def megatron_loader(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What megatron-core 0.19 puts in the place of torch's loader of storages, whichever version is installed."""

    def safe_load_from_bytes(content: bytes) -> Any:
        return torch.load(io.BytesIO(content), weights_only=True)

    safe_load_from_bytes.__module__ = safe_globals.__name__
    safe_load_from_bytes.__qualname__ = safe_load_from_bytes.__name__
    monkeypatch.setattr(safe_globals, safe_load_from_bytes.__name__, safe_load_from_bytes, raising=False)
    monkeypatch.setattr(torch.storage, "_load_from_bytes", safe_load_from_bytes)
    return safe_load_from_bytes


def test_peers_tell_tensors_by_megatrons_own_loader_and_hide_no_call_there(megatron_loader: Any, tmp_path: Path):
    assert b"safe_load_from_bytes" in pickle.dumps(torch.ones(3))
    assert received(torch.ones(3)).tolist() == [1, 1, 1]
    hidden = pickle.dumps(Call(os.system, f"touch {tmp_path}/made"))
    with pytest.raises(RuntimeError, match="UnpicklingError"):
        received(Call(megatron_loader, hidden))
    assert not (tmp_path / "made").exists()


def test_peers_cannot_hide_a_call_in_a_tensor_or_behind_an_allowed_name(tmp_path: Path) -> None:
    hidden = pickle.dumps(Call(os.system, f"touch {tmp_path}/made"))
    with pytest.raises(RuntimeError, match="UnpicklingError"):
        received(Call(torch.storage._load_from_bytes, hidden))
    # What a pickle of protocol 4 says for an attribute of an attribute.
    dotted = b"\x80\x04\x8c\x1bmegatron_p2o.rollout.server\x8c\x10subprocess.Popen\x93."
    with pytest.raises(RefusedPickle, match=r"sent megatron_p2o\.rollout\.server\.subprocess\.Popen"):
        _PeerUnpickler(io.BytesIO(dotted)).load()
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("asked_for", [None, "1"])
def test_arbitrary_objects_are_refused_whatever_the_environment_asks_for(
    asked_for: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    monkeypatch.setenv(name, asked_for or "")
    if asked_for is None:
        monkeypatch.delenv(name)
    torch.save({"step": torch.tensor(3)}, tmp_path / "weights.pt")
    torch.save(ByGetattr(Path, "unlink"), tmp_path / "object.pt")
    with weights_only_loading():
        assert torch.load(tmp_path / "weights.pt", weights_only=False)["step"] == 3
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            torch.load(tmp_path / "object.pt", weights_only=False)
    assert os.environ.get(name) == asked_for and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
