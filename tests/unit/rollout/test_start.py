"""The start of a run's engines: one that fails leaves none behind."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest

from megatron_p2o import terminal
from megatron_p2o.rollout import start
from megatron_p2o.rollout.servers import start as servers_start
from megatron_p2o.rollout.servers.start import wait_until_all_answer
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


def test_engines_that_take_their_time_are_counted_until_all_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "WAITED_EVERY_S", 0.0)
    monkeypatch.setattr(servers_start, "START_SHOWN_S", 0.01)
    answers, told = threading.Event(), threading.Event()
    slow = Mock(**{"wait_until_ready.side_effect": lambda timeout_s: answers.wait(30)})
    show = terminal.WaitLine.show

    def noted(line: terminal.WaitLine, text: str) -> None:
        show(line, text)
        if "1 of 2" in text:  # the quick one has been seen, though the slow one was asked first
            told.set()
            answers.set()

    monkeypatch.setattr(terminal.WaitLine, "show", noted)
    with ThreadPoolExecutor(2) as threads:
        wait_until_all_answer("engines", [slow, Mock()], 900.0, threads)
    assert told.is_set()
    said = capsys.readouterr().err
    assert re.search(
        r"^starting engines: 1 of 2 answer after \d+ s, at most 15 min 00 s \(rollout.startup_timeout_s\)$", said, re.M
    )


def test_an_engine_that_fails_ends_the_wait_for_the_others() -> None:
    ends, ended = threading.Event(), threading.Event()

    def wait_until_ready(timeout_s: float) -> None:
        ends.wait(30)
        ended.set()

    waits = Mock(**{"wait_until_ready.side_effect": wait_until_ready})
    fails = Mock(**{"wait_until_ready.side_effect": RuntimeError("it died")})
    with ThreadPoolExecutor(2) as threads:
        try:
            with pytest.raises(RuntimeError, match="it died"):
                wait_until_all_answer("engines", [waits, fails], 900.0, threads)
            assert not ended.is_set()
        finally:
            ends.set()
