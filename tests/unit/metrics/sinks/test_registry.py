"""Which sinks settings ask for, those of packages among them, and who a run is."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_p2o.config.tree import LoggingConfig
from megatron_p2o.metrics.log import open_metrics_log
from megatron_p2o.metrics.sinks import registry
from megatron_p2o.metrics.sinks.record import SinkContext
from megatron_p2o.metrics.sinks.registry import run_id_of, sink_keys, sink_problems, sink_secrets
from megatron_p2o.metrics.values import Last
from megatron_p2o.processes import PROXY_VARIABLES

MODULE = """
class ListSink:
    opened = []

    def __init__(self, context, repo="here"):
        self.context, self.repo, self.lines, self.is_closed = context, repo, [], False
        ListSink.opened.append(self)

    def write(self, record):
        self.lines.append((record.step, dict(record.metrics)))

    def close(self):
        self.is_closed = True


NUMBER = 5
"""


@pytest.fixture
def own_module(installed_package: Callable[[str, str, str], Path]) -> str:
    """Return the name of an installed module with a sink, which its package calls `aim`."""
    installed_package("my_sinks", MODULE, "[megatron_p2o.sinks]\naim = my_sinks:ListSink\n")
    return "my_sinks"


@pytest.mark.parametrize("name", ["aim", "my_sinks:ListSink"])
def test_a_sink_of_ones_own_gets_its_arguments_the_settings_and_all_records(
    tmp_path: Path, own_module: str, name: str
) -> None:
    run = tmp_path / "run"
    logging = LoggingConfig(console=False, sinks={name: {"repo": "there"}})
    settings = {"optimizer": {"lr": 1e-6}}
    with open_metrics_log(run, "grpo", logging, num_steps=2, settings=settings) as log:
        for step in (0, 1):
            log.write(step, 0, {"train/loss": Last(step)})
    (sink,) = sys.modules[own_module].ListSink.opened
    assert (sink.repo, sink.is_closed) == ("there", True)
    assert sink.lines == [(0, {"train/loss": 0.0}), (1, {"train/loss": 1.0})]
    expected = SinkContext(run_name="grpo", run_id=run_id_of(run), run_directory=run, settings=settings, first_step=0)
    assert sink.context == expected

    with open_metrics_log(run, "grpo", logging, num_steps=2, num_kept=1) as log:
        log.write(1, 0, {"train/loss": Last(1)})
    resumed = sys.modules[own_module].ListSink.opened[-1]
    assert (resumed.context.run_id, resumed.context.first_step) == (expected.run_id, 1)


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        (
            "aimm",
            {},
            "logging.sinks.aimm is none of aim, nor package.module:callable or "
            "path/to/file.py:callable (packages add names by the entry points megatron_p2o.sinks)",
        ),
        ("gone_module:Sink", {}, "logging.sinks.gone_module:Sink cannot be imported (ModuleNotFoundError"),
        ("my_sinks:Gone", {}, "logging.sinks.my_sinks:Gone cannot be imported (AttributeError"),
        ("my_sinks:NUMBER", {}, "logging.sinks.my_sinks:NUMBER is int, and must be callable as (context)"),
        ("my_sinks:ListSink", {"rep": 1}, "has the signature (context, repo='here') and must be callable as (context)"),
        ("my_sinks:ListSink", "here", "logging.sinks.my_sinks:ListSink=here must be a mapping of arguments"),
    ],
)
def test_a_sink_that_cannot_be_had_is_named_before_the_run_starts(
    own_module: str, tmp_path: Path, name: str, arguments: object, sentence: str
) -> None:
    logging = LoggingConfig(console=False, sinks={name: arguments})
    (problem,) = sink_problems(logging)
    assert sentence in problem
    with pytest.raises(ValueError, match=r"logging\.sinks"):
        open_metrics_log(tmp_path / "run", "run", logging, num_steps=1)
    assert not (tmp_path / "run").exists()


def test_every_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in registry.KINDS:
        monkeypatch.setitem(sys.modules, package, None)
    everything = LoggingConfig(tensorboard=True, wandb_project="w", mlflow_experiment="m", trackio_project="t")
    assert sink_problems(everything) == [
        "logging.tensorboard=true needs the package tensorboard: pip install tensorboard, or set logging.tensorboard "
        "to false",
        "logging.wandb_project=w needs the package wandb: pip install wandb, or set logging.wandb_project to null",
        "logging.mlflow_experiment=m needs the package mlflow: pip install mlflow, or set logging.mlflow_experiment to "
        "null",
        "logging.trackio_project=t needs the package trackio: pip install trackio, or set logging.trackio_project to "
        "null",
    ]
    assert sink_problems(LoggingConfig()) == [] and sink_secrets(LoggingConfig()) == ()


def test_a_sink_of_ones_own_gets_the_variables_that_its_arguments_name() -> None:
    sinks = {"a:b": {"api_key_env": "AIM_LOGIN", "server_env": "AIM_SERVER", "repo": "/data"}, "c:d": {}, "e:f": None}
    logging = LoggingConfig(sinks=sinks, wandb_project="w")
    assert sink_secrets(logging) == ("WANDB_API_KEY", *PROXY_VARIABLES, "AIM_LOGIN", "AIM_SERVER")
    assert sink_keys(logging) == {"AIM_LOGIN"}, "a secret for all other processes, whatever it is called"


def test_every_run_folder_has_an_id_of_its_own_that_stays(tmp_path: Path) -> None:
    first, second = tmp_path / "a" / "same", tmp_path / "b" / "same"
    assert run_id_of(first) == run_id_of(first) != run_id_of(second)
    (first / "run_id").write_text("../../other")
    with pytest.raises(ValueError, match="run_id must hold twelve hexadecimal digits: restore it, or remove it"):
        run_id_of(first)


def test_a_run_without_further_sinks_has_no_id(tmp_path: Path) -> None:
    open_metrics_log(tmp_path, "run", LoggingConfig(console=False), num_steps=1).close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
