"""Checks the place of a run's folder before anything is written there."""

import os
from pathlib import Path

from megatron_p2o.config.tree import RunConfig
from megatron_p2o.errors import expected_message

NAME_MAX_BYTES = 255
"""Longest folder name on Linux file systems."""


def place_problems(run: RunConfig) -> list[str]:
    """Return why the folder of a run can be neither used nor made, in one sentence; empty when it can."""
    named = f"run.directory={run.directory} and run.name={run.name} must name a folder that can be written"
    if any(len(os.fsencode(part)) > NAME_MAX_BYTES for part in run.folder.parts):
        return [f"{named}: File name too long: choose a shorter one"]
    try:
        os.stat(run.folder)
        existing = run.folder
    except FileNotFoundError:
        existing = next((parent for parent in run.folder.absolute().parents if parent.exists()), Path("/"))
    except OSError as error:
        return [f"{named}: {expected_message(error)}"]
    if not existing.is_dir():
        return [f"{named}: {existing} is a file"]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [f"{named}: {existing} may not be written, check its owner and permissions"]
    return []
