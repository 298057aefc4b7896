"""Services and formats that show the numbers of a run. The package of each is imported when it is opened.

After a resume from an earlier checkpoint, steps are done again. TensorBoard drops the old points of these steps; the
other services keep both and show the redone ones as later points of the same run.
"""

import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from megatron_p2o.metrics.sinks.record import SinkContext, StepRecord

STEP = "step"
"""Metric of Weights & Biases that is the x axis of all others."""

RUN_ID_TAG = "megatron_p2o.run_id"
"""Tag by which a resumed run finds its MLflow run again."""

REFUSED_IN_A_NAME = re.compile(r"[^\w\-. :/]", re.ASCII)
"""Characters that MLflow refuses in the names of metrics and parameters."""

PARAMS_PER_CALL = 100
"""More than that MLflow refuses."""


class TensorBoardSink:
    """Writes TensorBoard event files into `tensorboard/` of the run's folder."""

    def __init__(self, is_wanted: bool, context: SinkContext) -> None:
        from torch.utils.tensorboard import SummaryWriter

        directory = str(context.run_directory / "tensorboard")
        self._writer = SummaryWriter(log_dir=directory, purge_step=context.first_step)

    def write(self, record: StepRecord) -> None:
        for key, number in record.metrics.items():
            self._writer.add_scalar(key, number, record.step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Sends records to Weights & Biases; the login and the server come from the environment.

    W&B ignores a row whose own step is not larger than the last one, and only rewinds runs by a private preview. So
    the step is a metric of its own, which `define_metric` makes the x axis, and every record is a row.
    """

    def __init__(self, project: str, context: SinkContext) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self._run = wandb.init(
            project=project,
            name=context.run_name,
            id=context.run_id,
            resume="allow",
            dir=str(context.run_directory),
            config=dict(context.settings),
            allow_val_change=True,  # settings may change at a resume
        )
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("*", step_metric=STEP)

    def write(self, record: StepRecord) -> None:
        self._run.log({**record.metrics, STEP: record.step, "epoch": record.epoch})

    def close(self) -> None:
        self._run.finish()


class MlflowSink:
    """Sends records to MLflow; MLFLOW_TRACKING_URI says where.

    A resumed run is found by its tag. Parameters of MLflow cannot change: those that a resume changes become tags
    `resumed.<setting>`.
    """

    def __init__(self, experiment: str, context: SinkContext) -> None:
        from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

        self._client: Any = MlflowClient()
        known = self._client.get_experiment_by_name(experiment)
        experiment_id = known.experiment_id if known is not None else self._client.create_experiment(experiment)
        is_ours = f"tags.`{RUN_ID_TAG}` = '{context.run_id}'"
        found = self._client.search_runs([experiment_id], is_ours, max_results=1)
        tags = {RUN_ID_TAG: context.run_id}
        run = found[0] if found else self._client.create_run(experiment_id, tags=tags, run_name=context.run_name)
        self._run_id: str = run.info.run_id
        if found:
            self._client.update_run(self._run_id, status="RUNNING")
        self._set_params(run.data.params, context.settings)

    def _set_params(self, known: Mapping[str, str], settings: Mapping[str, Any]) -> None:
        from mlflow.entities import Param, RunTag  # pyright: ignore[reportMissingImports]

        wanted = {name_for_mlflow(name): str(value) for name, value in flat_settings(settings)}
        params = [Param(name, value) for name, value in wanted.items() if name not in known]
        tags = [
            RunTag(f"resumed.{name}", value)
            for name, value in wanted.items()
            if name in known and known[name] != value[: len(known[name]) or None]  # MLflow cuts long values
        ]
        for start in range(0, len(params), PARAMS_PER_CALL):
            self._client.log_batch(self._run_id, params=params[start : start + PARAMS_PER_CALL])
        for start in range(0, len(tags), PARAMS_PER_CALL):
            self._client.log_batch(self._run_id, tags=tags[start : start + PARAMS_PER_CALL])

    def write(self, record: StepRecord) -> None:
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        time_ms = int(datetime.fromisoformat(record.time).timestamp() * 1000)
        numbers = {**record.metrics, "epoch": float(record.epoch)}
        metrics = [Metric(name_for_mlflow(key), number, time_ms, record.step) for key, number in numbers.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


class TrackioSink:
    """Writes records for Trackio: on this machine, or to the Space or server that its variables name.

    Trackio resumes runs by their name, so the name ends in the run's id.
    """

    def __init__(self, project: str, context: SinkContext) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        self._run = trackio.init(
            project=project,
            name=f"{context.run_name}-{context.run_id}",
            resume="allow",
            config=dict(flat_settings(context.settings)),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def write(self, record: StepRecord) -> None:
        self._run.log({**record.metrics, "epoch": record.epoch}, step=record.step)

    def close(self) -> None:
        self._run.finish()


def name_for_mlflow(key: str) -> str:
    """Return `key` with "_" for each character that MLflow refuses."""
    return REFUSED_IN_A_NAME.sub("_", key)


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and value of each setting; an empty mapping is a value."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flat_settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
