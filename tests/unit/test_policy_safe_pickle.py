"""What the index of a checkpoint may be made of, on every Python that writes it."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from megatron_p2o.policy.safe_pickle import RefusedPickle, check_pickle, weights_only_loading


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


@pytest.mark.parametrize(
    ("owner", "name"), [(Metadata, "__init__"), (_MEM_FORMAT_ENCODING, "__class__"), (Path, "unlink")]
)
def test_getattr_gives_nothing_but_members(owner: type, name: str, tmp_path: Path) -> None:
    with pytest.raises(RefusedPickle, match=r"names builtins\.getattr, which has no place in a checkpoint"):
        check_pickle(pickled(ByGetattr(owner, name), tmp_path / "pickle"))


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
