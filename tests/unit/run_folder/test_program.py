"""A run knows which program made it."""

import subprocess
from pathlib import Path

from megatron_p2o import __version__
from megatron_p2o.run_folder.program import this_program

ROOT = Path(__file__).parents[3]


def test_the_program_is_told_by_version_commit_and_source() -> None:
    program = this_program()
    assert program == this_program() and program.version == __version__ and len(program.source) == 16
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    assert head.stdout.startswith(program.commit) and bool(program.commit) == (head.returncode == 0)
