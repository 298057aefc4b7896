"""The commands of the pages: those that cost little are run as they are shown, the others are held to their programs.

A command that a page shows in a block is in one of three tables: it is run here (`RUN`), by another test (`ELSEWHERE`),
or by none, with the reason (`SHOWN`).
"""

import argparse
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest.mock import patch
from urllib.request import urlopen

import pytest

from megatron_p2o.cli import _parser, main  # pyright: ignore[reportPrivateUsage]
from megatron_p2o.config.read import dump_config, load_config
from megatron_p2o.evaluation.benchmark import RESPONSES_FOLDER, Benchmark, Subject, write_results
from megatron_p2o.evaluation.outcome import GradedResponse, evaluation_metrics, evaluation_of, evaluation_record
from megatron_p2o.evaluation.protocol import Protocol
from megatron_p2o.evaluation.response_file import ResponseFile
from megatron_p2o.metrics.compute import ComputeAccount, compute_metrics
from megatron_p2o.metrics.log import open_metrics_log
from megatron_p2o.metrics.values import Mean
from megatron_p2o.records import to_json
from megatron_p2o.run_folder.results import write_results_file
from megatron_p2o.testing.run_files import frozen_answers
from megatron_p2o.testing.tiny_model import write_tiny_qwen3
from megatron_p2o.types import CORRECT, INCORRECT, Problem

ROOT = Path(__file__).parents[3]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
        *(ROOT / "kernels").rglob("*.md"),
    ]
)
TIMEOUT_S = 120

RUN = (
    r"p2o init .*",
    r"p2o train config\.yaml --dry-run",
    r"p2o train \S+ --print-config",
    r"p2o eval --compare .*",
    r"p2o report .*",
    r"p2o view.*",
    r"p2o plan .*",
    r"p2o doctor.*",
    r"p2o compare \S+ --sbatch \S+",
    r"p2o compare \S+ --no-run",
    r'eval "\$\(register-python-argcomplete p2o\)"',
    r"python -m megatron_p2o\.(config\.reference|data\.reasoning_gym) .*",
    r"python tools/prepare_data\.py --help",
)
"""Run in a folder with a tiny model in the place of models/Qwen3-4B, a few problems and finished runs."""

TRAINS = "tests/integration/runs/test_train_end_to_end.py"

ELSEWHERE = {
    r"p2o init": "tests/unit/run/before/test_first_settings.py",
    r"p2o train config\.yaml( --set .*)?": TRAINS,
    r"python examples/tasks/palindrome/prepare\.py .*": "tests/integration/runs/test_example_tasks.py",
    r"p2o train examples/tasks/.*": "tests/integration/runs/test_example_tasks.py",
    r"p2o eval (runs|models|config\.yaml|\$run).*": "tests/integration/runs/test_evaluate_directory.py",
    r"p2o compare \S+ --sbatch \S+ --submit": "tests/slurm/test_launcher.py",
    r"python tools/prepare_data\.py (deepscaler|deepmath|eval|demonstrations) .*": (
        "tests/unit/data/published/test_prepare.py"
    ),
    r"python tools/convert_checkpoint\.py .*": "tests/integration/tools/test_convert_checkpoint.py",
    r"python tools/fetch_smollm2\.py": "tests/unit/tools/test_fetch_smollm2.py",
    r"python tools/bench_train_step\.py .*": "tests/integration/tools/test_bench_train_step.py",
    r"python tools/bench_refresh\.py .*": "tests/integration/tools/test_bench_refresh.py",
    r"python tools/bench_conductor\.py .*": "tests/integration/tools/test_bench_conductor.py",
    r"(bash )?tools/install_gpu\.sh.*": "tests/unit/tree/test_install_gpu.py",
    r"bash tools/install_cpu\.sh.*": "tests/unit/tree/test_install_cpu.py",
    r"bash tools/gpu_session\.sh --dry-run": "tests/integration/tools/test_gpu_session.py",
    r"touch runs/p2o_qwen3_4b/stop": "tests/unit/run/test_conductor.py",
    r"(sbatch --job-name=\S+ \S+ \$.*|scaler_\w+=.*|math_\w+=.*|run=.*|export P2O_REFLECTION_URL=.*)": (
        "tests/unit/pages/test_reproduction_page.py"
    ),
}
"""Test that runs the same program, on small inputs."""

SHOWN = {
    r"bash examples/(quickstart\.sh|tiny_cpu/compare\.sh .*)": "trains for ten minutes or more",
    r"source \.venv/bin/activate": "comes with Python",
    r"bash tools/test\.sh.*": "runs all these tests",
    r"bash tools/install_(slurm_test|sandbox)\.sh": "installs Debian's packages; .ci/run does",
    r"bash tools/gpu_wheels\.sh": "downloads",
    r"bash (tools/gpu_session|kernels/bench/run_gpu)\.sh": "needs a GPU",
    r"python tools/check_megatron_core\.py .*": "downloads, and trains for minutes",
    r"python tools/bench_against_trl\.py .*": "downloads TRL; half an hour",
    r"p2o train examples/p2o_qwen3_4b\.yaml --dry-run": "needs the problems of the paper and an endpoint",
    r"p2o train examples/smollm2_cpu/.*": "trains for half an hour",
    r"p2o compare experiments/hard_problems\.yaml": "trains for hours",
    r"sbatch .*": "needs Slurm; tests/slurm submits other jobs to one on loopback",
    r"(srun|ssh|tail|module load) .*": "on a cluster, beside a run",
    r"docker build .*": "needs Docker, and downloads; tests/unit/tree/test_dockerfile.py reads the recipe",
    r"(docker run|apptainer) .*": "needs the GPU image",
    r"kubectl .*": "needs a cluster; tests/unit/tree/test_kubernetes.py reads the manifest",
    r"(hf download|(apt-get|pip|uv pip) install) .*": "downloads",
}
"""Commands that no test runs, and why. Their arguments and files are held to what there is."""

FENCED = re.compile(r"^( *)(`{3,})(\w*)[^\n]*\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:\A|(?<=\n\n))(?: {4}\S.*(?:\n|\Z))+", re.MULTILINE)
SHELLS = ("bash", "sh", "shell", "console")
FOLDERS = ("docs", "examples", "experiments", "kernels", "megatron_p2o", "requirements", "tests", "tools")

SUBCOMMANDS = next(
    list(action.choices)
    for action in _parser()._actions  # pyright: ignore[reportPrivateUsage]
    if isinstance(action, argparse._SubParsersAction)  # pyright: ignore[reportPrivateUsage]
)

P2O = re.compile(rf"\s*(?:\S+ )*?(p2o (?:{'|'.join(SUBCOMMANDS)})\b[^#|]*)")
"""A call of `p2o`, alone or behind another program."""


def program_of(line: str) -> str:
    """Return the first word of a command behind the variables that it sets."""
    return next((word for word in line.split() if not re.match(r"\w+=", word)), "")


def commands_of(block: str) -> list[str]:
    """Return the commands of a block of shell: lines that belong together joined, without comments."""
    found, line = [], ""
    for each in block.replace("\\\n", " ").splitlines():
        line = f"{line} {each.strip()}".strip()
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a quotation goes on
            continue
        if words:
            found.append(re.sub(r"(^|\s+)#.*$", "", line).strip())
        line = ""
    assert not line, f"a quotation has no end: {line}"
    return found


def shown_commands(texts: Sequence[str]) -> list[list[str]]:
    """Return the commands in blocks of each page; indented ones count that begin with a program of the others."""
    fenced = [
        [c for _, _, kind, block in FENCED.findall(text) if kind in SHELLS for c in commands_of(block)]
        for text in texts
    ]
    programs = {program_of(command) for page in fenced for command in page} - {""}
    indented = [
        [
            command
            for block in INDENTED.findall(FENCED.sub("", text))
            if program_of(block) in programs
            for command in commands_of(block)
        ]
        for text in texts
    ]
    return [first + second for first, second in zip(fenced, indented)]


SHOWN_ON = {
    (str(page.relative_to(ROOT)), command)
    for page, commands in zip(PAGES, shown_commands([page.read_text(encoding="utf-8") for page in PAGES]))
    for command in commands
}
IN_BLOCKS = sorted({command for _, command in SHOWN_ON})

QUOTED = {
    quoted for page in PAGES for quoted in re.findall(r"`([^`\n]+)`", FENCED.sub("", page.read_text(encoding="utf-8")))
}
IN_SENTENCES = sorted({found[1].strip() for quoted in QUOTED if (found := P2O.match(quoted))})


def entry_for(command: str) -> str:
    """Return the first entry of the tables that a command has, whatever variables are set for it; "" without any."""
    bare = re.sub(r"^(\w+=[^\s\"']* )+", "", command)
    return next((entry for entry in (*RUN, *ELSEWHERE, *SHOWN) if re.fullmatch(entry, bare)), "")


def runs_here(command: str) -> bool:
    return entry_for(command) in RUN


def test_commands_are_found_in_every_kind_of_block() -> None:
    text = (
        "```bash\np2o train a.yaml  # so\np2o eval \\\n    b\n```\nor\n\n    p2o plan a.yaml --gpus 8x80\n\n"
        "```sh\nx=1 bash a.sh\nsets='a\n b'\n```\n- item\n\n    p = 1\n\n```\np2o is no command here\n```\n"
    )
    found = ["p2o train a.yaml", "p2o eval      b", "x=1 bash a.sh", "sets='a b'", "p2o plan a.yaml --gpus 8x80"]
    assert shown_commands([text]) == [found]
    assert {"init", "train", "eval", "compare", "report", "view", "plan", "doctor"} <= set(SUBCOMMANDS)
    assert ("docs/engines.md", "p2o plan examples/p2o_qwen3_4b.yaml --gpus 8x80 --problems 5000") in SHOWN_ON
    assert len(IN_BLOCKS) > 60 and len(IN_SENTENCES) > 10


@pytest.mark.parametrize("command", IN_BLOCKS)
def test_a_command_of_a_page_is_run_by_a_test_or_a_table_says_why_not(command: str) -> None:
    pages = [page for page, each in SHOWN_ON if each == command]
    assert entry_for(command), f"{pages}: give the command an entry in RUN, ELSEWHERE or SHOWN of {Path(__file__).name}"


def test_every_entry_is_of_a_command_and_every_test_that_it_names_is_of_its_program() -> None:
    used = {entry_for(command) for command in {*IN_BLOCKS, *QUOTED}}
    assert {*RUN, *ELSEWHERE, *SHOWN} <= used, "an entry without a command"
    for entry, test in ELSEWHERE.items():
        text = (ROOT / test).read_text(encoding="utf-8")
        for program in re.findall(r"(\w+)\\\.(?:py|sh)", entry):
            assert program in text, f"{test} says nothing of {program}"


def test_the_files_of_commands_are_there() -> None:
    made = re.compile(r"(--json|--out|--output|>)[ =]\S+")
    words = {word for command in IN_BLOCKS for word in made.sub("", command).replace("=", " ").split()}
    files = {word for word in words if re.match(rf"({'|'.join(FOLDERS)})/[\w./-]+$", word)}
    assert len(files) > 20
    assert not {name for name in files if not (ROOT / name).exists()}


def called(command: str) -> list[str]:
    """Return the arguments of a call of `p2o`, with something for what is spoken of rather than shown."""
    shown = re.sub(r"\[(\S+)\]", r"\1", command).replace(" N ", " 8 ").replace(" ...", "").replace("...", "")
    _, *arguments = shlex.split(shown)
    needed = {"init": [], "report": ["runs/a"], "view": ["runs/a"], "compare": ["experiment.yaml"]}
    if all(argument.startswith("-") for argument in arguments[1:]):
        arguments += needed.get(arguments[0], ["config.yaml"])
    if arguments[0] == "plan" and "--gpus" not in arguments:
        arguments += ["--gpus", "8x80"]
    return arguments


@pytest.mark.parametrize(
    "command", sorted({*IN_SENTENCES, *(found[1].strip() for each in IN_BLOCKS if (found := P2O.match(each)))})
)
def test_p2o_takes_the_arguments_that_are_shown(command: str) -> None:
    _parser().parse_args(called(command))


class Parsed(Exception):
    """A program has taken its arguments."""


TOOLS = [each for each in IN_BLOCKS if re.search(r"\bpython (tools|examples)/\S+\.py\b", each) and not runs_here(each)]


@pytest.mark.parametrize("command", TOOLS)
def test_a_tool_takes_the_arguments_that_are_shown(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse_args = argparse.ArgumentParser.parse_args

    def parsed(self: argparse.ArgumentParser, args: Sequence[str] | None = None, namespace: None = None) -> None:
        parse_args(self, args, namespace)
        raise Parsed

    _, tool, *arguments = shlex.split(command)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr(sys, "argv", [tool, *arguments])
    monkeypatch.setattr(sys, "path", [str((ROOT / tool).parent), *sys.path])
    with pytest.raises(Parsed), patch.dict(os.environ):  # some tools hide the GPUs
        runpy.run_path(str(ROOT / tool), run_name="__main__")


@pytest.mark.parametrize("command", [each for each in IN_BLOCKS if program_of(each) == "sbatch" and "$" not in each])
def test_a_job_script_takes_the_settings_that_are_shown(command: str) -> None:
    words = shlex.split(command)
    (script,) = (word for word in words if word.endswith(".sh"))
    overrides = words[words.index(script) + 1 :]
    assert overrides[::2] == ["--set"] * (len(overrides) // 2)
    (settings,) = re.findall(r"launch\.sh (\S+\.yaml)", (ROOT / script).read_text(encoding="utf-8"))
    load_config(ROOT / settings, overrides[1::2])


PROBLEMS = [
    {"id": f"p{number}", "question": f"What is {number} + {number}?", "answer": str(2 * number)} for number in range(40)
]


def write_evaluation(folder: Path, num_right: int) -> None:
    """Write what `p2o eval` leaves of a set of which the first problems are answered right."""
    config = load_config(ROOT / "examples/tiny_cpu/base.yaml")
    problems = [Problem(id=each["id"], question=each["question"], answer=each["answer"]) for each in PROBLEMS]
    protocol = Protocol(num_samples=1, temperature=0.0)
    with ResponseFile(folder / RESPONSES_FOLDER / "heldout.jsonl", {}) as file:
        for response in responses(num_right):
            file.append(response)
        benchmark = Benchmark(name="heldout", problems=problems, protocol=protocol, file=file)
        write_results([benchmark], Subject(path="model", weights_sha256="0" * 64, step=300), config, folder)


def responses(num_right: int) -> list[GradedResponse]:
    grades = [CORRECT] * num_right + [INCORRECT] * (len(PROBLEMS) - num_right)
    return [
        GradedResponse(problem_id=each["id"], sample=0, grade=grade, finish_reason="stop", num_tokens=3)
        for each, grade in zip(PROBLEMS, grades)
    ]


def write_run(folder: Path, num_right: int) -> None:
    """Write what a finished run leaves of its settings, metrics and results."""
    config = load_config(ROOT / "examples/tiny_cpu/p2o.yaml", [f"run.name={folder.name}"])
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    problems = [Problem(id=each["id"], question=each["question"], answer=each["answer"]) for each in PROBLEMS]
    outcome = evaluation_of(responses(num_right), problems, samples_per_problem=1, temperature=0.0)
    spent = ComputeAccount(sampled_training_tokens=4000, wall_s=60.0)
    with open_metrics_log(folder, folder.name, config.logging, num_steps=3) as log:
        for step in (1, 2, 3):
            log.write(step, 0, {"rollout/reward_mean": Mean.of([0.0, 1.0]), **compute_metrics(spent)})
        log.write(3, 0, evaluation_metrics({"heldout": outcome}))
    results = {"arm": "p2o", "seed": 1, "num_steps": 3, "evaluation": {"heldout": evaluation_record(outcome)}}
    counts = {"num_rollouts_train": 96, "num_rollouts_evolution": 0, "wall_s": 60.0, "compute": to_json(spent)}
    write_results_file(folder, results | counts)


@pytest.fixture(scope="module")
def visited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which the commands of the pages find what they name."""
    folder = tmp_path_factory.mktemp("visited")
    for name in ("examples", "experiments", "tools"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "docs").mkdir()
    for model in {found for command in IN_BLOCKS for found in re.findall(r"p2o init --model (\S+)", command)}:
        write_tiny_qwen3(folder / model, max_positions=40960)
    for name in ("problems", "heldout"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in PROBLEMS))
    commands = [each for each in IN_BLOCKS if re.match(r"p2o (report|view|eval --compare) ", each)]
    words = {word for command in commands for word in re.sub(r"--output \S+", "", command).split()}
    runs = {word.partition("/evaluations")[0] for word in words if word.startswith("runs/")}
    for number, run in enumerate(sorted({run.replace("*", arm) for run in runs for arm in ("grpo_n6", "p2o")})):
        write_run(folder / run, num_right=10 + number)
    return folder


@pytest.fixture
def here(visited: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Go to that folder, where `p2o init` has written config.yaml as the README shows."""
    monkeypatch.chdir(visited)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels")]))
    init = next(command for command in IN_BLOCKS if command.startswith("p2o init --"))
    if not Path("config.yaml").exists():
        assert main(shlex.split(init)[1:]) == 0
    return visited


def variants(command: str) -> Iterator[list[str]]:
    """Yield the words of a command, without and with what may be left out, and with the files that it means."""
    for shown in {re.sub(r" \[\S+\]", "", command), re.sub(r"\[(\S+)\]", r"\1", command)}:
        words = [sorted(map(str, Path().glob(word))) if "*" in word else [word] for word in shlex.split(shown)]
        yield [each for word in words for each in word]


@pytest.mark.parametrize("command", [each for each in IN_BLOCKS if runs_here(each) and re.match(r"p2o (?!view)", each)])
def test_the_command_does_what_the_page_shows(command: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if command.startswith("p2o init"):
        Path("config.yaml").unlink()
    if command.startswith("p2o eval --compare"):
        for number, folder in enumerate(shlex.split(command)[3:]):
            write_evaluation(Path(folder), num_right=20 + number)
    for words in variants(command):
        shorter = ["--steps", "1"] if words[1] == "plan" else []  # of each kind, which take seconds to simulate
        status = main([*words[1:], *shorter])
        said = capsys.readouterr()
        assert status == 0, said.err
        assert said.out.strip()
        if words[1] == "report":
            runs, output = words[2 : words.index("--output")], Path(words[-1])
            assert len(frozen_answers(output / "report.html")["runs"]) == len(runs)


@pytest.mark.parametrize("command", [each for each in IN_BLOCKS if each.startswith("python ") and runs_here(each)])
def test_the_program_runs_as_the_page_shows(command: str, here: Path) -> None:
    if "reasoning_gym" in command:
        pytest.importorskip("reasoning_gym", reason="needs reasoning-gym: pip install -r requirements/dev.txt")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euc", command],
        cwd=here,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    for output in re.findall(r"(?:--out|>) (\S+)", command):
        assert (here / output).exists()


def test_p2o_view_serves_the_runs_that_are_named(here: Path) -> None:
    commands = [each for each in IN_BLOCKS if each.startswith("p2o view ")]
    longest = max(commands, key=len)
    assert len(commands) > 2
    (words,) = variants(re.sub(r" --port \d+", "", longest))
    server = subprocess.Popen([sys.executable, "-m", "megatron_p2o.cli", *words[1:]], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        (address,) = re.findall(r"http://\S+", server.stdout.readline())
        with urlopen(f"{address}api/runs", timeout=TIMEOUT_S) as answer:
            assert [run["name"] for run in json.load(answer)] == [Path(word).name for word in words[2:]]
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(TIMEOUT_S)


def test_the_shell_completes_after_the_command_of_the_readme() -> None:
    (command,) = re.findall(r'`(eval "\$\(register-python-argcomplete p2o\)")`', (ROOT / "README.md").read_text())
    if shutil.which("register-python-argcomplete", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("needs argcomplete's command beside this Python")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euc", f"{command}; complete -p p2o"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0 and re.search(r"complete .*-F _python_argcomplete p2o$", done.stdout.strip()), done
