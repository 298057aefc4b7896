"""How the address and the key of a node's daemon reach rank 0."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_p2o.rollout.servers.remote import DaemonAddress, leave_address, take_address

ADDRESS = DaemonAddress(url="http://10.0.0.2:1234", key="secret")


def test_the_key_of_a_daemon_lies_in_a_file_of_its_user_until_it_is_taken(tmp_path: Path) -> None:
    name = leave_address(tmp_path, 1, ADDRESS)
    assert [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()] == [0o600]
    assert ADDRESS.key not in name and leave_address(tmp_path, 1, ADDRESS) != name
    assert take_address(tmp_path, name, time.monotonic()) == ADDRESS
    assert not (tmp_path / name).exists()


def test_an_address_that_is_not_to_be_seen_is_waited_for_and_named(tmp_path: Path) -> None:
    name = f"daemon-1-{'0' * 32}.json"
    with pytest.raises(TimeoutError, match=rf"{name}, written by another node, .*do all nodes share {tmp_path}"):
        take_address(tmp_path, name, time.monotonic())


@pytest.mark.parametrize("name", ["../config.yaml", "daemon-1-0.json", f"x/daemon-1-{'0' * 32}.json", ""])
def test_whoever_writes_to_the_store_cannot_name_other_files(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names no daemon"):
        take_address(tmp_path / "engines", name, time.monotonic())


def test_a_daemon_without_a_key_does_not_serve(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_p2o.run.node_daemon", str(tmp_path / "config.yaml"), "127.0.0.1"]
    outcome = subprocess.run(
        [*command, "--parent", str(os.getpid())], input="\n", capture_output=True, text=True, timeout=60, check=False
    )
    assert outcome.returncode == 1 and outcome.stderr == "no key on standard input\n"
