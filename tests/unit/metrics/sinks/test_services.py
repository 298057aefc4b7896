"""What the services hold after a run, a kill and a resume: with their packages where these are installed."""

import importlib
import importlib.util
import json
import math
import sqlite3
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_p2o.config.tree import LoggingConfig
from megatron_p2o.metrics.log import open_metrics_log
from megatron_p2o.metrics.sinks.registry import run_id_of
from megatron_p2o.metrics.sinks.services import flat_settings, name_for_mlflow
from megatron_p2o.metrics.values import Last

SETTINGS: Mapping[str, Any] = {
    "optimizer": {"lr": 1e-6},
    "logging": {"sinks": {}, "console": False},
    "rollout": {"top_p": None},
    "text": "x" * 10_000,
}
CHANGED: Mapping[str, Any] = {**SETTINGS, "optimizer": {"lr": 2e-6}}
KEY = "rollout/reward_level_1+2"


def needs(package: str) -> pytest.MarkDecorator:
    is_there = importlib.util.find_spec(package) is not None
    return pytest.mark.skipif(not is_there, reason=f"{package} is not installed: it is an optional package")


def killed_and_resumed(run: Path, logging: LoggingConfig, caplog: pytest.LogCaptureFixture) -> None:
    """Write steps 1 to 3; then resume after step 1 with another setting, and write 2 to 4, each larger by 10."""
    with open_metrics_log(run, "same", logging, num_steps=4, settings=SETTINGS) as log:
        for step in (1, 2, 3):
            log.write(step, 0, {KEY: Last(step), "train/grad_norm": Last(math.nan)})
    with open_metrics_log(run, "same", logging, num_steps=4, num_kept=1, settings=CHANGED) as log:
        for step in (2, 3, 4):
            log.write(step, 0, {KEY: Last(step + 10)})
    assert "metrics sink" not in caplog.text


REDONE = [(1, 1.0), (2, 2.0), (3, 3.0), (2, 12.0), (3, 13.0), (4, 14.0)]
"""Step and value of every record, in the order of writing."""


@needs("wandb")
def test_wandb_keeps_redone_steps_in_the_run_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("one", "two"):
        killed_and_resumed(tmp_path / name, LoggingConfig(console=False, wandb_project="p2o"), caplog)
    assert run_id_of(tmp_path / "one") != run_id_of(tmp_path / "two")
    for name in ("one", "two"):
        run_id = run_id_of(tmp_path / name)
        records = [
            each
            for file in sorted((tmp_path / name).glob(f"wandb/offline-run-*-{run_id}*/*.wandb"))
            for each in wandb_records(file)
        ]
        rows = [row_of_wandb(each) for each in records if each.HasField("history")]
        assert [(row["step"], row[KEY]) for row in rows] == REDONE
        assert all(math.isnan(float(row["train/grad_norm"])) for row in rows[:3])
        started = [each.run for each in records if each.HasField("run")]
        assert {each.run_id for each in started} == {run_id} and {each.display_name for each in started} == {"same"}
        axes = {each.metric.glob_name or each.metric.name: each.metric.step_metric for each in records}
        assert axes["*"] == "step", "else W&B draws over its own step, which cannot go back"
        configs = [{item.key: json.loads(item.value_json) for item in each.config.update} for each in started]
        assert configs[0]["optimizer"] == {"lr": 1e-6}


def wandb_records(file: Path) -> list[Any]:
    """Return the records of a file that an offline run wrote: LevelDB's log format after a header of 7 bytes."""
    protobuf = importlib.import_module("wandb.proto.wandb_internal_pb2")
    content, at, whole, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # too little of the block is left for a chunk
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last chunk of one
            found.append(protobuf.Record.FromString(whole))
            whole = b""
    return found


def row_of_wandb(record: Any) -> dict[str, Any]:
    items = record.history.item
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


@needs("mlflow")
def test_mlflow_keeps_redone_steps_in_one_run_and_tells_changed_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
    for name in ("one", "two"):
        killed_and_resumed(tmp_path / name, LoggingConfig(console=False, mlflow_experiment="p2o"), caplog)
    client = importlib.import_module("mlflow.tracking").MlflowClient()
    experiment = client.get_experiment_by_name("p2o")
    runs = client.search_runs([experiment.experiment_id])
    ids = {run.data.tags["megatron_p2o.run_id"] for run in runs}
    assert len(runs) == 2 and ids == {run_id_of(tmp_path / "one"), run_id_of(tmp_path / "two")}
    for run in runs:
        assert (run.info.run_name, run.info.status) == ("same", "FINISHED")
        history = client.get_metric_history(run.info.run_id, name_for_mlflow(KEY))
        assert [(point.step, point.value) for point in history] == REDONE
        assert run.data.params["optimizer.lr"] == "1e-06" and run.data.params["logging.sinks"] == "{}"
        resumed = {name: value for name, value in run.data.tags.items() if name.startswith("resumed.")}
        assert resumed == {"resumed.optimizer.lr": "2e-06"}


@needs("trackio")
def test_trackio_keeps_redone_steps_in_the_run_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "trackio"
    monkeypatch.setenv("TRACKIO_DIR", str(folder))
    monkeypatch.setattr(importlib.import_module("trackio.utils"), "TRACKIO_DIR", folder)
    monkeypatch.setattr(importlib.import_module("trackio.sqlite_storage"), "TRACKIO_DIR", folder)
    for name in ("one", "two"):
        killed_and_resumed(tmp_path / name, LoggingConfig(console=False, trackio_project="p2o"), caplog)
    with sqlite3.connect(folder / "p2o.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
        configs = dict(database.execute("select run_name, config from configs").fetchall())
    for name in ("one", "two"):
        run_name = f"same-{run_id_of(tmp_path / name)}"
        own = [(step, json.loads(metrics)[KEY]) for run, step, metrics in rows if run == run_name]
        assert own == REDONE
        assert json.loads(configs[run_name])["optimizer.lr"] == 2e-6


@needs("tensorboard")
def test_tensorboard_drops_the_points_of_redone_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    killed_and_resumed(tmp_path, LoggingConfig(console=False, tensorboard=True), caplog)
    module = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = module.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(point.step, point.value) for point in events.Scalars(KEY)] == [(1, 1), (2, 12), (3, 13), (4, 14)]


def test_settings_become_dotted_names_and_names_that_mlflow_accepts() -> None:
    assert dict(flat_settings({"a": {"b": {"c": 1}, "d": {}}, "e": None})) == {"a.b.c": 1, "a.d": {}, "e": None}
    assert name_for_mlflow("eval/aime 24/pass_at_8") == "eval/aime 24/pass_at_8"
    assert name_for_mlflow("task/C++ (é)/reward") == "task/C__ ___/reward"
