"""Run what a GPU has to show, most valuable first, and keep every result. Called by tools/gpu_session.sh.

    python3 tools/gpu_session.py [--dry-run] [--budget-s 540] [--steps NAME ...]

Under $OUT, or tools/results/gpu_session: `session.json` (device, versions, commit, and what became of each step),
rewritten after every step; the steps' own JSON, test reports and logs. A step has its own time limit and never more
than what is left of the budget. Without a CUDA device, or with --dry-run, the same commands run at tiny shapes on
the CPU. Imports the standard library only, so that a broken package costs the steps that need it.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ("warp_specialized", "plain")
LEAST_S = 20.0
"""A step is not begun with less time left."""

POLL_S = 0.1
"""Between two looks at the commands that run."""

KILL_S = 5.0
"""Kept free for the end of a step that is cut off."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large the steps are."""

    device: str
    head_shape: str
    """Shape of the LM head in `bench_kernels`."""
    tokens: tuple[int, ...]
    """Tokens of each run of `bench_kernels`; each run is a step."""
    gate_shapes: tuple[str, ...]
    dead: tuple[float, ...]
    repeats: int
    rollouts: int
    models: tuple[tuple[str, int], ...]
    """(shape of `random_policy`, repeats) of the training steps."""
    refresh_model: str
    bucket_mib: int
    train_options: tuple[str, ...]
    budget_s: float
    """Longest time of all steps together."""
    limit_factor: float = 1.0
    """Factor of the steps' own limits; large where a slow machine must not decide what is reached."""


GPU = Scale(
    device="cuda",
    head_shape="qwen3-4b",
    tokens=(16384, 32768, 65536),
    gate_shapes=("qwen3-4b", "qwen3-4b-tp8"),
    dead=(0.0, 0.3, 0.6),
    repeats=7,
    rollouts=4096,
    models=(("qwen3-0.6b", 5), ("qwen3-4b", 3)),
    refresh_model="qwen3-4b",
    bucket_mib=512,
    train_options=("--recompute", "--tokens", "16384"),
    budget_s=540.0,
)
REHEARSAL = Scale(
    device="cpu",
    head_shape="tiny",
    tokens=(64, 96, 128),
    gate_shapes=("tiny",),
    dead=(0.0, 0.3, 0.6),
    repeats=1,
    rollouts=64,
    models=(("tiny", 1),),
    refresh_model="tiny",
    bucket_mib=4,
    train_options=("--recompute", "--tokens", "256"),
    budget_s=3600.0,
    limit_factor=10.0,
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """Commands that run side by side under one limit."""

    name: str
    """Name of the step and of its files."""
    limit_s: float
    commands: dict[str, list[str]]
    """By the name of their log."""


@dataclass(kw_only=True)
class Outcome:
    """What became of a command."""

    step: str
    name: str
    command: list[str]
    status: str = "not run"
    """"passed", "failed", "cut off", "skipped" (all tests were) or "not run", with the reason in `note`."""
    exit_code: int | None = None
    seconds: float = 0.0
    limit_s: float = 0.0
    note: str = ""
    tests: dict[str, int] = field(default_factory=dict)
    """Counts of a test report: how many tests ran, failed and were skipped."""


def main() -> int:
    arguments = parse_arguments()
    os.chdir(ROOT)
    out = Path(os.environ.get("OUT", "tools/results/gpu_session")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    environment = machine()
    is_rehearsal = arguments.dry_run or not environment.get("has_cuda")
    scale = REHEARSAL if is_rehearsal else GPU
    known = [step.name for step in (correctness_step(scale, out), *steps(scale, KERNELS, out))]
    unknown = [name for name in arguments.steps or () if name not in known]
    if unknown:
        raise SystemExit(f"--steps {' '.join(unknown)}: there is no such step, only {', '.join(known)}")
    deadline = time.monotonic() + (arguments.budget_s or scale.budget_s)
    session = Session(out, environment | {"is_rehearsal": is_rehearsal}, deadline, scale.limit_factor)
    run_chosen(session, [correctness_step(scale, out)], arguments.steps)
    run_chosen(session, steps(scale, session.passed_kernels(), out), arguments.steps)
    print(f"{session.table()}\nresults: {out}")
    # On a GPU tests that were all skipped have shown nothing.
    good = ("passed", "skipped") if is_rehearsal else ("passed",)
    return 0 if all(outcome.status in good for outcome in session.outcomes) else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, whatever machine this is")
    parser.add_argument("--budget-s", type=float, help="of all steps; default: 540 on a GPU")
    parser.add_argument("--steps", nargs="+", help="run these alone, in the usual order; default: all")
    return parser.parse_args()


def correctness_step(scale: Scale, out: Path) -> Step:
    """Every check that measures no time, side by side: most of it is compiling, which the host's cores share.

    Each kernel has processes of its own: one that hangs must not take the other's results along.
    """
    commands = {
        f"kernel_tests_{kernel}": tests(
            out / f"kernel_tests_{kernel}.xml",
            "tests/kernel_ops",
            *("-k", f"not plain and not warp_specialized or {kernel}"),
        )
        for kernel in KERNELS
    }
    commands["policy_tests"] = policy_tests(out)
    for shape in scale.gate_shapes:
        for kernel in KERNELS:
            name = f"logprob_errors_{shape}_{kernel}"
            commands[name] = errors_command(name, scale, shape, kernel, out)
    return Step(name="correctness", limit_s=150, commands=commands)


def steps(scale: Scale, kernels: Sequence[str], out: Path) -> list[Step]:
    """Return what follows the kernels' tests; only `kernels`, which passed them, are timed."""
    first, *more = (policy_loss_step(scale, kernels, tokens, out) for tokens in scale.tokens)
    return [
        first,
        *(train_step(scale, shape, repeats, kernels, out) for shape, repeats in scale.models),
        refresh_step(scale, out),
        profile_step(scale, kernels, out),
        *more,
        scoring_step(scale, kernels, out),
        advantage_step(scale, out),
    ]


def errors_command(name: str, scale: Scale, shape: str, kernel: str, out: Path) -> list[str]:
    """Log-prob errors against float64 beside those of the device's own product; hardly any timing."""
    options = ["--op", "linear_logprob", "--shape", shape, "--tokens", "128", "--repeats", "1", "--peers", "none"]
    options += ["--note", "Errors; the times are none: other processes ran on the GPU."]
    return bench_command(name, scale, out, *options, "--kernels", kernel)


def policy_loss_step(scale: Scale, kernels: Sequence[str], tokens: int, out: Path) -> Step:
    """The LM head with its loss beside every peer that is installed."""
    options = ["--op", "linear_policy_loss", "--shape", scale.head_shape, "--tokens", str(tokens), "--dead"]
    options += [*map(str, scale.dead), "--repeats", str(scale.repeats), "--kernels", *kernels, "--peers-s", "20"]
    return bench(f"policy_loss_{tokens}", 100, scale, out, *options)


def scoring_step(scale: Scale, kernels: Sequence[str], out: Path) -> Step:
    options = ("--op", "linear_logprob", "--shape", scale.head_shape, "--tokens", str(scale.tokens[0]))
    return bench("logprob", 45, scale, out, *options, "--repeats", str(scale.repeats), "--kernels", *kernels)


def advantage_step(scale: Scale, out: Path) -> Step:
    return bench("advantage", 25, scale, out, "--op", "grouped_advantage", "--rollouts", str(scale.rollouts))


def bench(name: str, limit_s: float, scale: Scale, out: Path, *options: str) -> Step:
    return Step(name=name, limit_s=limit_s, commands={name: bench_command(name, scale, out, *options)})


def bench_command(name: str, scale: Scale, out: Path, *options: str) -> list[str]:
    command = [sys.executable, "tools/bench_kernels.py", "--device", scale.device, *options]
    return [*command, "--json", str(out / f"{name}.json")]


def policy_tests(out: Path) -> list[str]:
    """The policy and shared device memory on one GPU."""
    files = [f"tests/distributed/test_{name}.py" for name in ("policy_gpu", "device_memory")]
    files += ["tests/unit/rollout/refresh/test_weights.py", "tests/unit/policy/training/test_settings.py"]
    return tests(out / "policy_tests.xml", *files)


def train_step(scale: Scale, shape: str, repeats: int, kernels: Sequence[str], out: Path) -> Step:
    """An optimizer step with MFU, tokens/s and the peak of memory beside the plan's."""
    name = f"train_step_{shape}"
    command = [sys.executable, "tools/bench_train_step.py", "--shape", shape, "--repeats", str(repeats)]
    command += [*scale.train_options, "--profile", "--head-kernel", kernels[0], "--json", str(out / f"{name}.json")]
    return Step(name=name, limit_s=75, commands={name: command})


def refresh_step(scale: Scale, out: Path) -> Step:
    """Weights as far as an engine would take them: gathered, converted, in buckets, with checksums."""
    command = [sys.executable, "tools/bench_refresh.py", "--engines", "0", "--shape", scale.refresh_model]
    command += ["--bucket-mib", str(scale.bucket_mib), "--repeats", "5", "--json", str(out / "weight_path.json")]
    return Step(name="weight_path", limit_s=80, commands={"weight_path": command})


def profile_step(scale: Scale, kernels: Sequence[str], out: Path) -> Step:
    """One launch of the LM head's kernel under Nsight Compute; without it the launch alone."""
    launch = [sys.executable, "tools/bench_kernels.py", "--device", scale.device, "--op", "linear_logprob"]
    launch += ["--shape", scale.head_shape, "--tokens", str(scale.tokens[0]), "--repeats", "1", "--peers", "none"]
    launch += ["--kernels", kernels[0]]
    sections = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "WarpStateStats", "Occupancy")
    profiler = ["ncu", "--target-processes", "all", "--clock-control", "none"]
    profiler += ["--kernel-name", "regex:exponentials_kernel", "--launch-skip", "2", "--launch-count", "1"]
    for section in sections:
        profiler += ["--section", section]
    profiler += ["--log-file", str(out / "ncu.txt")]
    has_profiler = scale.device == "cuda" and shutil.which("ncu") is not None
    return Step(name="profile", limit_s=45, commands={"profile": [*profiler, *launch] if has_profiler else launch})


def tests(report: Path, *arguments: str) -> list[str]:
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "--junitxml", str(report)]
    return [sys.executable, "-m", "pytest", *options, *arguments]


def machine() -> dict[str, object]:
    """Return device, versions and commit, asked for by a process of its own."""
    code = (
        "import sys, json; sys.path[:0] = ['kernels']; import torch; from bench.measure import environment\n"
        "has_cuda = torch.cuda.is_available(); device = torch.device('cuda' if has_cuda else 'cpu')\n"
        "memory = torch.cuda.get_device_properties(0).total_memory if has_cuda else None\n"
        "print(json.dumps({'has_cuda': has_cuda, 'total_memory_bytes': memory, **environment(device)}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else {"error": done.stderr[-2000:]}


class Session:
    """Runs steps until the time is up and writes down what became of them."""

    def __init__(self, out: Path, environment: dict[str, object], deadline: float, limit_factor: float = 1.0) -> None:
        self.outcomes: list[Outcome] = []
        self._out = out
        self._environment = environment
        self._deadline = deadline
        self._limit_factor = limit_factor
        self._write()

    def run(self, step: Step) -> None:
        """Run a step's commands to their end or its limit; never raises for what they do."""
        left = self._deadline - time.monotonic()
        outcomes = [Outcome(step=step.name, name=name, command=command) for name, command in step.commands.items()]
        self.outcomes += outcomes
        if left < LEAST_S:
            for outcome in outcomes:
                outcome.note = "no time left"
        else:
            limit_s = min(step.limit_s * self._limit_factor, left - KILL_S)
            print(f"== {step.name}: at most {limit_s:.0f} of {left:.0f} s", flush=True)
            run_together(outcomes, limit_s, self._out)
        self._write()
        for outcome in outcomes:
            print(f"   {outcome.name}: {outcome.status}, {outcome.seconds:.0f} s {outcome.note}", flush=True)

    def passed_kernels(self) -> list[str]:
        """Return the kernels whose tests did not fail; both where none passed, since the benchmark has its own gate."""
        failed = {outcome.name for outcome in self.outcomes if outcome.status not in ("passed", "skipped")}
        return [kernel for kernel in KERNELS if f"kernel_tests_{kernel}" not in failed] or list(KERNELS)

    def table(self) -> str:
        return "\n".join(
            f"{outcome.status:8} {outcome.seconds:5.0f} s  {outcome.name} {outcome.note}" for outcome in self.outcomes
        )

    def _write(self) -> None:
        record = {"environment": self._environment, "steps": [asdict(outcome) for outcome in self.outcomes]}
        temporary = self._out / "session.json.tmp"
        temporary.write_text(json.dumps(record, indent=1) + "\n")
        temporary.replace(self._out / "session.json")


def run_chosen(session: Session, steps: Sequence[Step], names: Sequence[str] | None) -> None:
    """Run the steps of these names; all of them without names."""
    for step in steps:
        if names is None or step.name in names:
            session.run(step)


def run_together(outcomes: Sequence[Outcome], limit_s: float, out: Path) -> None:
    """Run commands side by side and complete their outcomes."""
    start = time.monotonic()
    running: list[tuple[Outcome, subprocess.Popen[bytes]]] = []
    for outcome in outcomes:
        outcome.limit_s = limit_s
        with log_of(out, outcome).open("wb") as log:
            running.append((outcome, subprocess.Popen(outcome.command, stdout=log, stderr=log, start_new_session=True)))
    left = list(running)
    while left and time.monotonic() - start < limit_s:
        for outcome, process in left:
            if process.poll() is not None:
                outcome.status = "passed" if process.returncode == 0 else "failed"
                outcome.seconds = time.monotonic() - start
        left = [(outcome, process) for outcome, process in left if process.returncode is None]
        time.sleep(POLL_S)
    for outcome, process in left:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        outcome.status, outcome.seconds = "cut off", time.monotonic() - start
    for outcome, process in running:
        outcome.exit_code = process.returncode
        judge_report(outcome, out / f"{outcome.name}.xml")
        if outcome.status not in ("passed", "skipped"):
            outcome.note = last_words(log_of(out, outcome))


def log_of(out: Path, outcome: Outcome) -> Path:
    return out / f"{outcome.name}.log"


def judge_report(outcome: Outcome, report: Path) -> None:
    """Add the counts of a test report; tests that were all skipped have shown nothing."""
    if outcome.status != "passed" or not report.exists():
        return
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    outcome.tests = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
    if outcome.tests["tests"] == outcome.tests["skipped"]:
        outcome.status = "skipped"


def last_words(log: Path) -> str:
    """Return the last line of a log that says something, without colours."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return re.sub(r"\x1b\[[0-9;]*m", "", lines[-1])[:200] if lines else "said nothing"


if __name__ == "__main__":
    sys.exit(main())
