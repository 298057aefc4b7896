"""What a process asks of the kernel, asked by a real one."""

import subprocess
import sys

RAISE_FROM_64 = """
import resource
from megatron_p2o.processes import allow_many_files
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, most))
files = [open("/dev/null") for _ in range(40)]
print(allow_many_files(), allow_many_files(), resource.getrlimit(resource.RLIMIT_NOFILE)[0], most)
files += [open("/dev/null") for _ in range(100)]
"""


def test_more_files_can_be_open_than_the_shell_allowed() -> None:
    outcome = subprocess.run(
        [sys.executable, "-c", RAISE_FROM_64], check=True, capture_output=True, text=True, timeout=60
    )
    first, second, allowed, most = map(int, outcome.stdout.split())
    assert first == second == allowed == (65536 if most == -1 else min(65536, most))
