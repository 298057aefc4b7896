"""Servers that cannot start, and servers whose parent is gone."""

import contextlib
import dataclasses
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_p2o.config.tree import Config, DataConfig, ModelConfig, RolloutConfig, RunConfig, one_task
from megatron_p2o.rollout.inside_sglang.launcher import shared_memory_of
from megatron_p2o.rollout.servers.scratch import Scratch
from megatron_p2o.rollout.servers.server import EngineStartFailed
from megatron_p2o.rollout.start import start_engines
from megatron_p2o.testing.tiny_model import write_tiny_qwen3

pytestmark = pytest.mark.slow

START_TIMEOUT_S = 300
REMOVAL_TIMEOUT_S = 60


def config_of(model: Path, **sglang: Any) -> Config:
    return Config(
        run=RunConfig(name="test"),
        model=ModelConfig(path=str(model), dtype="float32"),
        data=DataConfig(train=one_task("unused")),
        rollout=RolloutConfig(max_running_requests=8, max_total_tokens=4096, startup_timeout_s=START_TIMEOUT_S),
        sglang=sglang,
    )


def assert_no_child_is_left() -> None:
    assert not [child for child in psutil.Process().children() if "launcher" in " ".join(child.cmdline())]


def test_an_engine_that_cannot_load_its_model_shows_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model", "eos_token_id": 2}')
    with pytest.raises(EngineStartFailed, match=r"(?s)engine 0 ended while starting.*engine-0\.log.*no_such_model"):
        start_engines(config_of(tmp_path), tmp_path, [2])
    assert_no_child_is_left()


def test_an_unknown_server_argument_is_an_error_of_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^sglang\.max_prefil_tokens is not .*: did you mean sglang\.max_prefill_tok"):
        start_engines(config_of(tmp_path, max_prefil_tokens=64), tmp_path, [2])
    assert_no_child_is_left()


def test_an_engine_that_is_too_slow_is_given_up_and_ended(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    hasty = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, startup_timeout_s=0.5))
    with pytest.raises(EngineStartFailed, match=r"did not answer within rollout\.startup_timeout_s=0\.5"):
        start_engines(hasty, tmp_path, [2])
    assert_no_child_is_left()


UNWANTED = """
import json, sys
from pathlib import Path
from megatron_p2o.rollout.servers.server import EngineServer

server = EngineServer("engine 0", {"model_path": sys.argv[1], "device": "cpu"}, Path(sys.argv[2]) / "log")
print(json.dumps({"pid": server.pid, "scratch": str(server._scratch.path)}), flush=True)
sys.stdin.readline()
"""


def test_a_process_that_waits_to_serve_ends_with_its_owner_and_leaves_nothing(tmp_path: Path) -> None:
    model = write_tiny_qwen3(tmp_path / "model", seed=5)
    (tmp_path / "log").write_text("of the last session")
    command = [sys.executable, "-c", UNWANTED, str(model), str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        waiting = json.loads(owner.stdout.readline())
        process = psutil.Process(waiting["pid"])
        with pytest.raises(psutil.TimeoutExpired):
            process.wait(timeout=5)  # it does not serve by itself, and does not end
        assert not [connection for connection in process.net_connections() if connection.status == psutil.CONN_LISTEN]
        owner.kill()
    process.wait(timeout=60)
    assert not Path(waiting["scratch"]).exists()
    assert (tmp_path / "log").read_text() == "of the last session"


OWNER = """
import json, sys, time
from pathlib import Path
from megatron_p2o.config.tree import Config, DataConfig, ModelConfig, RolloutConfig, RunConfig
from megatron_p2o.config.sections.data import one_task
from megatron_p2o.rollout.servers.start import start_reflection_server

config = Config(
    run=RunConfig(name="test"),
    model=ModelConfig(path=sys.argv[1], dtype="float32"),
    data=DataConfig(train=one_task("unused")),
    rollout=RolloutConfig(max_running_requests=8, max_total_tokens=4096, startup_timeout_s=300),
)
server = start_reflection_server(config, Path(sys.argv[2]), num_engines_here=0)
print(json.dumps({"url": server.base_url + "/v1", "key": server.api_key, "pid": server.pid}), flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def owned_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A reflection server and the process that started it, which is killed at the end."""
    folder = tmp_path_factory.mktemp("owner")
    model = write_tiny_qwen3(folder / "model", seed=5)
    command = [sys.executable, "-c", OWNER, str(model), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as owner:
        assert owner.stdout is not None
        yield {"owner": owner, "log": folder / "engines" / "reflection.log", **json.loads(owner.stdout.readline())}
        owner.kill()


def test_the_reflection_server_speaks_openai_chat(owned_server: dict[str, Any]) -> None:
    body = {
        "model": "any",
        "messages": [{"role": "user", "content": "Improve this instruction."}],
        "max_tokens": 12,
        "temperature": 0.6,
    }
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {owned_server['key']}"}
    request = urllib.request.Request(
        owned_server["url"] + "/chat/completions", json.dumps(body).encode(), headers=headers
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        answer = json.load(response)
    assert 1 <= answer["usage"]["completion_tokens"] <= 12
    assert answer["usage"]["prompt_tokens"] == len("<im>user\nImprove this instruction.<im>\n<im>assistant\n") - 9
    assert answer["choices"][0]["message"]["content"]


def test_the_log_is_private(owned_server: dict[str, Any]) -> None:
    assert owned_server["log"].stat().st_mode & 0o077 == 0


def test_the_next_engine_removes_what_a_server_leaves_that_is_killed_with_its_parent(
    owned_server: dict[str, Any],
) -> None:
    server = psutil.Process(owned_server["pid"])
    family = [server, *server.children(recursive=True)]
    assert len(family) >= 3, "HTTP server, scheduler, detokenizer"
    scratch = Path(server.environ()["TMPDIR"])
    shared = {path for member in family for path in shared_memory_of(member.pid)}
    assert scratch.exists() and shared
    for member in (server, psutil.Process(owned_server["owner"].pid), *family[1:]):
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    owned_server["owner"].wait(timeout=30)
    Scratch().remove()  # no one else was left to
    deadline = time.monotonic() + REMOVAL_TIMEOUT_S
    # An engine of another test may have begun to remove them before, and ours then leaves that to it.
    while scratch.exists() or any(path.exists() for path in shared):
        assert time.monotonic() < deadline, "something is left"
        time.sleep(0.1)
