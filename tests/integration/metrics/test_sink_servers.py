"""What MLflow and Trackio hold after a run that was killed and resumed: with servers, and settings of a real run."""

import importlib
import importlib.util
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from megatron_p2o.config.read import load_config
from megatron_p2o.metrics.sinks.registry import run_id_of
from megatron_p2o.metrics.sinks.services import PARAMS_PER_CALL, flat_settings, name_for_mlflow
from megatron_p2o.rollout.servers.server import reserve_port

EXAMPLE = Path(__file__).parents[3] / "examples" / "p2o_qwen3_4b.yaml"
KEY = "rollout/reward_level_1+2"
WAIT_S = 300.0
POLL_S = 0.2

WRITER = """
import sys, time
from dataclasses import asdict
from pathlib import Path
from megatron_p2o.config.read import load_config
from megatron_p2o.config.tree import LoggingConfig
from megatron_p2o.metrics.log import open_metrics_log
from megatron_p2o.metrics.values import Last

run, example, setting, key, start = sys.argv[1:]
is_resumed = start == "resumed"
settings = asdict(load_config(Path(example), ["optimizer.lr=1e-3"] if is_resumed else []))
logging = LoggingConfig(console=False, **{setting: "p2o"})
with open_metrics_log(Path(run), "same", logging, num_steps=4, num_kept=int(is_resumed), settings=settings) as log:
    for step in (2, 3, 4) if is_resumed else (1, 2, 3):
        log.write(step, 0, {key: Last(step + 10 * is_resumed)})
    sys.stdin.readline()
"""
"""A run of steps 1 to 3 that ends when it is told to; resumed after step 1 it writes 2 to 4, each larger by 10."""

FIRST = [(1, 1.0), (2, 2.0), (3, 3.0)]
REDONE = [*FIRST, (2, 12.0), (3, 13.0), (4, 14.0)]
"""Step and value of every record, in the order of writing."""

Points = list[tuple[int, float]]

pytestmark = pytest.mark.slow


def needs(package: str) -> pytest.MarkDecorator:
    is_there = importlib.util.find_spec(package) is not None
    return pytest.mark.skipif(not is_there, reason=f"{package} is not installed: it is an optional package")


def kill_and_resume(run: Path, setting: str, points: Callable[[], Points]) -> None:
    """Kill a run when all that it wrote has arrived, resume it, and end it when all of both is there."""
    command = [sys.executable, "-c", WRITER, str(run), str(EXAMPLE), setting, KEY]
    for start, expected in (("killed", FIRST), ("resumed", REDONE)):
        with subprocess.Popen([*command, start], text=True, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            try:
                wait_for(lambda expected=expected: points() == expected, process)
            except AssertionError:
                process.kill()
                pytest.fail(f"{start}: {process.communicate()[1]}")
            if start == "killed":
                process.kill()
            _, errors = process.communicate("end\n", timeout=WAIT_S)
        assert "metrics sink" not in errors, errors
        assert process.returncode == (0 if start == "resumed" else -signal.SIGKILL), errors
    assert points() == REDONE


def wait_for(is_reached: Callable[[], bool], process: "subprocess.Popen[Any]") -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_reached():
        assert process.poll() is None, f"ended with status {process.returncode}"
        assert time.monotonic() < deadline, f"did not come in {WAIT_S} s"
        time.sleep(POLL_S)


@contextmanager
def served(command: Sequence[str], address: str, environment: Mapping[str, str], log: Path) -> Iterator[None]:
    """Run a server for the length of the context, once it answers at `address`."""
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **environment},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        wait_for(lambda: answers(address), server)
        yield
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        print(log.read_text()[-4000:])  # shown with a failure


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


@pytest.fixture
def port() -> Iterator[int]:
    """Yield a port of this machine that is nobody's but the test's server's."""
    with reserve_port() as holder:
        yield holder.getsockname()[1]


@needs("mlflow")
def test_an_mlflow_server_keeps_redone_steps_in_one_run_and_tells_changed_settings(
    port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"http://127.0.0.1:{port}"
    store = ["--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db", "--artifacts-destination", f"{tmp_path}/files"]
    command = ["-m", "mlflow", "server", *store, "--port", str(port), "--workers", "1"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with served(command, f"{address}/health", {}, tmp_path / "server.log"):
        client = importlib.import_module("mlflow.tracking").MlflowClient()

        def runs() -> Sequence[Any]:
            experiment = client.get_experiment_by_name("p2o")
            return client.search_runs([experiment.experiment_id]) if experiment is not None else []

        def points() -> Points:
            histories = [client.get_metric_history(each.info.run_id, name_for_mlflow(KEY)) for each in runs()]
            return [(point.step, point.value) for history in histories for point in history]

        kill_and_resume(tmp_path / "run", "mlflow_experiment", points)
        (only,) = runs()
    assert (only.info.run_name, only.info.status) == ("same", "FINISHED")
    settings = {name_for_mlflow(name): str(value) for name, value in flat_settings(asdict(load_config(EXAMPLE)))}
    assert len(settings) > PARAMS_PER_CALL, "more than MLflow takes at once"
    assert only.data.params == settings
    tags = {name: value for name, value in only.data.tags.items() if not name.startswith("mlflow.")}
    assert tags == {"megatron_p2o.run_id": run_id_of(tmp_path / "run"), "resumed.optimizer.lr": "0.001"}


@needs("trackio")
@pytest.mark.parametrize("place", ["folder", "server"])
def test_trackio_keeps_redone_steps_in_the_run_of_the_folder(
    place: str, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "trackio"
    of_server = {"TRACKIO_DIR": str(store), "GRADIO_SERVER_PORT": str(port), "TRACKIO_WRITE_TOKEN": "a-write-token"}
    address = f"http://127.0.0.1:{port}/"
    if place == "server":
        monkeypatch.setenv("TRACKIO_SERVER_URL", address)
        monkeypatch.setenv("TRACKIO_WRITE_TOKEN", of_server["TRACKIO_WRITE_TOKEN"])
        monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "unused"))
        command = ["-c", "from trackio.cli import main; main()", "show", "--host", "127.0.0.1"]
        server = served(command, address, of_server, tmp_path / "server.log")
    else:
        monkeypatch.setenv("TRACKIO_DIR", str(store))
        server = nullcontext()

    def rows(query: str) -> list[Any]:
        if not (store / "p2o.db").exists():
            return []
        with closing(sqlite3.connect(f"file:{store}/p2o.db?mode=ro", uri=True, timeout=WAIT_S)) as database:
            return database.execute(query).fetchall()

    def points() -> Points:
        try:
            found = rows("select step, metrics from metrics order by id")
        except sqlite3.OperationalError:  # the file is there before its tables
            return []
        return [(step, json.loads(metrics)[KEY]) for step, metrics in found]

    with server:
        kill_and_resume(tmp_path / "run", "trackio_project", points)
        name = f"same-{run_id_of(tmp_path / 'run')}"
        assert {run for (run,) in rows("select run_name from metrics")} == {name}
        ((run, config),) = rows("select run_name, config from configs")
    settings = dict(flat_settings(asdict(load_config(EXAMPLE, ["optimizer.lr=1e-3"]))))
    told = json.loads(config)
    assert run == name and {key: told.get(key) for key in settings} == json.loads(json.dumps(settings))
