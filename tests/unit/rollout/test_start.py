"""The start of a run's engines: one that fails leaves none behind."""

from pathlib import Path
from unittest.mock import Mock

import pytest

from megatron_p2o.rollout import start
from megatron_p2o.rollout.start import start_engines
from megatron_p2o.testing.fakes import fake_config


@pytest.mark.parametrize("error", [RuntimeError("it died"), KeyboardInterrupt()], ids=["failure", "interrupt"])
def test_engines_that_are_started_end_when_one_of_them_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException
) -> None:
    servers = [Mock(), Mock(**{"wait_until_ready.side_effect": error}), Mock()]
    waiting = iter(servers)
    monkeypatch.setattr(start, "start_server", lambda *_: next(waiting))
    with pytest.raises(type(error)):
        start_engines(fake_config({"rollout.num_engines": 3}), tmp_path, [0])
    assert [server.stop.call_count for server in servers] == [1, 1, 1]


def test_engines_that_are_started_already_are_the_ones_that_serve(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ready = {"engine 0": Mock(), "engine 1": Mock(**{"wait_until_ready.side_effect": RuntimeError("it died")})}
    third = Mock()
    monkeypatch.setattr(start, "start_server", lambda *_: third)
    with pytest.raises(RuntimeError, match="it died"):
        start_engines(fake_config({"rollout.num_engines": 3}), tmp_path, [0], started=ready)
    servers = [*ready.values(), third]
    assert [server.begin.call_count for server in servers] == [1, 1, 1]
    assert [server.stop.call_count for server in servers] == [1, 1, 1]
