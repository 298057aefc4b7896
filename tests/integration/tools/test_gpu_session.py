"""The script for a GPU that is lent for minutes: it runs through here, and on a GPU it runs what it means to."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from importlib.metadata import packages_distributions
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]
TOOLS = ROOT / "tools"
ON_THE_MACHINE = """
aiohappyeyeballs aiohttp aiosignal annotated-doc anyio attrs certifi charset-normalizer click contourpy cycler einops
execnet filelock fonttools frozenlist fsspec h11 hf-xet httpcore httpx huggingface-hub hypothesis idna iniconfig
jinja2 kiwisolver markdown-it-py markupsafe matplotlib mdurl mpmath multidict networkx numpy packaging pillow pluggy
prometheus-client propcache psutil pyarrow pygments pyparsing pytest pytest-timeout pytest-xdist python-dateutil
pyyaml regex requests rich safetensors sentencepiece shellingham six sortedcontainers sympy tabulate tokenizers tqdm
transformers triton typer typing-extensions urllib3 uvloop yarl
"""
"""Of the packages that this project pins, those that come with a lent GPU's torch, transformers and pytest."""

HIDE = """
import sys
from importlib.machinery import PathFinder

class OnTheMachine(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {absent} else super().find_spec(name, path, target)

sys.meta_path[:] = [OnTheMachine if finder is PathFinder else finder for finder in sys.meta_path]
"""
"""Of a module that Python imports at its start: some packages cannot be found."""


def absent_modules() -> set[str]:
    """Return the modules of the pinned packages that are neither on the machine nor carried to it."""
    carried = re.findall(r"([A-Za-z0-9_.-]+)==", (TOOLS / "gpu_wheels.sh").read_text())
    pinned = [re.findall(r"^([A-Za-z0-9_.-]+).*==", file.read_text(), re.M) for file in ROOT.glob("requirements/*.txt")]
    absent = (
        {plain(name) for names in pinned for name in names}
        - {*ON_THE_MACHINE.split()}
        - {plain(name) for name in carried}
    )
    owners = packages_distributions().items()
    return {module for module, packages in owners if {plain(package) for package in packages} <= absent}


def plain(name: str) -> str:
    """Return a package's name in its one spelling."""
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    import gpu_session

    return gpu_session


@pytest.mark.slow
def test_every_step_runs_without_a_gpu_without_git_and_with_the_carried_packages(tmp_path: Path):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "env", "mktemp", "rm", "cat", "dirname", "uname"):
        (programs / name).symlink_to(Path("/bin") / name if (Path("/bin") / name).exists() else Path("/usr/bin") / name)
    # A wrapper, because a link to a virtual environment's python does not find the packages.
    (programs / "python3").write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    (programs / "python3").chmod(0o755)
    absent = absent_modules()
    assert {"sglang", "openai"} <= absent and not absent & {"torch", "megatron", "msgspec", "orjson", "math_verify"}
    (tmp_path / "sitecustomize.py").write_text(HIDE.replace("{absent}", repr(absent)))
    environment = {**os.environ, "PATH": str(programs), "OUT": str(tmp_path / "out"), "P2O_COMMIT": "abc"}
    # A wheel of what is installed here anyway, for another Python: it is named and left out.
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "orjson-3.13.0-cp312-cp312-win32.whl").touch()
    environment |= {"PYTHONPATH": str(tmp_path), "WHEELS": str(tmp_path / "wheels")}
    done = subprocess.run(
        ["/bin/bash", str(TOOLS / "gpu_session.sh"), "--dry-run"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )
    assert done.returncode == 0 and "not installed: " in done.stdout, done.stdout + done.stderr
    record = json.loads((tmp_path / "out" / "session.json").read_text())
    assert record["environment"]["commit"] == "abc" and record["environment"]["is_rehearsal"]
    results = {path.stem for path in (tmp_path / "out").glob("*.json")}
    expected = {"policy_loss_64", "logprob_errors_tiny_plain", "logprob", "advantage", "train_step_tiny", "weight_path"}
    assert expected <= results
    assert all(json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in expected)


def test_the_commands_for_a_gpu_are_ones_that_the_tools_take(session: ModuleType, tmp_path: Path, monkeypatch):
    everything = [
        session.correctness_step(session.GPU, tmp_path),
        *session.steps(session.GPU, session.KERNELS, tmp_path),
    ]
    commands = [command for step in everything for command in step.commands.values()]
    parsed = set()
    for command in commands:
        tool = next((word for word in command if word.startswith("tools/")), None)
        if tool is None:
            files = [word for word in command if word.startswith("tests/")]
            assert files and all((ROOT / file).exists() for file in files)
            continue
        module = __import__(Path(tool).stem)
        monkeypatch.setattr(sys, "argv", command[command.index(tool) :])
        module.parse_arguments()  # exits where an option is unknown or a value is none of the choices
        parsed.add(tool)
    assert parsed == {"tools/bench_kernels.py", "tools/bench_train_step.py", "tools/bench_refresh.py"}


def test_the_most_valuable_steps_fit_the_budget_at_their_limits(session: ModuleType, tmp_path: Path):
    limits = {step.name: step.limit_s for step in session.steps(session.GPU, session.KERNELS, tmp_path)}
    first = ("policy_loss_16384", "train_step_qwen3-0.6b", "train_step_qwen3-4b", "weight_path")
    spent = session.correctness_step(session.GPU, tmp_path).limit_s + sum(limits[name] for name in first)
    assert spent <= session.GPU.budget_s <= 540


def test_a_step_that_hangs_or_fails_costs_the_others_nothing(session: ModuleType, tmp_path: Path):
    run = session.Session(tmp_path, {"device": "none"}, time.monotonic() + 1000)
    child = "import subprocess, sys, time; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    run.run(session.Step(name="hangs", limit_s=0.5, commands={"hangs": [sys.executable, "-c", child]}))
    run.run(
        session.Step(name="fails", limit_s=300, commands={"fails": [sys.executable, "-c", "raise SystemExit('no')"]})
    )
    run.run(session.Step(name="works", limit_s=300, commands={"works": [sys.executable, "-c", "print(1)"]}))
    record = json.loads((tmp_path / "session.json").read_text())
    assert [step["status"] for step in record["steps"]] == ["cut off", "failed", "passed"]
    assert record["steps"][1]["note"] == "no" and record["environment"] == {"device": "none"}


def test_no_step_is_begun_without_time(session: ModuleType, tmp_path: Path):
    run = session.Session(tmp_path, {}, time.monotonic() + session.LEAST_S / 2)
    run.run(session.Step(name="late", limit_s=300, commands={"late": [sys.executable, "-c", "print(1)"]}))
    (step,) = json.loads((tmp_path / "session.json").read_text())["steps"]
    assert (step["status"], step["note"]) == ("not run", "no time left")


def test_only_kernels_whose_tests_passed_are_timed(session: ModuleType, tmp_path: Path):
    run = session.Session(tmp_path, {}, time.monotonic() + 1000)
    commands = {name: [sys.executable, "-c", ""] for name in session.correctness_step(session.GPU, tmp_path).commands}
    commands["kernel_tests_warp_specialized"] = [sys.executable, "-c", "raise SystemExit(1)"]
    run.run(session.Step(name="correctness", limit_s=300, commands=commands))
    assert run.passed_kernels() == ["plain"]


WAIT_FOR_FILE = """
import sys, time
from pathlib import Path
while not Path(sys.argv[1]).exists():
    time.sleep(0.05)
"""


def test_each_command_of_a_step_has_its_own_time(session: ModuleType, tmp_path: Path):
    run = session.Session(tmp_path, {}, time.monotonic() + 1000)
    is_noted = tmp_path / "is_noted"
    commands = {
        "long": [sys.executable, "-c", WAIT_FOR_FILE, str(is_noted)],
        "short": [sys.executable, "-c", ""],
    }

    def let_the_long_one_end() -> None:
        while len(run.outcomes) < 2 or run.outcomes[1].status == "not run":
            time.sleep(0.05)
        is_noted.touch()

    threading.Thread(target=let_the_long_one_end, daemon=True).start()
    run.run(session.Step(name="both", limit_s=300, commands=commands))
    long, short = run.outcomes
    assert [long.status, short.status] == ["passed", "passed"] and short.seconds < long.seconds


def test_a_step_that_there_is_not_is_refused_before_any_runs(session: ModuleType, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["gpu_session.py", "--dry-run", "--steps", "advantage", "kernel_tests"])
    monkeypatch.setattr(session, "machine", lambda: {})
    monkeypatch.setattr(session.os, "chdir", lambda folder: None)
    with pytest.raises(SystemExit, match="kernel_tests: there is no such step, only correctness, "):
        session.main()
    assert not (tmp_path / "session.json").exists()


def test_tests_that_were_all_skipped_do_not_count_as_passed(session: ModuleType, tmp_path: Path):
    report = '<testsuites><testsuite tests="2" failures="0" errors="0" skipped="2"/></testsuites>'
    write = f"open({str(tmp_path / 'checked.xml')!r}, 'w').write({report!r})"
    run = session.Session(tmp_path, {}, time.monotonic() + 1000)
    run.run(session.Step(name="checked", limit_s=300, commands={"checked": [sys.executable, "-c", write]}))
    assert run.outcomes[0].status == "skipped" and run.outcomes[0].tests["skipped"] == 2
