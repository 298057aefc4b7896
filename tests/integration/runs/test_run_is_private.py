"""What others on the machine and in its networks get of a run: nothing. And what its own processes get of secrets."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[3]
RUN_TIMEOUT_S = 1500
END_TIMEOUT_S = 90
POLL_S = 0.1

NUM_EARLY_KILLS = 4
LATEST_KILL_S = 14.0
"""Ranks import for about five seconds, and engines start after ten."""

PF_FORKNOEXEC = 0x40
"""Flag of a process that was forked and has not yet executed a program; from linux/sched.h."""

LONGEST_FORK_S = 30.0
"""A fork that lives for longer is not about to execute anything."""

SECRETS = {
    name: f"planted-{name.lower()}" for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "TEACHER_LOGIN")
}
"""The last is a secret only because `evolution.reflection.api_key_env` says so."""

PARTS = (
    "megatron_p2o.run.train",
    "rollout.inside_sglang.launcher",
    "sglang::scheduler",
    "rewards/workers/fork_server.py",
    "evolve.process.service",
)
"""Parts of command lines that show the processes of a run."""

pytestmark = pytest.mark.slow


def command(tiny: Path, runs: Path) -> list[str]:
    """Return a run of two tensor-parallel ranks: two epochs of two steps, a round of evolution between them."""
    sizes = {"train": 64, "heldout_easy": 8, "heldout_hard": 8}
    problems = {file: runs / f"{file}.jsonl" for file in sizes}
    for file, path in problems.items():
        rows = (tiny / "problems" / f"{file}.jsonl").read_text().splitlines(keepends=True)
        path.write_text("".join(rows[: sizes[file]]))
    overrides = [
        *(f"run.directory={runs}", "run.name=run", f"model.path={tiny}/model", f"data.train={problems['train']}"),
        f"data.evaluation.heldout_easy={problems['heldout_easy']}",
        f"data.evaluation.heldout_hard={problems['heldout_hard']}",
        *("parallel.tensor=2", "schedule.problems_per_step=32", "schedule.problems_per_update=16"),
        *("schedule.epochs=2", "hard.min_problems=8", "evaluation.every_steps=0", "evaluation.at_start=false"),
        "rollout.temperature=1.6",  # so hot that some answers need the symbolic graders
        *("evolution.max_rollouts=200", "evolution.num_lineages=2", "evolution.dev_size=8"),
        *("evolution.plain_control=false", "evolution.reflection.api_key_env=TEACHER_LOGIN"),
    ]
    sets = [argument for override in overrides for argument in ("--set", override)]
    p2o = [sys.executable, "-m", "megatron_p2o.cli"]
    return [*p2o, "train", str(ROOT / "examples" / "tiny_cpu" / "p2o.yaml"), *sets]


def is_starting(process: psutil.Process) -> bool:
    """Return whether a process is about to execute a program: until then all it has is its parent's."""
    try:
        flags = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[6]
    except OSError as error:
        raise psutil.NoSuchProcess(process.pid) from error
    return int(flags) & PF_FORKNOEXEC != 0 and time.time() - process.create_time() < LONGEST_FORK_S


class Watch:
    """What is seen of a process and all that it starts, again and again until it ends."""

    def __init__(self) -> None:
        self.listening: set[tuple[str, str]] = set()
        """Address and command line."""
        self.command_lines: set[str] = set()
        self.secrets_held: dict[str, set[str]] = {}
        """Names of `SECRETS` whose values are in the environment of a child, by its command line."""

    def look(self, parent: psutil.Process) -> None:
        for member in (parent, *parent.children(recursive=True)):
            try:
                is_itself = not is_starting(member)  # before the rest is read: what is a program stays one
                line = " ".join(member.cmdline())
                addresses = [each.laddr.ip for each in member.net_connections("inet") if each.status == "LISTEN"]
                environment = "\0".join(member.environ().values())
            except psutil.Error:  # it ended meanwhile
                continue
            self.command_lines.add(line)
            self.listening |= {(address, line) for address in addresses}
            if member != parent and is_itself:
                held = {name for name, value in SECRETS.items() if value in environment}
                self.secrets_held.setdefault(line, set()).update(held)


@pytest.fixture(scope="module")
def watched(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Watch, Path, str]]:
    """Return what was seen of a run, its folder and what it printed."""
    runs = tmp_path_factory.mktemp("runs")
    watch, log = Watch(), runs / "printed"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command(tiny, runs), cwd=ROOT, env={**os.environ, **SECRETS}, stdout=output, stderr=output, umask=0o022
        )
    deadline = time.monotonic() + RUN_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        watch.look(psutil.Process(process.pid))
        time.sleep(POLL_S)
    process.kill()
    assert process.wait() == 0, log.read_text()[-4000:]
    missing = [part for part in PARTS if not any(part in line for line in watch.command_lines)]
    assert not missing, "these were not seen at work"
    yield watch, runs / "run", log.read_text()


def test_nothing_listens_where_another_machine_could_reach_it(watched: tuple[Watch, Path, str]) -> None:
    watch, _, _ = watched
    assert {address for address, _ in watch.listening} == {"127.0.0.1"}, watch.listening
    assert not [
        line for _, line in watch.listening if "workers/fork_server.py" in line or "evolve.process.service" in line
    ]


def test_no_process_of_a_run_holds_a_secret_that_it_does_not_need(watched: tuple[Watch, Path, str]) -> None:
    watch, _, _ = watched
    assert {line: held for line, held in watch.secrets_held.items() if held} == {}


def test_secrets_are_in_no_command_line_and_no_file(watched: tuple[Watch, Path, str]) -> None:
    watch, run_dir, printed = watched
    texts = [printed, *watch.command_lines]
    texts += [path.read_bytes().decode(errors="replace") for path in run_dir.rglob("*") if path.is_file()]
    assert len(texts) > 20
    assert [name for name, value in SECRETS.items() if any(value in text for text in texts)] == []


def test_what_a_run_writes_is_its_owner_s_alone(watched: tuple[Watch, Path, str]) -> None:
    _, run_dir, _ = watched
    paths = [run_dir, *run_dir.rglob("*")]
    assert {path.suffix for path in paths} >= {".yaml", ".jsonl", ".log", ".json", ".distcp"}
    assert {str(path): oct(path.stat().st_mode) for path in paths if path.stat().st_mode & 0o077} == {}


def marked(mark: str) -> list[psutil.Process]:
    """Return the processes that have inherited `mark`."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("P2O_TEST_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:  # it ended meanwhile, or is not ours
            continue
    return found


def test_a_run_that_is_killed_while_it_starts_leaves_nothing_behind(tiny: Path, tmp_path: Path) -> None:
    rng = random.Random(7)
    for kill in range(NUM_EARLY_KILLS):
        mark = f"{os.getpid()}-{kill}"
        with (tmp_path / f"printed-{kill}").open("wb") as output:
            process = subprocess.Popen(
                command(tiny, tmp_path),
                cwd=ROOT,
                env={**os.environ, "P2O_TEST_MARK": mark},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        deadline = time.monotonic() + RUN_TIMEOUT_S
        while not any("megatron_p2o.run.train" in " ".join(member.cmdline()) for member in marked(mark)):
            assert process.poll() is None and time.monotonic() < deadline, "no rank was started"
            time.sleep(POLL_S)
        time.sleep(LATEST_KILL_S * (kill + rng.random()) / NUM_EARLY_KILLS)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        deadline = time.monotonic() + END_TIMEOUT_S
        while left := marked(mark):
            assert time.monotonic() < deadline, [" ".join(member.cmdline()) for member in left]
            time.sleep(POLL_S)
        assert list((tmp_path / "run").glob("error-rank-*")) == []
