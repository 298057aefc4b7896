"""Runs what an experiment lacks: each run a `p2o train` of its own, here one after the other, or as jobs on Slurm."""

import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from megatron_p2o.config.read import dump_config, load_config
from megatron_p2o.config.source import ConfigError
from megatron_p2o.experiment.plan import Experiment, PlannedRun
from megatron_p2o.files import read_json_object, write_whole
from megatron_p2o.run_folder.made_with import settings_of
from megatron_p2o.run_folder.results import RESULTS_FILE, limit_reached, run_end
from megatron_p2o.run_folder.resume_effects import effect_of
from megatron_p2o.terminal import say

LENGTHS = tuple(f"schedule.{name}" for name in ("epochs", "max_steps", "max_tokens", "max_hours"))
"""Settings that only say how long a run is: a finished run may be made longer."""

UNFIXED = (*LENGTHS, "model.template_date")

NUM_LINES_SHOWN = 5
"""Last lines of a failed run's log that are shown."""

END_TIMEOUT_S = 180.0
"""For a run to end after SIGTERM; it gives its own processes a minute before it kills them."""

logger = logging.getLogger(__name__)


def is_finished(run: PlannedRun) -> bool:
    """Return whether a run has its results, for the length that it has now."""
    end = run_end(run.folder)
    if end is None:
        return False
    schedule = run.config.schedule
    if limit_reached(schedule, end.num_steps, end.compute):
        return True
    return read_json_object(run.folder / RESULTS_FILE).get("ended_by") == f"schedule.epochs={schedule.epochs}"


def write_settings(experiment: Experiment) -> None:
    """Write the settings of each run, from which `p2o train` starts it.

    Raises:
        ConfigError: a run that has begun was made with other settings.
    """
    problems = [sentence for run in experiment.runs for sentence in _changed(run)]
    if problems:
        raise ConfigError(problems)
    for run in experiment.runs:
        write_whole(settings_file(experiment, run), dump_config(run.config))


def settings_file(experiment: Experiment, run: PlannedRun) -> Path:
    """Return where the settings of a run stand."""
    return experiment.folder / "settings" / f"{run.name}.yaml"


def _changed(run: PlannedRun) -> list[str]:
    """Return a sentence for each setting by which the results of a run that has begun would differ."""
    recorded = run.folder / "config.yaml"
    if not recorded.exists():
        return []
    before, now = settings_of(load_config(recorded)), settings_of(run.config)
    names = [
        name
        for name in dict.fromkeys((*before, *now))
        if before.get(name) != now.get(name) and name not in UNFIXED and effect_of(name) != "none"
    ]
    return [
        f"{run.folder} was made with {name}={before.get(name)}, the experiment says {now.get(name)}: put it back, or "
        f"give the arm another name"
        for name in names
    ]


def missing_runs(experiment: Experiment) -> list[PlannedRun]:
    """Return the runs that are not finished, all arms of a seed before the next seed.

    So what is finished at any time compares the arms over the same seeds.
    """
    seeds = list(dict.fromkeys(run.seed for run in experiment.runs))
    return sorted((run for run in experiment.runs if not is_finished(run)), key=lambda run: seeds.index(run.seed))


def run_missing(experiment: Experiment) -> list[PlannedRun]:
    """Run `missing_runs`, one after the other, and return those that failed.

    SIGUSR1 makes the run that trains save and end, and starts no other. SIGTERM ends it and this process.
    """
    failed: list[PlannedRun] = []
    missing = missing_runs(experiment)
    say(f"{len(experiment.runs) - len(missing)} of {len(experiment.runs)} runs are finished")
    with Child() as child:
        for number, run in enumerate(missing, start=1):
            if child.is_stopping:
                say(f"stopped: {len(missing) - number + 1} runs are left; the same command goes on")
                break
            log = experiment.folder / "logs" / f"{run.name}.log"
            say(f"run {number} of {len(missing)}: {run.name}, log in {log}")
            status = child.train(settings_file(experiment, run), log)
            if status != 0:
                failed.append(run)
                lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-NUM_LINES_SHOWN:]
                say("\n  ".join([f"{run.name} failed with status {status}; its log ends:", *lines]), sys.stderr)
    return failed


class Child:
    """Starts `p2o train`, passes SIGUSR1 on to it, and ends it at SIGTERM with the process. Used in `with`."""

    def __init__(self) -> None:
        self._received: set[int] = set()
        self._acts = False
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def is_stopping(self) -> bool:
        """Whether SIGUSR1 has come."""
        return signal.SIGUSR1 in self._received

    def train(self, settings: Path, log: Path) -> int:
        """Train a run to its end and return the exit status. What it prints is appended to `log`."""
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "megatron_p2o.cli", "train", str(settings)]
        self._act()
        self._acts = False  # until there is a process to act on
        with log.open("ab") as said:
            self._process = process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
            try:
                self._acts = True
                self._act()
                return process.wait()
            finally:
                self._acts = False
                self._process = None
                _end(process)
                self._acts = True

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received.add(number)
        if self._acts:
            self._act()

    def _act(self) -> None:
        if signal.SIGTERM in self._received:
            raise SystemExit(128 + signal.SIGTERM)
        if self.is_stopping and self._process is not None:
            self._process.send_signal(signal.SIGUSR1)

    def __enter__(self) -> "Child":
        self._acts = True
        self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGUSR1, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._act()


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a run that still trains: an interrupt or SIGTERM came here, which it may not have got."""
    if process.poll() is not None:
        return
    say("the run that trains is ended; the same command goes on with it")
    process.terminate()
    try:
        process.wait(END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def job_lines(experiment: Experiment, script: Path) -> list[list[str]]:
    """Return the `sbatch` command of each run that is not finished: one job for each, called after it.

    `script` is a job script that hands its arguments on to examples/slurm/launch.sh, as examples/slurm/compare.sh does.
    A job of that name goes on where an earlier one stopped.
    """
    return [
        [
            *("sbatch", f"--job-name={run.name}", f"--export=ALL,P2O_RUNS={experiment.folder}"),
            *(str(script), str(settings_file(experiment, run))),
        ]
        for run in missing_runs(experiment)
    ]


def submit(commands: Sequence[Sequence[str]], *, is_printed_only: bool) -> None:
    """Print the commands of jobs, and give them to Slurm unless they are only to be printed.

    Raises:
        ValueError: Slurm refuses one; those before it are submitted.
    """
    for command in commands:
        say(shlex.join(command))
        if is_printed_only:
            continue
        try:
            subprocess.run(command, check=True, env=os.environ)
        except FileNotFoundError as error:
            raise ValueError("sbatch is not here: submit on a node of the cluster, or leave out --submit") from error
        except subprocess.CalledProcessError as error:
            raise ValueError(f"Slurm refused {shlex.join(command)}: see its message above") from error
