"""Two runs side by side on one machine: the ranks of one are killed, the other is what it should have been."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_p2o.testing.run_files import repeatable_numbers, steps_done

ROOT = Path(__file__).parents[3]
RUN_TIMEOUT_S = 1500
END_TIMEOUT_S = 240
"""Longest end of a run whose rank was killed: its agent alone may take `rank_errors.STOP_TIMEOUT_S`."""

POLL_S = 0.02

AS_TEXT: dict[str, Any] = {"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}

ENGINE, GRADER, EVOLUTION = (
    ("sglang::scheduler", "sglang::detokenizer"),
    "rewards/workers/fork_server.py",
    "evolve.process.service",
)
"""Parts of command lines."""

pytestmark = pytest.mark.slow


def command(tiny: Path, runs: Path, name: str, weight_transfer: str) -> list[str]:
    """Return a run of two tensor-parallel ranks: two epochs of four steps, a round of evolution between them."""
    problems = {file: runs / f"{file}.jsonl" for file in ("train", "heldout_easy", "heldout_hard")}
    for (file, path), num_problems in zip(problems.items(), (64, 8, 8), strict=True):
        rows = (tiny / "problems" / f"{file}.jsonl").read_text().splitlines(keepends=True)
        path.write_text("".join(rows[:num_problems]))
    overrides = [
        *(f"run.directory={runs}", f"run.name={name}", f"model.path={tiny}/model", f"data.train={problems['train']}"),
        f"data.evaluation.heldout_easy={problems['heldout_easy']}",
        f"data.evaluation.heldout_hard={problems['heldout_hard']}",
        *("parallel.tensor=2", f"rollout.weight_transfer={weight_transfer}"),
        *("schedule.problems_per_step=16", "schedule.problems_per_update=16", "schedule.epochs=2"),
        # So hot that easy problems fail now and then: a step whose groups all agree trains nothing.
        *("rollout.temperature=1.6", "optimizer.lr=5e-5", "hard.min_problems=8", "schedule.save_every_steps=1"),
        *("evaluation.every_steps=0", "evaluation.at_start=false", "evaluation.with_best_template=false"),
        # The lock-step rules, because rounds of the others depend on the order of answers.
        *("evolution.rules=reference", "evolution.beside_training=false", "evolution.max_rollouts=100"),
        *("evolution.num_lineages=2", "evolution.dev_size=8", "evolution.plain_control=false"),
    ]
    sets = [argument for override in overrides for argument in ("--set", override)]
    return [
        *(sys.executable, "-m", "megatron_p2o.cli", "train", str(ROOT / "examples" / "tiny_cpu" / "p2o.yaml"), *sets)
    ]


class Run:
    """A run as its user sees it: a command, what it prints, a folder."""

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        self.command, self.folder = command, folder
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, **AS_TEXT, start_new_session=True)

    def wait_for(self, is_reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + RUN_TIMEOUT_S
        while not is_reached():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                pytest.fail(f"ended, or took {RUN_TIMEOUT_S} s, before: {self.process.communicate()}")
            time.sleep(POLL_S)

    def end(self, timeout_s: float = RUN_TIMEOUT_S) -> tuple[int, str, str]:
        """Return exit status, standard output and standard error."""
        output, errors = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, output, errors

    def ranks(self) -> dict[int, psutil.Process]:
        children = psutil.Process(self.process.pid).children()
        ranks = [child for child in children if "megatron_p2o.run.train" in child.cmdline()]
        return {int(rank.environ()["RANK"]): rank for rank in ranks}


def shared_memory(processes: Sequence[psutil.Process]) -> set[int]:
    """Return the inodes in /dev/shm that processes map, whatever they called them meanwhile."""
    maps = [line.split() for member in processes for line in Path(f"/proc/{member.pid}/maps").read_text().splitlines()]
    return {int(fields[4]) for fields in maps if len(fields) > 5 and fields[5].startswith("/dev/shm/")}


def errors_told(printed: str) -> list[str]:
    """Return the lines in which `p2o` says what went wrong, whichever rank printed them."""
    return [line for line in printed.splitlines() if "p2o: " in line]


def kill_rank(run: Run, rank: psutil.Process, beside: Sequence[str]) -> str:
    """Kill a rank, check that the run ends with nothing left of it, and return what it printed as error.

    `beside`: parts of the command lines of processes that must have run beside the ranks.
    """
    family = psutil.Process(run.process.pid).children(recursive=True)
    command_lines = "\n".join(" ".join(member.cmdline()) for member in family)
    assert not [part for part in beside if part not in command_lines], command_lines
    memory = shared_memory(family)
    scratch = {Path(member.environ()["TMPDIR"]) for member in family if "TMPDIR" in member.environ()}
    engine_scratch = {path for path in scratch if path.name.startswith("p2o-engine-")}
    assert memory and engine_scratch
    rank.kill()
    status, _, errors = run.end(END_TIMEOUT_S)
    assert status == 1
    _, alive = psutil.wait_procs(family, timeout=END_TIMEOUT_S)
    assert not alive
    assert not memory & {entry.inode() for entry in os.scandir("/dev/shm")}
    assert not [path for path in engine_scratch if path.exists()]
    return errors


def test_killed_ranks_cost_their_own_run_a_restart_and_nothing_else(tiny: Path, tmp_path: Path) -> None:
    # What the engines serve does not depend on the way it took.
    ways = {"whole": "host", "killed": "device"}
    whole, killed = (Run(command(tiny, tmp_path, name, way), tmp_path / name) for name, way in ways.items())

    killed.wait_for((killed.folder / "checkpoints" / "step-000001").exists)
    victim = killed.ranks()[1]
    idle_s = victim.cpu_times().user
    killed.wait_for(lambda: victim.cpu_times().user > idle_s + 0.05)  # it only works when the policy does
    told = errors_told(kill_rank(killed, victim, beside=[*ENGINE, GRADER]))
    assert told[0].startswith("p2o: rank 1 on ") and "was ended by SIGKILL; the run is in" in told[0]
    assert len(told) == 2, "its peer's broken connection is no error of its own"

    journal = killed.folder / "evolution" / "journal-0000.jsonl"
    assert not journal.exists()

    killed.start()
    killed.wait_for(lambda: len(killed.ranks()) == 2)
    intruder = subprocess.run([*killed.command, "--set", "optimizer.lr=1"], **AS_TEXT, timeout=END_TIMEOUT_S)
    assert intruder.returncode == 2
    assert f"{killed.folder} is in use by process {killed.process.pid} on " in intruder.stderr
    killed.wait_for(lambda: journal.exists() and journal.stat().st_size > 5_000)  # a round has begun
    told = errors_told(kill_rank(killed, killed.ranks()[0], beside=[*ENGINE, EVOLUTION]))
    assert told[0].startswith("p2o: rank 0 on ") and len(told) == 2

    killed.start()
    for run in (killed, whole):
        status, _, errors = run.end()
        assert status == 0, errors
    key = "mismatch/logprob_abs_max"
    mismatches = [step[key] for step in steps_done(whole.folder) if key in step]
    assert mismatches and max(mismatches) < 1e-4
    assert repeatable_numbers(killed.folder) == repeatable_numbers(whole.folder)
    for name in ("hard_samples.jsonl", "templates/library-1.json"):
        assert (killed.folder / name).read_text() == (whole.folder / name).read_text(), name
