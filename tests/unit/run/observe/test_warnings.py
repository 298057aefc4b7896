"""Warnings of a run are kept in its folder."""

import json
import logging
from pathlib import Path

import pytest

from megatron_p2o.run.observe import warnings
from megatron_p2o.run.observe.warnings import kept_warnings


def messages(path: Path) -> list[str]:
    return [json.loads(line)["message"] for line in path.read_text().splitlines()]


def test_warnings_of_the_package_are_kept_over_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "warnings.jsonl"
    logger = logging.getLogger("megatron_p2o.somewhere")
    with kept_warnings(path):
        logger.warning("step %d: too slow", 3)
        logger.info("no warning")
        logging.getLogger("another_package").warning("not ours")
    logger.warning("after the run")
    with kept_warnings(path):
        logger.error("two\nlines")
    assert messages(path) == ["step 3: too slow", "two\nlines"]
    first = json.loads(path.read_text().splitlines()[0])
    assert (first["level"], first["logger"]) == ("WARNING", "megatron_p2o.somewhere")


def test_the_file_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "MAX_BYTES", 300)
    with kept_warnings(tmp_path / "warnings.jsonl"):
        for number in range(100):
            logging.getLogger("megatron_p2o").warning("%d", number)
    assert messages(tmp_path / "warnings.jsonl") == ["0", "1", "2"]


def test_a_full_disk_does_not_end_the_run(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no device that is always full")
    with kept_warnings(Path("/dev/full")):
        logging.getLogger("megatron_p2o").warning("lost")
