"""The program of tools/ that a file of tests is named after."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).parents[3] / "tools"


@pytest.fixture(scope="module")
def tool(request: pytest.FixtureRequest) -> ModuleType:
    """Return tools/NAME.py as a module, for tests in test_NAME.py."""
    sys.path.insert(0, str(TOOLS))
    try:
        return importlib.import_module(Path(request.module.__file__).stem.removeprefix("test_"))
    finally:
        sys.path.pop(0)
