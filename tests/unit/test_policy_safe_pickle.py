"""What the index of a checkpoint may be made of, on every Python that writes it."""

import pickle
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from megatron_p2o.policy.safe_pickle import RefusedPickle, check_pickle


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
