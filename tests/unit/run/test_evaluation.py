"""What `p2o eval` takes its target, sets and output for."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_p2o.cli import main
from megatron_p2o.config.tree import EvaluationSetConfig
from megatron_p2o.run.evaluation import EvaluationRequest, evaluation_request
from megatron_p2o.run_folder.state import RunState, write_state

AIME = EvaluationSetConfig(file="aime.jsonl", num_samples=32)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with a checkpoint, a model directory beside it, and three files of problems; its training file is gone."""
    monkeypatch.chdir(tmp_path)
    for name in ("aime", "math", "amc"):
        Path(f"{name}.jsonl").touch()
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    checkpoint = Path("runs/a/checkpoints/step-000030")
    checkpoint.mkdir(parents=True)
    (checkpoint / "run_state.json").touch()
    (checkpoint.parent / "latest").write_text("step-000030")
    (checkpoint.parent / "best").write_text('{"checkpoint": "step-000030", "score": 0.5}')
    Path("runs/a/config.yaml").write_text(
        "run: {name: a}\nmodel: {path: model}\n"
        "data:\n  train: gone.jsonl\n  evaluation: {aime: {file: aime.jsonl, num_samples: 32}, math: math.jsonl}\n"
        "evaluation: {best_set: math}\n"
    )
    return tmp_path / "runs" / "a"


def requested(
    target: str | Path, *benchmarks: str, settings: Path | None = None, sets: tuple[str, ...] = ()
) -> EvaluationRequest:
    return evaluation_request(Path(target), settings, sets, benchmarks, None)


@pytest.mark.parametrize("name", ["step-000030", "latest", "best"])
def test_a_checkpoint_has_its_runs_settings_and_leaves_its_run_alone(run: Path, name: str) -> None:
    request = requested(run / "checkpoints" / name)
    assert request.checkpoint == run / "checkpoints" / "step-000030"
    assert request.output == run / "evaluations" / "step-000030"
    assert Path(request.config.run.directory) / request.config.run.name == request.output
    assert dict(request.config.data.evaluation) == {"aime": AIME, "math": EvaluationSetConfig(file="math.jsonl")}
    assert not request.config.evolution.enabled


def test_a_settings_file_means_its_initial_policy(run: Path) -> None:
    request = requested(run / "config.yaml")
    assert request.checkpoint is None and request.config.model.path == "model"
    assert request.output == run / "evaluations" / "initial"


def test_a_model_directory_needs_no_settings_file(run: Path) -> None:
    request = requested("model", "aime=aime.jsonl", sets=("model.dtype=float32",))
    assert (request.checkpoint, request.config.model.path, request.config.model.dtype) == (None, "model", "float32")
    assert request.output == run.parent / "evaluations" / "model"
    assert requested("model", settings=run / "config.yaml").config.data.evaluation["aime"] == AIME


def test_benchmarks_choose_known_sets_and_add_others(run: Path) -> None:
    config = requested(run / "config.yaml", "aime", "amc=amc.jsonl", sets=("data.evaluation.amc.num_samples=4",)).config
    assert dict(config.data.evaluation) == {"aime": AIME, "amc": EvaluationSetConfig(file="amc.jsonl", num_samples=4)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs"], "runs is no settings file, no checkpoint"),
        (["runs/a"], "runs/a is the folder of a run: name a checkpoint of it, runs/a/checkpoints/latest or runs/a/"),
        (["model"], "there is nothing to evaluate"),
        (["model", "--benchmark", "aime"], "--benchmark aime names no set of data.evaluation (none)"),
        (["model", "--benchmark", "aime=no.jsonl"], "data.evaluation.aime=no.jsonl must be an existing file"),
        (["runs/a/config.yaml", "--set", "evaluation.best_set=hmmt"], "evaluation.best_set=hmmt must name a set"),
        (
            ["runs/a/config.yaml", "--set", "data.evaluation.hmmt.temperature=1"],
            "data.evaluation.hmmt.file is missing",
        ),
        ([], "either what to evaluate or --compare"),
        (["model", "--compare", "a", "b"], "either what to evaluate or --compare"),
        (["--compare", "runs/a", "runs/b"], "holds no results.json"),
    ],
)
def test_a_wrong_request_starts_nothing_and_says_why(
    run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_template_is_the_runs_best_that_of_a_file_or_a_text(run: Path) -> None:
    checkpoint = run / "checkpoints" / "step-000030"
    state = RunState(step=30, epoch=1, batch=0, hard_problem_ids=(), library_version=1, num_ledger_entries=0)
    write_state(checkpoint / "run_state.json", replace(state, best_template="Draw it."))
    Path("hint.txt").write_text("Draw it.\n")
    requests = [
        evaluation_request(checkpoint, None, (), (), None, given) for given in ("best", "hint.txt", " Draw it. ")
    ]
    assert {request.template for request in requests} == {"Draw it."}
    (folder,) = {request.output for request in requests}
    assert folder.parent == run / "evaluations" and folder.name.startswith("step-000030-template-")
    other = evaluation_request(checkpoint, None, (), (), None, "Draw it twice.")
    assert other.output not in (folder, evaluation_request(checkpoint, None, (), (), None).output)
    given_output = evaluation_request(checkpoint, None, (), (), Path("here"), "best").output
    assert given_output == Path("here").absolute()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("best", "--template best needs a checkpoint of a run that has published templates"),
        ("empty.md", "--template empty.md holds no text"),
        ("  ", "holds no text: leave it out to ask plainly"),
        ("none.txt", "none.txt"),
    ],
)
def test_a_template_that_is_none_is_refused(given: str, said: str, run: Path) -> None:
    Path("empty.md").write_text("\n")
    with pytest.raises((ValueError, OSError), match=re.escape(said)):
        evaluation_request(run / "config.yaml", None, (), (), None, given)
