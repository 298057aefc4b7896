"""What is told of a file or folder that cannot be used, and which errors keep their traceback."""

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_p2o.errors import SeveralErrors, Troubles, expected_message, expected_messages
from megatron_p2o.files import write_whole
from megatron_p2o.run_folder.lock import hold_run


def hold(path: Path) -> None:
    with hold_run(path):
        pass


@pytest.mark.parametrize(
    ("attempt", "told"),
    [
        (lambda tmp: (tmp / "gone").read_text(), "{tmp}/gone: No such file or directory: check the path"),
        (lambda tmp: tmp.read_text(), "{tmp}: Is a directory: a folder stands where a file belongs, move it away"),
        (lambda tmp: hold(tmp / "file" / "run"), "{tmp}/file/run: Not a directory: a file stands where a folder"),
        (lambda tmp: hold(tmp / "file"), "{tmp}/file: File exists: something else stands where it belongs"),
        (lambda tmp: hold(tmp / ("x" * 300)), "{tmp}/xxx"),
        (lambda tmp: hold(tmp / ("x" * 300)), "xxx...: File name too long: choose a shorter one"),
        (lambda tmp: write_whole(tmp / "folder", "text"), "{tmp}/folder: Is a directory: a folder stands where"),
        (lambda tmp: Path("/proc/p2o").mkdir(), "/proc/p2o: No such file or directory: check the path"),
        (lambda tmp: (tmp / "circle").read_text(), "{tmp}/circle: Too many levels of symbolic links: its"),
        (lambda tmp: os.stat(os.fsencode(tmp / "gone")), "{tmp}/gone: No such file or directory: check the path"),
        (lambda tmp: Path("/dev/full").write_text("x"), "No space left on device: free some space"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_named_with_the_reason_and_a_remedy(
    tmp_path: Path, attempt: Callable[[Path], None], told: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(OSError) as caught:
        attempt(tmp_path)
    message = expected_message(caught.value)
    assert message is not None and told.format(tmp=tmp_path) in message
    assert len(message) < 400 and "\n" not in message


def test_a_disk_that_fills_up_is_told_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as caught:
        write_whole(tmp_path / "config.yaml", "text")
    assert expected_message(caught.value) == f"{tmp_path}/config.yaml: No space left on device: free some space"
    assert list(tmp_path.iterdir()) == []


def test_what_says_nothing_of_a_file_is_an_error_of_the_program() -> None:
    with socket.socket() as unbound, pytest.raises(OSError) as caught:
        unbound.connect(("127.0.0.1", 1))
    assert expected_message(caught.value) is None
    with pytest.raises(UnicodeDecodeError) as undecodable:
        b"\xff".decode()
    assert expected_message(undecodable.value) is None
    assert expected_message(KeyError("weight_map")) is None
    assert expected_message(ValueError("run.name=x must be free")) == "run.name=x must be free"


def troubled(*errors: Exception) -> Troubles:
    troubles = Troubles()
    for error in errors:
        with troubles.noted():
            raise error
    return troubles


def test_troubles_are_told_all_at_once_and_a_single_one_as_it_is() -> None:
    troubled().tell()
    single = ValueError("a")
    with pytest.raises(ValueError, match=r"^a$") as caught:
        troubled(single).tell()
    assert caught.value is single
    with pytest.raises(SeveralErrors) as several:
        troubled(single, SeveralErrors(["b", "c"]), ValueError("a"), FileNotFoundError(2, "gone", "file")).tell()
    assert str(several.value) == "4 problems:\n  a\n  b\n  c\n  file: gone: check the path"
    assert expected_messages(several.value) == ("a", "b", "c", "file: gone: check the path")
    assert expected_messages(KeyError("a bug")) is None


def test_an_error_of_the_program_is_no_trouble() -> None:
    troubles = Troubles()
    with pytest.raises(KeyError), troubles.noted():
        raise KeyError("a bug")
    troubles.tell()
