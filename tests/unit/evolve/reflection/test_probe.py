"""The reflection endpoint is asked once before a run starts."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from megatron_p2o.cli import main
from megatron_p2o.config.tree import Config, ReflectionConfig
from megatron_p2o.evolve.reflection.probe import check_endpoint, probe
from megatron_p2o.machine.findings import Finding
from megatron_p2o.run.before.examination import examine_endpoint
from megatron_p2o.testing.fakes import fake_config

KEY = "sk-very-secret"
ENVIRONMENT = {"P2O_REFLECTION_API_KEY": KEY}
CLOSED = "http://127.0.0.1:1/v1"
UNREACHABLE = ReflectionConfig(backend="openai", base_url=CLOSED, model="m", max_retries=0)


def run_of(directory: Path, reflection: ReflectionConfig) -> Config:
    """Return a run in `directory` without a checkpoint."""
    return fake_config({"run.directory": str(directory), "evolution.reflection": reflection})


@contextmanager
def endpoint(status: int = 200, content: Any = None) -> Iterator[tuple[ReflectionConfig, list[dict[str, Any]]]]:
    """Serve one answer to everybody with the key; yield the settings that lead there and the bodies received."""
    bodies: list[dict[str, Any]] = []

    class Model(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            has_key = self.headers["Authorization"] == f"Bearer {KEY}"
            self.send_response(status if has_key else 401)
            self.send_header("Retry-After-Ms", "1")
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, format: str, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Model) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        yield ReflectionConfig(backend="openai", base_url=url, model="m", max_tokens=7), bodies
        server.shutdown()


READY = {"choices": [{"message": {"content": "ready"}, "finish_reason": "stop"}]}
CUT = {"choices": [{"message": {"content": "", "reasoning_content": "hm"}, "finish_reason": "length"}]}


@pytest.mark.parametrize("content", [READY, CUT])
def test_endpoint_that_answers_is_asked_once_as_it_will_be_later(tmp_path: Path, content: Any) -> None:
    with endpoint(content=content) as (config, bodies):
        run = run_of(tmp_path, config)
        check_endpoint(run, ENVIRONMENT)
        assert examine_endpoint(run, ENVIRONMENT) == [
            Finding(subject="reflection", finding=f"{config.base_url} answers")
        ]
    assert len(bodies) == 2
    assert (bodies[0]["model"], bodies[0]["max_tokens"], bodies[0]["temperature"]) == ("m", 7, 0.6)


@pytest.mark.parametrize(
    ("status", "content", "environment", "named"),
    [
        (200, READY, {}, r"status 401: .*; check \$P2O_REFLECTION_API_KEY, which is not set"),
        (200, READY, {"P2O_REFLECTION_API_KEY": "sk-of-last-year"}, r"status 401: .*; check \$P2O_REFLECTION_API_KEY:"),
        (404, {"error": "The model `m` does not exist"}, ENVIRONMENT, "status 404: .*The model `m` does not exist"),
        (400, {"error": "Use 'max_completion_tokens'"}, ENVIRONMENT, "status 400: .*Use 'max_completion_tokens'"),
        (402, {"error": "Insufficient Balance"}, ENVIRONMENT, "status 402: .*Insufficient Balance"),
        (200, ["hello"], ENVIRONMENT, "not a chat completion: .*hello"),
    ],
)
def test_endpoint_that_will_never_serve_ends_the_start(
    tmp_path: Path, status: int, content: Any, environment: dict[str, str], named: str
) -> None:
    with endpoint(status, content) as (config, bodies):
        with pytest.raises(ValueError, match=rf"^evolution\.reflection: .*{named}.*evolution\.enabled=false"):
            check_endpoint(run_of(tmp_path, config), environment)
        assert len(bodies) == 1
        (finding,) = examine_endpoint(run_of(tmp_path, config), environment)
        assert finding.is_missing and finding.subject == "reflection"


def test_endpoint_that_is_busy_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with endpoint(503, {"error": "overloaded"}) as (config, bodies):
        check_endpoint(run_of(tmp_path, config), ENVIRONMENT)
        assert len(bodies) == 2, "it is asked twice"
        (finding,) = examine_endpoint(run_of(tmp_path, config), ENVIRONMENT)
    assert "status 503" in caplog.text and "while this lasts, rounds of evolution find no templates" in caplog.text
    assert not finding.is_missing and "overloaded" in finding.finding


def test_run_that_goes_on_from_a_checkpoint_is_not_ended_by_its_endpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of(tmp_path, UNREACHABLE)
    (tmp_path / "fake" / "checkpoints" / "step-000003").mkdir(parents=True)
    check_endpoint(run, {})
    assert "ConnectError" in caplog.text and "evolution.enabled=false" in caplog.text
    (finding,) = examine_endpoint(run, {})
    assert "ConnectError" in finding.finding and not finding.is_missing


def test_only_an_endpoint_that_evolution_needs_is_asked(tmp_path: Path) -> None:
    run = run_of(tmp_path, UNREACHABLE)
    for evolution in (
        replace(run.evolution, enabled=False),
        replace(run.evolution, reflection=replace(UNREACHABLE, backend="self")),
        replace(run.evolution, reflection=replace(UNREACHABLE, backend="phrasebook")),
    ):
        check_endpoint(replace(run, evolution=evolution), {})
        assert examine_endpoint(replace(run, evolution=evolution), {}) == []
    assert probe(UNREACHABLE, {}) is not None


def test_train_with_an_endpoint_that_is_down_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "train.jsonl").write_text("")
    settings = {
        "run": {"name": "r", "directory": str(tmp_path / "runs")},
        "model": {"path": str(tmp_path / "model")},
        "data": {"train": str(tmp_path / "train.jsonl")},
        "evolution": {"reflection": {"backend": "openai", "base_url": CLOSED, "model": "m", "max_retries": 0}},
    }
    path = tmp_path / "settings.yaml"
    path.write_text(json.dumps(settings))
    assert main(["train", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"evolution.reflection: {CLOSED}/chat/completions: ConnectError" in error
    assert not (tmp_path / "runs").exists()
