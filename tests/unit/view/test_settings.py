"""Settings against the defaults and between runs."""

from pathlib import Path

import pytest

from megatron_p2o.config.tree import RolloutConfig
from megatron_p2o.view.settings import SettingsFile, default_settings, differences


def test_only_what_differs_is_listed_and_runs_are_compared() -> None:
    defaults = default_settings()
    first = {**defaults, "optimizer.lr": 3e-4, "run.name": "one"}
    second = {**first, "rollout.group_size": 12, "optimizer.weight_decay": defaults["optimizer.weight_decay"]}
    rows = {row["name"]: row for row in differences([first, second])}
    assert set(rows) == {"optimizer.lr", "run.name", "rollout.group_size"}
    assert rows["optimizer.lr"]["values"] == ["0.0003", "0.0003"] and not rows["optimizer.lr"]["differs"]
    assert rows["rollout.group_size"]["differs"]
    assert rows["rollout.group_size"]["default"] == rows["rollout.group_size"]["values"][0]


def test_a_run_that_has_not_written_its_settings_differs_in_nothing() -> None:
    first = {**default_settings(), "optimizer.lr": 3e-4}
    (row,) = differences([first, {}])
    assert row == {"name": "optimizer.lr", "default": row["default"], "values": ["0.0003", ""], "differs": False}


def test_defaults_are_those_of_the_tree() -> None:
    assert default_settings()["rollout.group_size"] == RolloutConfig().group_size
    assert "model.path" not in default_settings()


def test_settings_are_read_by_dotted_name(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {name: one}\ndata: {train: a.jsonl, evaluation: {}}\n")
    assert SettingsFile(tmp_path).read() == {"run.name": "one", "data.train": "a.jsonl", "data.evaluation": {}}
    assert SettingsFile(tmp_path / "none").read() == {}


def test_damaged_settings_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"config\.yaml cannot be read"):
        SettingsFile(tmp_path).read()
