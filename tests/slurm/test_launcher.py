"""What launch.sh does around `p2o`, on two nodes, with a stand-in for `p2o` that ends as each test wants."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_p2o.machine.nodes import first_host

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow

Submit = Callable[..., str]

SLEEPS = (
    "up=up-$SLURM_RESTART_COUNT; [ $SLURMD_NODENAME = {} ] && touch $up && exec sleep infinity\n"
    "until [ -e $up ]; do sleep 0.1; done"
)
"""What has a node sleep, and the other go on then. A task that has not begun yet gets no signal: Slurm waits for it."""

JOB_TIMEOUT_S = 300
"""Longest life of a job of stand-ins, which may be queued again once: some 25 s on two idle cores."""

TRAIN = "config.yaml --set optimizer.lr=1e-3"
EVALUATE = "eval runs/a/checkpoints/best --benchmark small=small.jsonl"
"""What a job script gives the launcher."""


@pytest.fixture
def submit(cluster: Any, checkout: Path) -> Submit:
    """Return a function that runs a job with `p2o` replaced by a script, waits for it and returns its log."""

    def run(stand_in: str, arguments: str = TRAIN, *own: str, **variables: str) -> str:
        programs = checkout / "bin"
        programs.mkdir(exist_ok=True)
        (programs / "p2o").write_text(f"#!/bin/bash\n{stand_in}\n")
        (programs / "p2o").chmod(0o755)
        (checkout / "job.sh").write_text(f"#!/bin/bash\nexec bash examples/slurm/launch.sh {arguments}\n")
        path = f"{programs}:{cluster.environment['PATH']}"
        options = ("--job-name=first", "--nodes=2", "--gpus-per-node=8", "--requeue", "--open-mode=append", *own)
        command = ("sbatch", *options, "--output=job.log", "--parsable", "job.sh")
        log = checkout / "job.log"
        job_id = cluster.call(*command, cwd=checkout, PATH=path, **variables).strip()
        # `sbatch --wait` would look after 2, 10 and 42 seconds.
        cluster.wait_for(
            lambda: not cluster.call("squeue", "-h", "-j", job_id), "the end", JOB_TIMEOUT_S, log.read_text
        )
        return log.read_text()

    return run


def test_every_node_trains_once_after_its_doctor(submit: Submit, checkout: Path) -> None:
    log = submit('echo "$SLURMD_NODENAME $*" >> calls.txt; test -n "$TRITON_CACHE_DIR"')
    assert "ended well" in log
    calls = sorted((checkout / "calls.txt").read_text().splitlines())
    settings = "config.yaml --set optimizer.lr=1e-3 --set run.directory=runs --set run.name=first"
    train, doctor = f"train {settings}", f"doctor --strict --gpus 8 {settings}"
    assert calls == [f"{node} {what}" for node in ("node1", "node2") for what in (doctor, train)]


def test_a_node_whose_doctor_complains_ends_the_job_by_name(submit: Submit, checkout: Path) -> None:
    log = submit(
        "[ $1 = train ] && touch trained-$SLURMD_NODENAME && sleep infinity\n"
        "[ $SLURMD_NODENAME = node1 ] && touch up && exit\n"
        "until [ -e up ]; do sleep 0.1; done; exit 1"
    )
    assert "node2: p2o doctor found something missing" in log
    assert "failed with status" in log
    assert not (checkout / "trained-node2").exists()


def test_a_failing_node_is_named_and_its_last_words_are_shown(submit: Submit) -> None:
    log = submit(f"[ $1 = doctor ] && exit; {SLEEPS.format('node1')}\necho rank 1: disk full; exit 3")
    assert "node2: task 1: Exited with exit code 3" in log
    assert re.search(r"==> logs/first-\d+-restart0-1-\S+.log <==\nrank 1: disk full\n", log)
    assert "failed with status" in log and "queued again" not in log


def test_a_failure_after_a_new_checkpoint_queues_the_job_again(submit: Submit) -> None:
    log = submit(
        f"[ $1 = doctor ] && exit; {SLEEPS.format('node2')}\n"
        "mkdir -p runs/first/checkpoints\n"
        "[ -e runs/first/checkpoints/latest ] && exit 3\n"
        "echo step-000007 > runs/first/checkpoints/latest; exit 3"
    )
    assert "from the start" in log and "from step-000007" in log
    assert log.count("a checkpoint was written since the start: queued again") == 1


def test_an_evaluation_goes_on_after_its_time_limit_and_not_where_it_answers_nothing(
    submit: Submit, checkout: Path
) -> None:
    log = submit(
        "[ $1 = doctor ] && exit\n"
        'echo "$SLURMD_NODENAME $*" >> calls-$SLURM_RESTART_COUNT.txt\n'
        "[ $SLURMD_NODENAME = node2 ] && exec sleep infinity\n"
        '[ "$SLURM_RESTART_COUNT" = 1 ] && exit 3\n'
        "until grep -q node2 calls-.txt; do sleep 0.1; done\n"
        "mkdir -p runs/first/responses && echo {} >> runs/first/responses/small.jsonl\n"
        "scancel --batch --signal=USR1 $SLURM_JOB_ID; exec sleep infinity",
        EVALUATE,
    )
    assert re.search(r"from the start(.|\n)*stop requested(.|\n)*a response was written since the start: queued", log)
    assert re.search(r"from 1 lines of responses(.|\n)*failed with status \d+\n$", log)
    calls = [sorted((checkout / f"calls-{count}.txt").read_text().splitlines()) for count in ("", 1)]
    command = "eval runs/a/checkpoints/best --benchmark small=small.jsonl --output runs/first"
    assert calls[0] == [f"node1 {command}", f"node2 {command}"]
    assert calls[1][0] == f"node1 {command}", "it may end the step before the other node has come so far"


def test_a_run_whose_steps_are_long_is_asked_to_stop_before_its_time_is_short(submit: Submit, checkout: Path) -> None:
    log = submit(
        "[ $1 = doctor ] && exit\n"
        '[ "$SLURM_RESTART_COUNT" = 1 ] || [ $SLURMD_NODENAME != node1 ] && exit 0\n'
        "mkdir -p runs/first\n"
        'echo \'{"metrics": {"perf/step_s":900.5, "perf/evolution_s":1200.25}}\' > runs/first/metrics.jsonl\n'
        "until [ -e runs/first/stop ]; do sleep 0.1; done; rm -f runs/first/stop",
        TRAIN,
        "--time=45",
        P2O_TIME_POLL_S="1",
    )
    # 2 x 901 + 1201 + 60 s, more than 45 minutes leave.
    assert re.search(
        r"\d+ s are left, the run may need 3063 s to come to a stop(.|\n)*stop requested(.|\n)*queued again", log
    )
    assert log.rstrip().endswith("ended well")


def test_an_image_and_its_mounts_reach_pyxis(submit: Submit, cluster: Any, checkout: Path) -> None:
    if not (cluster.folder / "pyxis_stub.so").exists():
        pytest.skip("needs a C compiler and libslurm-dev for the stub of pyxis")
    elsewhere = checkout / "elsewhere"
    # As the Hugging Face cache lays a model out: files that are links.
    blobs, snapshot, shared = (checkout.parent / f"{checkout.name}-{name}" for name in ("blobs", "snapshot", "data"))
    for folder in (blobs, snapshot, shared, checkout / "models"):
        folder.mkdir()
    (blobs / "1f").touch()
    (snapshot / "config.json").symlink_to(blobs / "1f")
    (checkout / "models" / "Qwen3-4B").symlink_to(snapshot)
    (checkout / "data").symlink_to(shared)
    (checkout / "models" / "gone").symlink_to(checkout / "nowhere")
    stand_in = 'echo "$PYXIS_STUB_0 $PYXIS_STUB_1 $PYXIS_STUB_2 $PYTHONPATH" > seen-$SLURMD_NODENAME'
    log = submit(stand_in, P2O_IMAGE="p2o:gpu", P2O_RUNS=str(elsewhere), P2O_MOUNTS="/data:/data:ro")
    assert "ended well" in log
    folders = [checkout, elsewhere, *sorted((blobs, shared, snapshot))]
    mounts = ",".join([*(f"{folder}:{folder}" for folder in folders), "/data:/data:ro"])
    image, mounted, workdir, path = (checkout / "seen-node2").read_text().split()
    assert (image, mounted, workdir) == ("p2o:gpu", mounts, str(checkout))
    assert path.split(":")[:2] == [str(checkout), f"{checkout}/kernels"], "the mounted code runs, not the image's"


def test_an_image_of_apptainer_runs_every_node_and_sees_the_mounts(submit: Submit, checkout: Path) -> None:
    shared = checkout.parent / f"{checkout.name}-models"
    shared.mkdir()
    (checkout / "models").symlink_to(shared)
    (checkout / "bin").mkdir()
    # What comes behind the image is what runs inside.
    behind_the_image = 'while [[ $1 != *.sif ]]; do shift; done; shift; exec "$@"'
    stub = f'#!/bin/bash\necho "$*" >> apptainer-$SLURMD_NODENAME\n{behind_the_image}\n'
    (checkout / "bin" / "apptainer").write_text(stub)
    (checkout / "bin" / "apptainer").chmod(0o755)
    log = submit('echo "$1 $PYTHONPATH" >> seen-$SLURMD_NODENAME', P2O_IMAGE="/images/p2o.sif", P2O_MOUNTS="/a:/b")
    assert "ended well" in log
    mounts = ",".join([*(f"{folder}:{folder}" for folder in (checkout, checkout / "runs", shared)), "/a:/b"])
    for node in ("node1", "node2"):
        command = (checkout / f"apptainer-{node}").read_text()
        assert command.startswith(f"exec --nv --pwd {checkout} --bind {mounts} /images/p2o.sif bash ")
        calls = [line.split() for line in (checkout / f"seen-{node}").read_text().splitlines()]
        assert [call[0] for call in calls] == ["doctor", "train"]
        assert calls[1][1].split(":")[:2] == [str(checkout), f"{checkout}/kernels"]


EXPERIMENT = """
settings: {model: {path: model}, data: {train: train.jsonl}}
seeds: [1, 2]
budget: {max_tokens: 1000}
arms: {grpo: {evolution: {enabled: false}}, p2o: {}}
"""


def test_each_missing_run_of_an_experiment_is_a_job_called_after_it(cluster: Any, checkout: Path) -> None:
    (checkout / "small.yaml").write_text(EXPERIMENT)
    programs = checkout / "bin"
    programs.mkdir()
    (programs / "p2o").write_text('#!/bin/bash\n[ $1 = doctor ] || echo "$*" >> calls.txt\n')
    (programs / "p2o").chmod(0o755)
    compare = (sys.executable, "-m", "megatron_p2o.cli", "compare", "small.yaml")
    printed = cluster.call(*compare, "--sbatch", "examples/slurm/compare.sh", cwd=checkout, PYTHONPATH=str(ROOT))
    assert printed.count("sbatch --job-name=") == 4 and not cluster.call("squeue", "-h")

    submitted = cluster.call(
        *(*compare, "--sbatch", "examples/slurm/compare.sh", "--arm", "grpo", "--submit"),
        cwd=checkout,
        PYTHONPATH=str(ROOT),
        PATH=f"{programs}:{cluster.environment['PATH']}",
    )
    job_ids = re.findall(r"Submitted batch job (\d+)", submitted)
    cluster.wait_for(lambda: not cluster.call("squeue", "-h"), "the jobs to end", JOB_TIMEOUT_S)
    names = {cluster.job(job_id)["JobName"] for job_id in job_ids}
    assert names == {"grpo-seed1", "grpo-seed2"} and {cluster.job(each)["JobState"] for each in job_ids} == {
        "COMPLETED"
    }
    folder = "runs/small"
    assert sorted((checkout / "calls.txt").read_text().splitlines()) == [
        f"train {folder}/settings/{name}.yaml --set run.directory={folder} --set run.name={name}"
        for name in sorted(names)
    ]


def test_our_reading_of_node_lists_is_that_of_scontrol(cluster: Any) -> None:
    for node_list in ("node1", "node[2-3]", "rack[1-2]-n[007-009,12],login", "a,b[1-2]", "gpu-b200-[010-011]"):
        hosts = cluster.call("scontrol", "show", "hostnames", node_list).split()
        assert first_host(node_list) == hosts[0]
