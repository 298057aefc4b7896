"""A run that is killed and resumed ends with the numbers of one that was not, to the last bit.

One stop and two kills in the ordinary suite; P2O_NUM_KILLS=20 gives each phase several and takes a quarter of an hour.
"""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_p2o.run_folder.state import read_state
from megatron_p2o.testing.run_files import repeatable_numbers, steps_done, whole_lines

ROOT = Path(__file__).parents[3]
RUN_TIMEOUT_S = 1500
POLL_S = 0.005

NUM_KILLS = int(os.environ.get("P2O_NUM_KILLS", "2"))

NUM_EPOCHS = max(2, NUM_KILLS // 2)
"""So that most kills find a step that no kill has seen before."""

PHASES = ("checkpoint", "rollout", "evolution", "train", "refresh", "grade")
"""In the order in which kills go through them: the first two are those of the ordinary suite."""

STEP_ORDER = ("rollout", "grade", "logprobs", "train", "refresh")
"""How the phases follow one another in a step; the fused LM head's forward pass belongs to `train`."""

pytestmark = pytest.mark.slow


def command(tiny: Path, runs: Path, name: str) -> list[str]:
    """Return a run of epochs of three or four steps, by a curriculum, saved at every step, with rounds between them."""
    sizes = {"train": 96, "heldout_easy": 8, "heldout_hard": 8}
    problems = {file: runs / f"{file}.jsonl" for file in sizes}
    for file, path in problems.items():
        rows = (tiny / "problems" / f"{file}.jsonl").read_text().splitlines(keepends=True)
        path.write_text("".join(rows[: sizes[file]]))
    overrides = [
        *(f"run.directory={runs}", f"run.name={name}", f"model.path={tiny}/model"),
        f"data.train={problems['train']}",
        f"data.evaluation.heldout_easy={problems['heldout_easy']}",
        f"data.evaluation.heldout_hard={problems['heldout_hard']}",
        *("schedule.problems_per_step=24", "schedule.problems_per_update=12", f"schedule.epochs={NUM_EPOCHS}"),
        # At least three quarters of the 96 problems: three steps.
        *("data.curriculum=unsolved", "data.curriculum_min_weight=0.75"),
        # Slow learning: hard problems are left for every round.
        *("hard.min_problems=12", "evolution.dev_size=16", "optimizer.lr=5e-5"),
        *("schedule.save_every_steps=1", "evaluation.every_steps=0", "evaluation.at_start=false"),
        # What can be lent is lent whenever a checkpoint is written, and when a kill comes outside an update.
        "optimizer.lend=all",
        # Rounds that depend on the order of answers cannot be repeated; those of the lock-step rules can.
        *("evolution.rules=reference", "evolution.beside_training=false", "evolution.max_rollouts=300"),
        *("evolution.num_lineages=2", "evolution.plain_control=false"),
    ]
    sets = [argument for override in overrides for argument in ("--set", override)]
    p2o = [sys.executable, "-m", "megatron_p2o.cli"]
    return [*p2o, "train", str(ROOT / "examples" / "tiny_cpu" / "p2o.yaml"), *sets]


def seconds_into_step(phase: str, seconds: dict[str, float], fraction: float) -> float:
    """Return when a phase is `fraction` over, counted from the end of the step before."""
    before = itertools.takewhile(lambda name: name != phase, STEP_ORDER)
    start = sum(seconds.get(f"perf/{name}_s", 0.0) for name in before)
    return start + fraction * seconds.get(f"perf/{phase}_s", 0.0)


def journal_bytes(run_dir: Path) -> int:
    """Return how much has been written of all rounds."""
    return sum(path.stat().st_size for path in (run_dir / "evolution").glob("journal-*.jsonl"))


def reached(phase: str, run_dir: Path, seconds: dict[str, float], rng: random.Random) -> Callable[[], bool]:
    """Return a function that says whether a run that is watched from outside is in the middle of `phase`."""
    if phase == "evolution":
        wanted = journal_bytes(run_dir) + rng.randrange(1_000, 40_000)
        return lambda: journal_bytes(run_dir) > wanted
    if phase == "checkpoint":
        depth = rng.choice(("run_state.json", "policy/common.pt", "policy/__0_0.distcp", "policy/.metadata"))
        present = {path.name for path in (run_dir / "checkpoints").glob(".partial-*")}
        return lambda: any(
            path.name not in present and (path / depth).exists()
            for path in (run_dir / "checkpoints").glob(".partial-*")
        )
    num_steps = len(steps_done(run_dir))
    delay_s = seconds_into_step(phase, seconds, rng.uniform(0.1, 0.9))
    ended_at: list[float] = []

    def is_reached() -> bool:
        # Lines of steps that a kill had undone are counted until the resumed run has taken them back.
        if not ended_at and len(steps_done(run_dir)) > num_steps:
            ended_at.append(time.monotonic())
        return bool(ended_at) and time.monotonic() > ended_at[0] + delay_s

    return is_reached


def run_until(
    command: list[str], is_reached: Callable[[], bool], log: Path, number: signal.Signals = signal.SIGKILL
) -> bool:
    """Start a run and signal it once `is_reached`, then wait for it; return False when it ended before.

    After SIGUSR1 it must end well.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
    deadline = time.monotonic() + RUN_TIMEOUT_S
    while not is_reached():
        if process.poll() is not None:
            assert process.returncode == 0, log.read_text()[-4000:]
            return False
        if time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"the moment of the kill did not come in {RUN_TIMEOUT_S} s:\n{log.read_text()[-4000:]}")
        time.sleep(POLL_S)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)  # after SIGKILL the kernel kills the rank, and what that started ends by itself
    is_stop = number == signal.SIGUSR1
    assert process.wait(120) == (0 if is_stop else -number), log.read_text()[-4000:]
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    return True


def test_killed_runs_lose_and_repeat_nothing(tiny: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert not run_until(command(tiny, tmp_path, "whole"), lambda: False, tmp_path / "whole.log")
    rng = random.Random(5)

    # The stop, in the middle of a round: the checkpoint is of the epoch that the round ends.
    in_evolution = reached("evolution", killed, {}, rng)
    assert run_until(command(tiny, tmp_path, "killed"), in_evolution, tmp_path / "killed.log", signal.SIGUSR1)
    state = read_state(killed / "checkpoints" / "step-000004" / "run_state.json")
    assert (state.epoch, state.batch, state.library_version) == (0, 4, 0)
    assert not (killed / "templates" / "library-1.json").exists()

    kills: Counter[str] = Counter()
    phases = itertools.cycle(PHASES)
    while kills.total() < NUM_KILLS:
        phase = next(phases)
        of_whole = steps_done(whole)
        seconds = of_whole[min(len(of_whole) - 1, len(steps_done(killed)))]
        moment = reached(phase, killed, seconds, rng)
        if not run_until(command(tiny, tmp_path, "killed"), moment, tmp_path / "killed.log"):
            break
        kills[phase] += 1
        print(f"killed in {phase} after step {len(steps_done(killed))}", flush=True)
    assert not run_until(command(tiny, tmp_path, "killed"), lambda: False, tmp_path / "killed.log")
    print(dict(kills))
    assert kills.total() >= min(2, NUM_KILLS)

    assert repeatable_numbers(killed) == repeatable_numbers(whole)
    for name in ("hard_samples.jsonl", *(f"templates/{path.name}" for path in (whole / "templates").iterdir())):
        assert (killed / name).read_text() == (whole / name).read_text(), name
    for path in sorted((whole / "rollouts").glob("step-*.jsonl")):
        assert (killed / "rollouts" / path.name).read_text() == path.read_text(), path.name
    asked = Counter((entry["epoch"], entry["problem_id"]) for entry in whole_lines(killed / "hard_samples.jsonl"))
    assert set(asked.values()) == {1}
    assert Counter(epoch for epoch, _ in asked)[1] < 96, "the curriculum has left some out"
    assert sorted(path.name for path in (killed / "checkpoints").iterdir() if path.name[0] == ".") == []
