"""Hold the policy to another version of megatron-core than the installed one, on CPU.

    python tools/check_megatron_core.py [VERSION] [--folder FOLDER]

Unpacks the version's wheel in FOLDER (nothing is installed) and, with it, runs the tests that compare the policy with
transformers and torch's AdamW and its parallel layouts with one another; then lets each of the two versions continue
from the other's checkpoint. Takes about two minutes. The wheel is pure Python but for a helper of data sets that the
trainer does not use, so one for a later Python serves, as long as this Python reads its source.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ("tests/unit", "tests/distributed", "-k", "policy")
TIMEOUT_S = 900.0

Continued = list[list[float]]
"""[loss, gradient norm] of each update after the checkpoint."""


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", nargs="?", default="0.19.2")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "megatron-core")
    parser.add_argument("--python-version", default="3.12", help="whose wheel to take")
    parser.add_argument("--exchange", choices=("save", "load"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.exchange:
        print(json.dumps(continued(options.exchange, options.folder)))
        return 0
    unpacked = unpack(options.version, options.python_version, options.folder)
    other = environment(unpacked)
    seen = run(["-c", "import megatron.core; print(megatron.core.__version__, megatron.core.__file__)"], other)
    print(f"checking megatron-core {seen}", flush=True)
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "ignore", *TESTS],
        env=other,
        cwd=ROOT,
        check=True,
        timeout=TIMEOUT_S,
    )
    for name, saving, loading in (("theirs", other, environment(None)), ("ours", environment(None), other)):
        exchange(name, saving, loading)
    return 0


def unpack(version: str, python_version: str, folder: Path) -> Path:
    """Return the folder of the unpacked wheel; it is fetched unless it is there."""
    unpacked = folder / version
    if not (unpacked / "megatron").is_dir():
        with tempfile.TemporaryDirectory() as download:
            platform = ["--only-binary=:all:", "--platform", "manylinux_2_28_x86_64", "--implementation", "cp"]
            wanted = ["--no-deps", f"megatron-core=={version}", "--python-version", python_version]
            subprocess.run(
                [sys.executable, "-m", "pip", "download", "-q", "-d", download, *wanted, *platform],
                check=True,
                timeout=TIMEOUT_S,
            )
            (wheel,) = Path(download).glob("*.whl")
            zipfile.ZipFile(wheel).extractall(unpacked)
    return unpacked.resolve()


def environment(unpacked: Path | None) -> dict[str, str]:
    """Return the variables under which Python imports that megatron-core; None: the installed one."""
    folders = [str(ROOT), str(ROOT / "kernels"), *([str(unpacked)] if unpacked else [])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}


def run(arguments: list[str], variables: Mapping[str, str]) -> str:
    """Return what Python prints last."""
    command = [sys.executable, "-W", "ignore", *arguments]
    outcome = subprocess.run(command, env=variables, cwd=ROOT, check=True, timeout=TIMEOUT_S, stdout=subprocess.PIPE)
    return outcome.stdout.decode().strip().splitlines()[-1]


def exchange(name: str, saving: Mapping[str, str], loading: Mapping[str, str]) -> None:
    """Have one version save and both continue. Raises `SystemExit` unless both give the same numbers."""
    with tempfile.TemporaryDirectory() as folder:
        after: list[Continued] = [
            json.loads(run([__file__, "--exchange", what, "--folder", folder], variables))
            for what, variables in (("save", saving), ("load", loading))
        ]
    if after[0] != after[1]:
        raise SystemExit(
            f"training differs after a checkpoint of {name}: {after[0]} where saved, {after[1]} where loaded"
        )
    print(f"checkpoint of {name}: both versions continue with the same numbers, {after[0]}", flush=True)


def continued(what: str, folder: Path) -> Continued:
    """Save a checkpoint in `folder` after an update, or load it; return two more updates, with either optimizer."""
    from contextlib import closing

    from megatron_p2o.config.tree import ParallelConfig
    from megatron_p2o.policy.training.ranks import build_policy
    from megatron_p2o.testing.policy_oracle import policy_config, random_samples
    from megatron_p2o.testing.tiny_model import write_tiny_qwen3

    if what == "save":
        write_tiny_qwen3(folder / "model")
    samples = random_samples((9, 3, 14), vocab_size=256)
    after: Continued = []
    for is_sharded in (False, True):
        parallel = ParallelConfig(distributed_optimizer=is_sharded, timeout_s=60.0)
        with closing(build_policy(policy_config(folder / "model", parallel=parallel))) as policy:
            checkpoint = folder / f"sharded-{is_sharded}"
            if what == "save":
                policy.update(samples, None, 30)
                policy.save(checkpoint).result(60)
            else:
                policy.load(checkpoint)
            reports = [policy.update(samples, None, 30) for _ in range(2)]
        after += [[report.loss, report.grad_norm] for report in reports]
    return after


if __name__ == "__main__":
    sys.exit(main())
