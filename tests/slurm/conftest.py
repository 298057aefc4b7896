"""A Slurm cluster on this machine: munge, slurmctld and a slurmd per node, all private to the tests."""

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
NODES = ("node1", "node2", "node3", "node4")
"""Four, so that the largest example fits; what is run takes the first two."""

NEEDED = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}
"""Program to its Debian package."""

COMMAND_TIMEOUT_S = 180
START_TIMEOUT_S = 120
POLL_S = 0.5

CONFIGURATION = """
ClusterName=p2o
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=16
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_min_interval=100000,sched_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldPort={first_port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool/%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
MessageTimeout=60
SlurmctldTimeout=60
SlurmdTimeout=30
KillWait=5
MinJobAge=300
JobRequeue=1
GresTypes=gpu
PlugStackConfig={folder}/plugstack.conf
"""
"""A slurmd that takes longer than `cred_expire` refuses a job step; a job that is queued again waits as long."""

NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=4000 Gres=gpu:8\n"
PARTITION = "PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO\n"


def wait_for(
    is_true: Callable[[], object], what: str, timeout_s: float = START_TIMEOUT_S, log: Callable[[], str] = str
) -> None:
    """Return when `is_true()`; fail the test with `log()` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not is_true():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout_s:g} s for {what}\n{log()}")
        time.sleep(POLL_S)


def free_port_block(size: int) -> int:
    """Return the first of `size` consecutive ports that nobody listens on."""
    for first in range(16800, 19000, size):
        holders: Sequence[socket.socket] = [socket.socket() for _ in range(size)]
        try:
            for offset, holder in enumerate(holders):
                holder.bind(("127.0.0.1", first + offset))
        except OSError:
            continue
        finally:
            for holder in holders:
                holder.close()
        return first
    pytest.fail("no free ports between 16800 and 19000")


class Cluster:
    """The daemons of a cluster and its clients' commands. A node is a slurmd with a name and a port of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        # Where the tests themselves are a Slurm job, its variables would be taken for ours.
        for name in [name for name in self.environment if name.startswith(("SLURM_", "SBATCH_", "SRUN_"))]:
            if name != "SLURM_CONF":
                del self.environment[name]
        self.environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])
        self._daemons: dict[str, psutil.Process] = {}

    wait_for = staticmethod(wait_for)

    def start(self) -> None:
        self._write_configuration()
        munge = {name: f"{self.folder}/munge.{name}" for name in ("socket", "pid", "log", "seed")}
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        self.call(
            *("munged", "--force", f"--key-file={key}", f"--socket={munge['socket']}", f"--pid-file={munge['pid']}"),
            *(f"--log-file={munge['log']}", f"--seed-file={munge['seed']}"),
        )
        self._adopt("munged", munge["pid"])
        self.call("slurmctld")
        self._adopt("slurmctld", self.folder / "slurmctld.pid")
        for node in NODES:
            self.start_node(node)
        wait_for(lambda: self.call("sinfo", "-h", "-N", "-t", "idle").count("node") == len(NODES), "idle nodes")

    def start_node(self, node: str) -> None:
        self.call("slurmd", "-N", node)
        self._adopt(node, self.folder / f"slurmd.{node}.pid")

    def kill_node(self, node: str) -> None:
        """End a node as a power failure would: its slurmd and everything that runs for jobs on it, at once."""
        of_slurm, of_jobs = [self._daemons[node]], list[psutil.Process]()
        for process in psutil.process_iter():
            try:
                environment = process.environ()
                is_ours = environment.get("SLURM_CONF") == self.environment["SLURM_CONF"]
                if is_ours and environment.get("SLURMD_NODENAME") == node:
                    of_jobs.append(process)
                    of_slurm += [parent for parent in process.parents() if parent.name() == "slurmstepd"]
            except (psutil.NoSuchProcess, psutil.AccessDenied):  # ended meanwhile; not to be looked at, so not ours
                continue
        # Slurm's own first: they would tell of the tasks that end.
        for victim in dict.fromkeys([*of_slurm, *of_jobs]):
            try:
                victim.kill()
            except psutil.NoSuchProcess:
                continue
        del self._daemons[node]
        (self.folder / f"slurmd.{node}.pid").unlink(missing_ok=True)

    def stop(self) -> None:
        try:
            self.cancel_all()
        finally:
            daemons = list(reversed(self._daemons.values()))
            for daemon in daemons:
                daemon.send_signal(signal.SIGTERM)
            _, alive = psutil.wait_procs(daemons, timeout=START_TIMEOUT_S)
            for daemon in alive:
                daemon.kill()

    def call(self, *command: str, is_checked: bool = True, **options: object) -> str:
        """Return what a command prints."""
        outcome = self.run(*command, **options)
        if is_checked and outcome.returncode:
            pytest.fail(f"{' '.join(command)} ended with {outcome.returncode}: {outcome.stdout}{outcome.stderr}")
        return outcome.stdout

    def run(
        self, *command: str, cwd: Path | None = None, timeout_s: float = COMMAND_TIMEOUT_S, **variables: str
    ) -> "subprocess.CompletedProcess[str]":
        environment = {**self.environment, **variables}
        return subprocess.run(
            command, cwd=cwd, env=environment, text=True, capture_output=True, timeout=timeout_s, check=False
        )

    def cancel_all(self) -> None:
        """End every job and wait until its nodes are free."""
        self.call("scancel", "--user=root", "--full", is_checked=False)
        wait_for(lambda: not self.call("squeue", "-h", "-t", "running,completing"), "jobs to end")

    def job(self, job_id: str) -> Mapping[str, str]:
        """Return what Slurm says of a job, by field."""
        words = self.call("scontrol", "show", "job", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def _write_configuration(self) -> None:
        first_port = free_port_block(len(NODES) + 1)
        host = socket.gethostname().split(".")[0]
        lines = [CONFIGURATION.format(host=host, folder=self.folder, first_port=first_port)]
        for index, name in enumerate(NODES):
            (self.folder / "spool" / name).mkdir(parents=True)
            lines.append(NODE.format(name=name, host=host, port=first_port + 1 + index))
        (self.folder / "slurm.conf").write_text("".join([*lines, PARTITION]))
        for gpu in range(8):
            (self.folder / f"gpu{gpu}").touch()
        gres = f"NodeName={','.join(NODES)} Name=gpu File={self.folder}/gpu[0-7] Flags=nvidia_gpu_env\n"
        (self.folder / "gres.conf").write_text(gres)
        (self.folder / "plugstack.conf").write_text(f"optional {self.folder}/pyxis_stub.so\n")
        source = Path(__file__).parent / "pyxis_stub.c"
        if shutil.which("cc") and Path("/usr/include/slurm/spank.h").exists():
            self.call("cc", "-shared", "-fPIC", "-o", f"{self.folder}/pyxis_stub.so", str(source))

    def _adopt(self, name: str, pid_file: str | Path) -> None:
        path = Path(pid_file)
        wait_for(lambda: path.exists() and path.read_text().strip() != "", f"{name} to write {path}")
        self._daemons[name] = psutil.Process(int(path.read_text()))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if os.geteuid() != 0:
        pytest.skip("needs root: munge and slurmd start as root")
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin"])
    missing = [package for program, package in NEEDED.items() if shutil.which(program, path=path) is None]
    if missing:
        pytest.skip(f"needs Slurm: bash tools/install_slurm_test.sh installs {', '.join(missing)}")
    folder = tmp_path_factory.mktemp("slurm")
    cluster = Cluster(folder)
    try:
        # Another worker of the tests would take the same ports until somebody listens on them.
        with Path(tempfile.gettempdir(), "p2o-slurm-ports.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(autouse=True)
def no_job_outlives_its_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """End what a test leaves: it would hold the nodes that the next one counts on."""
    yield
    if "cluster" in request.fixturenames:
        request.getfixturevalue("cluster").cancel_all()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a folder to submit jobs from that looks like the repository and keeps what they write."""
    for name in ("examples", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "logs").mkdir()
    return tmp_path
