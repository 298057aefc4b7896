"""What a run would find is looked at before it starts; dry run and doctor say the same, and all of it."""

import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from megatron_p2o.cli import BAD_INPUT, main
from megatron_p2o.config.read import load_config
from megatron_p2o.machine.findings import Finding, Findings
from megatron_p2o.machine.memory.engine import Gpus
from megatron_p2o.run.before.examination import examine_plan, examine_run
from megatron_p2o.run.before.pace import num_steps_done, pace_of
from megatron_p2o.run_folder.state import RunState, write_state
from megatron_p2o.testing.policy_oracle import policy_config
from megatron_p2o.testing.tiny_model import write_tiny_qwen3
from megatron_p2o.testing.tiny_model_types import QWEN3_4B

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="describes a machine without a GPU")

NUM_PROBLEMS = 8


@pytest.fixture(scope="module")
def whole_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("tiny"), max_positions=200)


@pytest.fixture
def settings_file(tmp_path: Path, whole_model: Path) -> Path:
    """Return settings that have nothing wrong: four steps of three of eight problems."""
    rows = ({"id": str(number), "question": f"{number}+1", "answer": "2"} for number in range(NUM_PROBLEMS))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections: dict[str, Any] = {
        "run": {"name": "test", "directory": str(tmp_path)},
        "model": {"path": str(whole_model), "dtype": "float32"},
        "data": {"train": str(tmp_path / "train.jsonl"), "question_format": "{question}"},
        "schedule": {"problems_per_step": 3, "problems_per_update": 3, "epochs": 2},
        "rollout": {"max_new_tokens": 100},
        "evolution": {"enabled": False},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def examined(settings_file: Path, *overrides: str, **environment: str) -> list[Finding]:
    return examine_run(load_config(settings_file, overrides), environment)


def of(findings: Sequence[Finding], subject: str) -> list[str]:
    return [finding.finding for finding in findings if finding.subject == subject]


def not_finite(folder: Path) -> Path:
    """Return a model with a weight that is not finite."""
    broken = write_tiny_qwen3(folder / "broken", max_positions=200)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, broken / "model.safetensors")
    return broken


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_sink_s_package_is_what_this_machine_lacks_and_hides_nothing(
    settings_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb = ("--set", "logging.wandb_project=p2o")
    assert main(["train", str(settings_file), "--dry-run", *wandb]) == 0, (
        "settings for a cluster are checked on a laptop"
    )
    assert "needs the package wandb" in capsys.readouterr().out
    assert main(["train", str(settings_file), *wandb]) == BAD_INPUT
    (tmp_path / "train.jsonl").write_text("no json\n")
    found = examined(settings_file, wandb[1])
    assert of(found, "packages") and of(found, "inputs")


def test_everything_that_is_wrong_is_told_at_once_by_dry_run_and_doctor(
    settings_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = not_finite(tmp_path)
    (tmp_path / "held.jsonl").write_text(json.dumps({"question": " ", "answer": "2"}) + "\n")
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps({"id": "long", "question": "1+" * 50, "answer": "2"}) + "\n")
    wrong = {
        "model.path": str(broken),
        "data.evaluation.held": str(tmp_path / "held.jsonl"),
        "megatron.recompute_granularty": "full",
        "sglang.port": "1",
        "model.layer_backend": "transformer_engine",
    }
    expected = [
        "model.norm.weight",
        "held.jsonl:1: question is blank",
        "problem long asked plainly takes",
        "did you mean megatron.recompute_granularity?",
        "sglang.port is decided by the program",
    ]
    overrides = [word for name, value in wrong.items() for word in ("--set", f"{name}={value}")]
    assert main(["train", str(settings_file), "--dry-run", *overrides]) == BAD_INPUT
    told = capsys.readouterr()
    assert f"p2o: {len(expected)} problems:\n" in told.err
    assert main(["doctor", str(settings_file), "--strict", *overrides]) == 1
    missing = [line for line in capsys.readouterr().out.splitlines() if "MISSING" in line]
    for sentence in expected:
        assert sentence in told.err and any(sentence in line for line in missing), sentence
    assert re.search(r"disk: .* free in|disk +.* free in", told.out), "what does not depend on it is told all the same"
    assert "nothing is missing" not in told.out


def test_the_doctor_reads_every_weight_on_the_first_node_of_a_job_alone(settings_file: Path, tmp_path: Path) -> None:
    model = f"model.path={not_finite(tmp_path)}"
    (finding,) = (each for each in examined(settings_file, model) if each.is_missing)
    assert finding.subject == "weights" and finding.is_wrong and "model.norm.weight" in finding.finding
    others = examined(settings_file, model, SLURM_NODEID="1")
    assert not any(finding.is_missing for finding in others) and not of(others, "hours")


def test_what_this_machine_lacks_ends_the_dry_run_with_the_command_that_fails_on_it(
    settings_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lacks = ["--set", "model.layer_backend=transformer_engine"]
    assert main(["train", str(settings_file), "--dry-run", *lacks]) == 0
    *_, lack, last = capsys.readouterr().out.splitlines()
    assert lack.startswith("not on this machine: model.layer_backend=transformer_engine")
    command = re.search(r"p2o (doctor \S+ --strict) fails on what it lacks", last)
    assert command is not None and str(settings_file) in command[1]
    assert main([*command[1].split(), *lacks]) == 1
    assert main(command[1].split()) == 0
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "p2o doctor CONFIG --strict exits with 1 then" in " ".join(capsys.readouterr().out.split())


def test_the_dry_run_asks_the_reflection_endpoint_too(settings_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    endpoint = {"backend": "openai", "base_url": "http://127.0.0.1:1/v1", "model": "m", "max_retries": "0"}
    overrides = ["evolution.enabled=true", "hard.min_problems=2"]
    overrides += [f"evolution.reflection.{name}={value}" for name, value in endpoint.items()]
    command = [str(settings_file), *(word for override in overrides for word in ("--set", override))]
    assert main(["train", *command, "--dry-run"]) == 0
    assert "not on this machine: evolution.reflection: http://127.0.0.1:1/v1" in capsys.readouterr().out
    assert main(["doctor", *command, "--strict"]) == 1
    assert not of(examined(settings_file, *overrides, SLURM_NODEID="1"), "reflection")


@needs_no_gpu
def test_without_a_gpu_memory_is_counted_and_hours_are_unknown_before_the_first_steps(settings_file: Path) -> None:
    findings = examined(settings_file)
    assert not any(finding.is_missing for finding in findings)
    assert of(findings, "hours") == ["hours: unknown before the first steps"]
    assert of(findings, "plan")[0].startswith("memory without a GPU: at least ")
    limited = of(examined(settings_file, "schedule.max_hours=2.5"), "hours")
    assert limited == ["hours: unknown before the first steps, at most schedule.max_hours=2.5"]


def write_steps(run_dir: Path, seconds: Sequence[float], **last: float) -> None:
    """Write the metrics of steps that took so long, and a checkpoint after two of them."""
    run_dir.mkdir()
    lines: list[Mapping[str, Any]] = [
        {"step": step, "epoch": 0, "time": "", "metrics": {"perf/step_s": took}}
        for step, took in enumerate(seconds, start=1)
    ]
    lines[-1]["metrics"].update(last)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run_dir / "checkpoints" / "step-000002").mkdir(parents=True)
    (run_dir / "checkpoints" / "latest").write_text("step-000002\n")
    state = RunState(step=2, epoch=1, batch=0, hard_problem_ids=(), library_version=0, num_ledger_entries=0)
    write_state(run_dir / "checkpoints" / "step-000002" / "run_state.json", state)


def test_a_run_that_has_made_steps_tells_the_hours_of_those_that_are_left(settings_file: Path) -> None:
    write_steps(settings_file.parent / "test", [100.0, 30.0, 50.0], **{"perf/save_s": 4.0})
    (hours,) = of(examined(settings_file), "hours")
    assert hours.startswith(f"hours: about {2 * 50 / 3600:.2f} for the 2 steps that are left, of 50.0 s: the median ")
    assert "of the run's last 3." in hours


def test_a_job_that_ends_before_one_more_step_lacks_time(settings_file: Path) -> None:
    write_steps(settings_file.parent / "test", [1e9, 1e9, 1e9])
    (lack,) = (each for each in examined(settings_file, SLURM_JOB_END_TIME="1") if each.is_missing)
    assert "not enough for one step and a checkpoint" in lack.finding and not lack.is_wrong


def test_the_pace_is_the_median_of_the_newest_steps(tmp_path: Path) -> None:
    assert pace_of(tmp_path / "test") is None and num_steps_done(tmp_path / "test") == 0
    write_steps(tmp_path / "test", [1000.0] * 30 + [float(number) for number in range(1, 21)])
    pace = pace_of(tmp_path / "test")
    assert pace is not None and (pace.num_steps, pace.step_s, pace.save_s) == (20, 10.5, 0.0)
    assert num_steps_done(tmp_path / "test") == 2
    (tmp_path / "test" / "checkpoints" / "step-000002" / "run_state.json").write_text("{")
    assert num_steps_done(tmp_path / "test") == 0


@pytest.fixture
def planned(settings_file: Path) -> Path:
    """Return the settings with a model for GPUs, of which only the sizes are here."""
    (settings_file.parent / "4b").mkdir()
    (settings_file.parent / "4b" / "config.json").write_text(json.dumps(QWEN3_4B))
    sections = yaml.safe_load(settings_file.read_text())
    sections["model"] = {"path": str(settings_file.parent / "4b"), "dtype": "bfloat16"}
    sections["rollout"] |= {"num_engines": 8}
    sections["parallel"] = {"distributed_optimizer": True}
    settings_file.write_text(yaml.safe_dump(sections))
    return settings_file


GPUS = Gpus(count=8, num_bytes=80 << 30, num_nodes=1)


def test_a_plan_for_gpus_elsewhere_has_memory_and_simulated_hours(planned: Path) -> None:
    findings = examine_plan(load_config(planned), GPUS)
    assert not any(finding.is_missing for finding in findings)
    hours, how = of(findings, "hours")
    assert re.fullmatch(r"hours, simulated: run: 4 steps, \d+\.\d h, \d+ GPU-hours", hours)
    assert "no GPU has measured" in how
    assert any(line.startswith("memory of a GPU, training: ") for line in of(findings, "plan"))
    searching = of(examine_plan(load_config(planned, ["evolution.enabled=true"]), GPUS), "hours")
    assert searching[0] == f"{hours}; rounds of evolution come on top, which p2o plan simulates"


def test_hours_that_cannot_be_simulated_say_why(planned: Path) -> None:
    of_another = examine_plan(load_config(planned), replace(GPUS, num_bytes=60 << 30))
    (unknown,) = of(of_another, "hours")
    assert unknown.startswith("hours: unknown, they cannot be simulated: no speed is known of a GPU of 60 GiB")
    elsewhere = examine_plan(load_config(planned, ["data.train=gone.jsonl"]), GPUS)
    assert of(elsewhere, "hours") == [
        "hours: unknown, gone.jsonl is not here: p2o plan simulates them with --problems N"
    ]
    assert not any(finding.is_missing for finding in [*of_another, *elsewhere])


@needs_no_gpu
@pytest.mark.parametrize(
    ("setting", "expected"),
    [("auto", "through host memory"), ("device", "on the engines' own devices: memory files, without CUDA")],
)
def test_the_way_of_the_weights_to_the_engines_has_a_line(setting: Any, expected: str, tmp_path: Path) -> None:
    config = policy_config(write_tiny_qwen3(tmp_path, vocab_size=131))
    config = replace(config, rollout=replace(config.rollout, weight_transfer=setting))
    assert of(examine_run(config, {}), "weights to engines") == [expected]


def test_findings_go_on_after_an_error_of_an_input_and_not_after_one_of_the_program() -> None:
    found = Findings()
    with found.looking_at("a"):
        raise ValueError("bad")
    with found.looking_at("b", is_of_machine=True):
        raise ValueError("absent")
    assert [(each.subject, each.finding, each.is_missing, each.is_wrong) for each in found.found] == [
        ("a", "bad", True, True),
        ("b", "absent", True, False),
    ]
    with pytest.raises(KeyError), found.looking_at("c"):
        raise KeyError("a bug")
