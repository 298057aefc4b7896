"""`sbatch examples/tiny_slurm.sh` on two nodes: stopped before its time limit, robbed of a node, ended by hand."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_p2o.testing.run_files import whole_lines

pytestmark = pytest.mark.slow

WAIT_S = 480
"""Longest wait for an event of the job; on two idle cores each comes within a minute."""

MINUTES, SIGNAL_BEFORE_S = 60, 600
"""The job's time limit, and how long before it Slurm signals; it looks twice a minute."""

NUM_HARD, NUM_EASY = 24, 8
"""Training problems: one step of 32 each epoch, enough of them hard for a round of evolution."""


class Job:
    """A submitted job, its log and its run."""

    def __init__(self, cluster: Any, checkout: Path, job_id: str) -> None:
        self.cluster, self.job_id = cluster, job_id
        self.log_path = checkout / "logs" / f"tiny_slurm-{job_id}.out"
        self.run = checkout / "runs" / "tiny_slurm"

    def log(self) -> str:
        return self.log_path.read_text() if self.log_path.exists() else ""

    def has_ended(self) -> bool:
        return self.cluster.job(self.job_id)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")

    def step(self) -> int:
        """Return the step of the newest checkpoint, 0 before the first."""
        latest = self.run / "checkpoints" / "latest"
        return int(latest.read_text().removeprefix("step-")) if latest.exists() else 0

    def limit_minutes(self, limit: int) -> None:
        """Have the job's time end `limit` minutes from its start."""
        self.cluster.call("scontrol", "update", f"JobId={self.job_id}", f"TimeLimit={limit}")

    def wait_for(self, is_true: Any, what: str) -> None:
        """Wait for something the job does; fail with its log when it ends first."""
        self.cluster.wait_for(lambda: is_true() or self.has_ended(), what, WAIT_S, self.log)
        assert is_true(), f"the job ended before {what}:\n{self.log()}"


@pytest.fixture(scope="module")
def problems(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a training set of 32 of the tiny policy's problems."""
    rows = [json.loads(line) for line in (tiny / "problems" / "train.jsonl").read_text().splitlines()]
    hard = [row for row in rows if row["level"] == "hard"][:NUM_HARD]
    easy = [row for row in rows if row["level"] == "easy"][:NUM_EASY]
    path = tmp_path_factory.mktemp("problems") / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*hard, *easy]))
    return path


@pytest.mark.timeout(3000)  # each of its waits has a limit of its own
def test_a_job_survives_its_time_limit_and_a_lost_node(
    cluster: Any, tiny: Path, problems: Path, checkout: Path
) -> None:
    job = submit(cluster, tiny, problems, checkout)

    job.wait_for(lambda: job.step() > 0, "a checkpoint")
    job.limit_minutes(SIGNAL_BEFORE_S // 60 + 1)
    job.wait_for(lambda: "stop requested" in job.log(), "the signal before the time limit")
    job.limit_minutes(MINUTES)
    job.wait_for(lambda: "queued again" in job.log(), "the job to be queued again")
    saved = job.step()
    assert f"saved at step-{saved:06d}: queued again" in job.log()
    job.wait_for(lambda: job.step() > saved, "the second start to go on from there")
    assert f"on node[1-2], from step-{saved:06d}" in job.log()

    cluster.kill_node("node2")
    job.wait_for(lambda: "Node failure on node2" in job.log(), "the lost node to be named")
    survived = job.step()
    job.wait_for(lambda: job.step() > survived, "the third start to go on from there")
    (nodes,) = re.findall(rf"on node\[(\S+)\], from step-{survived:06d}", job.log())
    assert nodes in ("1,3", "3-4"), "the lost node is not among them"
    job.wait_for(lambda: any_update_applied(job.run), "a round of evolution and an update through its templates")

    (job.run / "stop").touch()
    job.wait_for(lambda: cluster.job(job.job_id)["JobState"] == "COMPLETED", "the job to save and end")
    assert "ended well" in job.log()
    assert cluster.job(job.job_id)["Restarts"] == "2"
    assert_nothing_lost_or_repeated(job)
    cluster.start_node("node2")


def submit(cluster: Any, tiny: Path, problems: Path, checkout: Path) -> Job:
    options = (f"--time={MINUTES}", f"--signal=B:USR1@{SIGNAL_BEFORE_S}", "--parsable")
    # So slowly that problems stay hard, however far a fast machine gets before the signal.
    settings = {"data.train": problems, "schedule.epochs": 1000, "rollout.group_size": 4, "optimizer.lr": 1e-5}
    settings["rollout.num_engines"] = 2  # one on each node
    arguments = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    job_id = cluster.call(
        *("sbatch", *options, "examples/tiny_slurm.sh", *arguments),
        cwd=checkout,
        P2O_TINY_POLICY=str(tiny),
        P2O_HEAD_ADDRESS="127.0.0.1",
        GLOO_SOCKET_IFNAME="lo",
        OMP_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
    ).strip()
    return Job(cluster, checkout, job_id)


def any_update_applied(run: Path) -> bool:
    """Whether a step with templated rollouts changed the weights: only then it has a loss."""
    return any(
        {"rollout/reward_templated", "train/loss"} <= line["metrics"].keys()
        for line in whole_lines(run / "metrics.jsonl")
    )


def assert_nothing_lost_or_repeated(job: Job) -> None:
    steps = [line["step"] for line in lines(job.run / "metrics.jsonl") if "rollout/rollouts_count" in line["metrics"]]
    assert steps == list(range(1, job.step() + 1))
    asked = Counter((line["epoch"], line["problem_id"]) for line in lines(job.run / "hard_samples.jsonl"))
    assert set(asked.values()) == {1} and len(asked) == len(steps) * (NUM_HARD + NUM_EASY)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
