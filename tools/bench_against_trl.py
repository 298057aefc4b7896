"""GRPO by TRL's trainer beside ours on one machine: the same tiny policy, problems, group size, objective and steps.

    python tools/bench_against_trl.py --json tools/results/cpu_against_trl.json       # five runs of each, in turns
    python tools/bench_against_trl.py --repeats 1 --steps 2 --trl-python .venv-trl/bin/python

TRL runs in an environment of its own, made once (`.venv-trl`) on top of this one, so that both use the same torch and
transformers. TRL generates with transformers; we sample with one SGLang engine. Every run starts new processes.

Before anything is reported, one update by our trainer on the rollouts of TRL's first step must have the loss and the
gradient norm of TRL's own, and both must ask the same tokens: the objectives are the same.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # where PYTHONSAFEPATH leaves it out

from random_policy import ROOT, measured_on  # isort: skip; makes ours importable

from bench.measure import write_result

from process_tree import run_measured  # isort: skip
from trl_comparison import compared, table, told  # isort: skip

from megatron_p2o.config.read import load_config
from megatron_p2o.config.shape import ONLY_TASK
from megatron_p2o.data.chat import chat_renderer
from megatron_p2o.data.tasks import task_problems
from megatron_p2o.policy.training.ranks import build_policy
from megatron_p2o.tiny.problems import FAMILIES, Split, generate_problems, user_message
from megatron_p2o.types import PLAIN, TrainSample
from p2o_kernels import grouped_advantage

TRL_PACKAGES = (
    "trl==1.16.0",
    "datasets==5.2.0",
    "accelerate==1.15.0",
    "multiprocess==0.70.19",
    "pandas==3.1.1",
    "pyarrow==26.0.1",
    "python-dateutil==4.0.0",
    "six==1.17.0",
    "xxhash==4.1.0",
)
"""TRL and what it needs besides requirements/cpu.txt."""

PROBLEMS_PER_STEP, GROUP_SIZE = 64, 6
TEMPERATURE, MAX_NEW_TOKENS, LR = 0.8, 48, 2e-4
MICRO_BATCH_TOKENS = 4096
"""Ours: packed tokens of one pass. TRL's rows are padded to the longest; 64 of them are about as many."""
TRL_SAMPLES_PER_PASS = 64
NUM_HELD_OUT = 192
EVALUATIONS = 2
"""Accuracy is measured so often in a run, the last time at its end."""
TIMEOUT_S = 1800.0
RELATIVE_GATE = 2e-3
"""Largest difference of loss and gradient norm. TRL adds 1e-4 to the deviation of rewards, we 1e-6: that alone is up to
3e-4 of an advantage. The loss it logs has four digits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What all runs of the benchmark share."""

    folder: Path
    model: Path
    train: Path
    held_out: Path
    num_steps: int
    threads: int


def main() -> None:
    options = parse_arguments()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    trl_python = options.trl_python or make_trl_environment(ROOT / ".venv-trl")
    peer = peer_versions(trl_python)
    setting = prepare(folder, options.model, options.steps, options.threads)
    runs: dict[str, list[dict[str, Any]]] = {"trl": [], "ours": []}
    for repeat in range(options.repeats):
        # Whoever comes second finds more of its files in the page cache, and another load of the machine.
        for arm in ("trl", "ours") if repeat % 2 == 0 else ("ours", "trl"):
            run = run_trl(setting, trl_python, repeat) if arm == "trl" else run_ours(setting, repeat)
            runs[arm].append(run)
            print(f"{arm} {repeat + 1} of {options.repeats}: {told(run)}", flush=True)
        if repeat == 0:
            agreement = gate(setting, runs["trl"][0].pop("first_step"))
    rows = compared(runs)
    print(table(rows))
    machine = {"cores": num_cores(), "clock": "wall clock, but for cpu_s"}
    result = {"environment": measured_on(torch.device("cpu")) | machine, "peer": peer}
    result |= {"setting": settings(options), "agreement_trl_ours": agreement, "compared": rows, "runs": runs}
    write_result(options.json, result)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each, in turns")
    parser.add_argument("--steps", type=int, default=8, help="of one run")
    parser.add_argument("--threads", type=int, default=1, help="of torch in the trainer of each")
    parser.add_argument("--model", type=Path, help="folder of megatron_p2o.tiny.policy; default: one is made")
    parser.add_argument("--trl-python", type=Path, help="Python with TRL; default: .venv-trl, made where it is missing")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bench_against_trl", help="for the runs' files")
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args()
    if options.repeats < 1 or options.steps < EVALUATIONS:
        parser.error(f"--repeats must be at least 1, --steps at least {EVALUATIONS}")
    return options


def num_cores() -> str:
    return str(len(os.sched_getaffinity(0)))


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return what a reader of the result must know."""
    return {
        "num_steps": options.steps,
        "threads": options.threads,
        "problems_per_step": PROBLEMS_PER_STEP,
        "group_size": GROUP_SIZE,
        "temperature": TEMPERATURE,
        "max_new_tokens": MAX_NEW_TOKENS,
        "lr": LR,
        "ours_micro_batch_tokens": MICRO_BATCH_TOKENS,
        "trl_samples_per_pass": TRL_SAMPLES_PER_PASS,
    }


def make_trl_environment(folder: Path) -> Path:
    """Return the Python of an environment with TRL, which sees this one's packages below its own."""
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        own = output_of(python, "import site; print(site.getsitepackages()[0])")
        below = [path for path in sys.path if path.endswith("site-packages")]
        (Path(own) / "below.pth").write_text("\n".join(below) + "\n")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *TRL_PACKAGES], check=True)
        (folder / "complete").touch()
    return python


def output_of(python: Path, code: str) -> str:
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def peer_versions(trl_python: Path) -> dict[str, str]:
    """Return the versions of the peer's packages.

    Raises:
        SystemExit: its torch or transformers is not ours.
    """
    names = ("trl", "transformers", "torch", "accelerate", "datasets")
    code = f"from importlib.metadata import version; print(*map(version, {names!r}))"
    theirs = dict(zip(names, output_of(trl_python, code).split(), strict=True))
    for name in ("torch", "transformers"):
        if theirs[name] != version(name):
            raise SystemExit(
                f"{trl_python} has {name} {theirs[name]}, this environment {version(name)}: make them agree"
            )
    return theirs


def prepare(folder: Path, model: Path | None, num_steps: int, threads: int) -> Setting:
    """Write the policy, unless there is one, and the problems: the hard ones, each under one of its key phrases.

    Plainly the tiny policy never solves them and no group has a gradient. With one phrase it solves one in eight.
    """
    if model is None:
        model = folder / "tiny"
        if not (model / "card.json").exists():
            subprocess.run([sys.executable, "-m", "megatron_p2o.tiny.policy", "--out", str(model)], check=True)
    num_trained = num_steps * PROBLEMS_PER_STEP
    return Setting(
        folder=folder,
        model=model / "model",
        train=write_problems(folder / "train.jsonl", "train", num_trained),
        held_out=write_problems(folder / "held_out.jsonl", "held_out", NUM_HELD_OUT),
        num_steps=num_steps,
        threads=threads,
    )


def write_problems(path: Path, split: Split, count: int) -> Path:
    problems = generate_problems({"hard": count}, split, seed=1)
    with path.open("w") as file:
        for problem in problems:
            question = user_message(FAMILIES[problem.source].key_phrases[0], problem.question)
            file.write(json.dumps({"id": problem.id, "question": question, "answer": problem.answer}) + "\n")
    return path


def run_trl(setting: Setting, python: Path, repeat: int) -> dict[str, Any]:
    """Train with TRL; return what `summed` does."""
    folder = new_folder(setting, f"trl-{repeat}")
    (folder / "settings.json").write_text(json.dumps(trl_settings(setting, folder, repeat + 1)))
    command = [str(python), str(ROOT / "tools" / "trl_grpo.py"), "settings.json", "result.json"]
    # PYTHONPATH would put packages before its own.
    begun, taken = timed_run(command, setting, folder, {"PYTHONPATH": ""})
    result = json.loads((folder / "result.json").read_text())
    run = {"start_s": result["began_at"] - begun, **taken, "steps": result["steps"], "accuracy": result["accuracy"]}
    return run | ({"first_step": result["first_step"]} if repeat == 0 else {})


def trl_settings(setting: Setting, folder: Path, seed: int) -> dict[str, Any]:
    """Return the fields of `trl_grpo.Settings`."""
    return {
        "model": str(setting.model),
        "output": str(folder / "output"),
        "train": str(setting.train),
        "evaluation": str(setting.held_out),
        "seed": seed,
        "threads": setting.threads,
        "num_steps": setting.num_steps,
        "problems_per_step": PROBLEMS_PER_STEP,
        "group_size": GROUP_SIZE,
        "samples_per_pass": TRL_SAMPLES_PER_PASS,
        "temperature": TEMPERATURE,
        "max_new_tokens": MAX_NEW_TOKENS,
        "lr": LR,
        "evaluate_every_steps": setting.num_steps // EVALUATIONS,
    }


def run_ours(setting: Setting, repeat: int) -> dict[str, Any]:
    """Train with `p2o train` and evolution off."""
    folder = new_folder(setting, f"ours-{repeat}")
    (folder / "settings.yaml").write_text(our_settings(setting, folder, repeat + 1))
    command = [sys.executable, "-m", "megatron_p2o.cli", "train", "settings.yaml"]
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    begun, taken = timed_run(command, setting, folder, paths)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [our_step(line["metrics"]) for line in lines if "perf/step_s" in line["metrics"]]
    first = next(line for line in lines if "perf/step_s" in line["metrics"])
    began_at = datetime.fromisoformat(first["time"]).timestamp() - first["metrics"]["perf/step_s"]
    accuracy = {str(line["step"]): line["metrics"][HELD_OUT] for line in lines if HELD_OUT in line["metrics"]}
    return {"start_s": began_at - begun, **taken, "steps": steps, "accuracy": accuracy}


HELD_OUT = "eval/held_out/avg"


def our_settings(setting: Setting, folder: Path, seed: int) -> str:
    """Return the settings file, JSON being YAML; what it leaves out has its default."""
    return json.dumps(
        {
            "run": {"name": "run", "directory": str(folder), "seed": seed},
            "model": {"path": str(setting.model), "dtype": "float32"},
            "data": {
                "train": str(setting.train),
                "evaluation": {"held_out": str(setting.held_out)},
                "question_format": "{question}",
                "max_prompt_tokens": 96,
            },
            "rollout": {
                "group_size": GROUP_SIZE,
                "temperature": TEMPERATURE,
                "max_new_tokens": MAX_NEW_TOKENS,
                # A whole step at once, as TRL generates it.
                "max_running_requests": PROBLEMS_PER_STEP * GROUP_SIZE,
            },
            "optimizer": {"lr": LR, "weight_decay": 0.0, "micro_batch_tokens": MICRO_BATCH_TOKENS},
            "schedule": {
                "problems_per_step": PROBLEMS_PER_STEP,
                "problems_per_update": PROBLEMS_PER_STEP,
                "epochs": 1,
                "save_every_steps": 0,
            },
            "evaluation": {
                "every_steps": setting.num_steps // EVALUATIONS,
                "at_start": False,
                "num_samples": 1,
                "temperature": TEMPERATURE,
            },
            "evolution": {"enabled": False},
        }
    )


def our_step(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return a line of metrics.jsonl under the names of `trl_grpo.py`."""
    rollouts = metrics["rollout/rollouts_count"]
    return {
        "rollout_s": metrics["perf/rollout_s"] + metrics["perf/grade_s"],
        "update_s": metrics["perf/train_s"],
        "refresh_s": metrics["perf/refresh_s"],
        "step_s": metrics["perf/step_s"],
        "num_rollouts": rollouts,
        "response_tokens": round(metrics["rollout/response_tokens_mean"] * rollouts),
        "dropped_share": metrics["rollout/dropped_rollouts_share"],
        "reward_mean": metrics["rollout/reward_mean"],
    }


def new_folder(setting: Setting, name: str) -> Path:
    folder = setting.folder / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def timed_run(
    command: Sequence[str], setting: Setting, folder: Path, environment: Mapping[str, str]
) -> tuple[float, dict[str, Any]]:
    """Run a program to its end; return when it began (Unix time), and what it took."""
    threads = {"OMP_NUM_THREADS": str(setting.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    begun = time.time()
    taken = run_measured(command, {**os.environ, **threads, **environment}, folder / "log", folder, TIMEOUT_S)
    return begun, {"wall_s": time.time() - begun, **asdict(taken)}


def gate(setting: Setting, first_step: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return loss and gradient norm of TRL's first step, and of our update on the same rollouts.

    Raises:
        SystemExit: they differ by more than `RELATIVE_GATE`, or TRL asked what we would not ask.
    """
    folder = new_folder(setting, "gate")
    (folder / "settings.yaml").write_text(our_settings(setting, folder, seed=1))
    config = load_config(folder / "settings.yaml")
    renderer = chat_renderer(config)
    problems = task_problems(config.data)[ONLY_TASK]
    ours = {tuple(renderer.render(problem, PLAIN).training_ids.tolist()) for problem in problems}
    strange = [prompt for prompt in first_step["prompts"] if tuple(prompt) not in ours]
    if strange:
        raise SystemExit(f"TRL asked {strange[0]}, which is none of our prompts; nothing is compared")
    advantages = grouped_advantage(
        torch.tensor(first_step["rewards"]),
        torch.arange(len(first_step["rewards"])) // GROUP_SIZE,
        torch.ones(len(first_step["rewards"]), dtype=torch.bool),
        estimator="grpo",
    )
    samples = [
        TrainSample(
            context_ids=np.array(prompt, np.int32),
            response_ids=np.array(response, np.int32),
            advantage=float(advantage),
            sampling_logprobs=np.full(len(response), -1.0, np.float32),
            is_templated=False,
        )
        for prompt, response, advantage in zip(
            first_step["prompts"], first_step["responses"], advantages.tolist(), strict=True
        )
    ]
    with closing(build_policy(config)) as policy:
        report = policy.update(samples, None, sum(len(sample.response_ids) for sample in samples))
    found = {"loss": [first_step["loss"], report.loss], "grad_norm": [first_step["grad_norm"], report.grad_norm]}
    for name, (theirs, our) in found.items():
        if not abs(theirs - our) <= RELATIVE_GATE * abs(theirs):
            raise SystemExit(f"the objectives disagree: {name} is {theirs} by TRL and {our} by us; nothing is compared")
    return found


if __name__ == "__main__":
    main()
