"""What the services are called with, on fakes that keep their rules; `test_services` asks the real packages."""

import re
import sys
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from megatron_p2o.config.tree import LoggingConfig
from megatron_p2o.metrics.log import open_metrics_log
from megatron_p2o.metrics.sinks.registry import run_id_of
from megatron_p2o.metrics.values import Last

REDONE = [(1, 1.0), (2, 2.0), (3, 3.0), (2, 12.0), (3, 13.0), (4, 14.0)]


def installed(monkeypatch: pytest.MonkeyPatch, name: str, **content: object) -> None:
    """Have `import name` find a module that holds `content`."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, origin="fake", is_package=True)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


def killed_and_resumed(run: Path, logging: LoggingConfig, num_settings: int = 1) -> None:
    """Write steps 1 to 3; then resume after step 1 with a larger `lr`, and write 2 to 4, each larger by 10."""
    rest = {f"s{index}": index for index in range(num_settings)}
    with open_metrics_log(run, "same", logging, num_steps=4, settings={"lr": 1, **rest}) as log:
        for step in (1, 2, 3):
            log.write(step, 0, {"train/a+b": Last(step)})
    with open_metrics_log(run, "same", logging, num_steps=4, num_kept=1, settings={"lr": 2, **rest}) as log:
        for step in (2, 3, 4):
            log.write(step, 0, {"train/a+b": Last(step + 10)})


@dataclass
class WandbServer:
    """Keeps the rows of each run by its id; ignores one whose own step is smaller than the last, as W&B does."""

    rows: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    axes: dict[str, str | None] = field(default_factory=dict)
    configs: list[dict[str, Any]] = field(default_factory=list)
    last_steps: dict[str, int] = field(default_factory=dict)

    def init(self, *, id: str, config: dict[str, Any], resume: str, **rest: object) -> SimpleNamespace:
        assert resume == "allow" and rest["name"] == "same"
        rows = self.rows.setdefault(id, [])
        self.configs.append(config)

        def log(row: dict[str, float], step: int | None = None) -> None:
            own_step = self.last_steps.get(id, -1) + 1 if step is None else step
            if own_step >= self.last_steps.get(id, -1):
                self.last_steps[id] = own_step
                rows.append(row)

        def define_metric(name: str, step_metric: str | None = None, hidden: bool | None = None) -> None:
            self.axes[name] = step_metric

        return SimpleNamespace(log=log, define_metric=define_metric, finish=lambda: None)


def test_wandb_gets_redone_steps_in_the_run_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = WandbServer()
    installed(monkeypatch, "wandb", init=server.init)
    for name in ("one", "two"):
        killed_and_resumed(tmp_path / name, LoggingConfig(console=False, wandb_project="p2o"))
    assert set(server.rows) == {run_id_of(tmp_path / "one"), run_id_of(tmp_path / "two")}
    for rows in server.rows.values():
        assert [(row["step"], row["train/a+b"]) for row in rows] == REDONE
    assert server.axes == {"step": None, "*": "step"}
    assert [config["lr"] for config in server.configs] == [1, 2, 1, 2]


class MlflowServer:
    """Keeps runs by MLflow's rules: names, batches of 100, parameters that never change."""

    def __init__(self) -> None:
        self.runs: list[SimpleNamespace] = []

    def get_experiment_by_name(self, name: str) -> SimpleNamespace | None:
        return SimpleNamespace(experiment_id=name) if self.runs else None

    def create_experiment(self, name: str) -> str:
        return name

    def search_runs(self, experiment_ids: list[str], is_ours: str, max_results: int) -> list[SimpleNamespace]:
        found = re.fullmatch(r"tags\.`(.*)` = '(.*)'", is_ours)
        assert found is not None
        return [run for run in self.runs if run.data.tags.get(found[1]) == found[2]][:max_results]

    def create_run(self, experiment_id: str, tags: dict[str, str], run_name: str) -> SimpleNamespace:
        info = SimpleNamespace(run_id=str(len(self.runs)), status="RUNNING", run_name=run_name)
        run = SimpleNamespace(info=info, data=SimpleNamespace(tags=dict(tags), params={}), points=[])
        self.runs.append(run)
        return run

    def update_run(self, run_id: str, status: str) -> None:
        self.runs[int(run_id)].info.status = status

    def set_terminated(self, run_id: str) -> None:
        self.update_run(run_id, "FINISHED")

    def log_batch(
        self, run_id: str, metrics: list[Any] | None = None, params: list[Any] | None = None, tags: Any = None
    ) -> None:
        run = self.runs[int(run_id)]
        assert run.info.status == "RUNNING" and max(len(params or []), len(tags or [])) <= 100
        for name, value, _time_ms, step in metrics or []:
            assert re.fullmatch(r"[\w\-. :/]+", name, re.ASCII)
            run.points.append((name, step, value))
        for name, value in params or []:
            assert run.data.params.setdefault(name, value) == value, "MLflow refuses another value"
        run.data.tags.update(tags or [])


def test_mlflow_gets_redone_steps_in_one_run_and_changed_settings_as_tags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = MlflowServer()
    installed(monkeypatch, "mlflow")
    installed(monkeypatch, "mlflow.tracking", MlflowClient=lambda: server)

    def entity(*parts: object) -> tuple[object, ...]:
        return parts

    installed(monkeypatch, "mlflow.entities", Metric=entity, Param=entity, RunTag=entity)
    for name in ("one", "two"):
        killed_and_resumed(tmp_path / name, LoggingConfig(console=False, mlflow_experiment="p2o"), num_settings=250)
    assert len(server.runs) == 2
    for name, run in zip(("one", "two"), server.runs, strict=True):
        assert run.data.tags == {"megatron_p2o.run_id": run_id_of(tmp_path / name), "resumed.lr": "2"}
        assert [(step, value) for key, step, value in run.points if key == "train/a_b"] == REDONE
        assert len(run.data.params) == 251 and run.data.params["lr"] == "1"
        assert (run.info.run_name, run.info.status) == ("same", "FINISHED")


def test_trackio_resumes_a_run_by_a_name_that_no_other_folder_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: dict[str, list[tuple[int, float]]] = {}
    configs: list[dict[str, Any]] = []

    def init(*, project: str, name: str, resume: str, config: dict[str, Any], **rest: object) -> SimpleNamespace:
        assert (project, resume) == ("p2o", "allow")
        configs.append(config)
        rows = runs.setdefault(name, [])

        def log(row: dict[str, float], step: int) -> None:
            rows.append((step, row["train/a+b"]))

        return SimpleNamespace(log=log, finish=lambda: None)

    installed(monkeypatch, "trackio", init=init)
    for name in ("one", "two"):
        killed_and_resumed(tmp_path / name, LoggingConfig(console=False, trackio_project="p2o"))
    assert runs == {f"same-{run_id_of(tmp_path / name)}": REDONE for name in ("one", "two")}
    assert configs[:2] == [{"lr": 1, "s0": 0}, {"lr": 2, "s0": 0}]
