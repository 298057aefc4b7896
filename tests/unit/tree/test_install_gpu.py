"""The installation without a container has the versions of the GPU image, in its order."""

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "tools" / "install_gpu.sh"
IMAGE = (ROOT / "Dockerfile").read_text().partition("AS gpu")[2]


def steps(*options: str, **variables: str) -> list[str]:
    """Return what the script would run."""
    command = ["bash", str(SCRIPT), "--dry-run", *options, "FOLDER"]
    environment = {**os.environ, **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


def pins(text: str) -> set[tuple[str, str]]:
    return set(re.findall(r"([A-Za-z0-9_-]+)==([0-9][A-Za-z0-9.]*)", text))


def test_every_version_is_the_image_s() -> None:
    arguments = dict(re.findall(r"^ARG ([A-Z_]+)=(.*)$", IMAGE, re.MULTILINE))
    resolved = re.sub(r"\$\{([A-Z_]+)\}", lambda name: arguments.get(name[1], name[0]), IMAGE)
    base = {("torch", arguments["TORCH_VERSION"]), ("sglang", arguments["SGLANG_VERSION"])}
    installed = pins("\n".join(line for line in steps() if " pip install " in line))
    assert installed == pins(resolved) | base


def test_cudnn_is_the_last_of_the_others_and_our_package_comes_after_it() -> None:
    installs = [line for line in steps() if " pip install " in line]
    assert "nvidia-cudnn-cu13==" in installs[-2] and installs[-1].endswith("--editable .")
    assert next(number for number, line in enumerate(installs) if "torch==2" in line) == 0


def test_what_needs_a_compiler_can_be_left_out() -> None:
    compiled = {"transformer-engine-torch", "flash-attn"}
    assert compiled <= {name for name, _ in pins("\n".join(steps()))}
    assert not compiled & {name for name, _ in pins("\n".join(steps("--no-compiler")))}
    without_flash = {name for name, _ in pins("\n".join(steps(INSTALL_FLASH_ATTN="0")))}
    assert without_flash & compiled == {"transformer-engine-torch"}


def test_another_python_is_refused_with_what_to_do(tmp_path: Path) -> None:
    environment = {**os.environ, "P2O_PYTHON": "false"}
    command = ["bash", str(SCRIPT), "--no-compiler", str(tmp_path / "environment")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "P2O_PYTHON=false is no CPython 3.12" in done.stderr
    assert not (tmp_path / "environment").exists()


def test_an_unknown_option_is_refused() -> None:
    done = subprocess.run(["bash", str(SCRIPT), "--fast"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--fast is no option" in done.stderr
