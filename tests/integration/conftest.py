"""One tiny policy for all end-to-end tests: supervising it takes a minute."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with model/ and problems/ as tools/make_tiny_policy.py writes them.

    P2O_TINY_POLICY names one that was made before.
    """
    made = os.environ.get("P2O_TINY_POLICY")
    if made:
        return Path(made)
    folder = tmp_path_factory.mktemp("tiny")
    command = [sys.executable, str(ROOT / "tools" / "make_tiny_policy.py"), "--out", str(folder), "--seed", "1"]
    subprocess.run(command, check=True, timeout=600)
    return folder
