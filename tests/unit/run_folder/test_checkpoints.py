"""Checkpoints are whole or not used; the last good one is never lost."""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from megatron_p2o.files import FileDigest
from megatron_p2o.run_folder.checkpoints import (
    Best,
    CheckpointSaver,
    damage_of,
    latest_checkpoint,
    read_best,
    undamaged,
)
from megatron_p2o.run_folder.state import STATE_FILE, CheckpointError, RunState, read_state, write_state
from megatron_p2o.testing.fakes import FakePolicy

NO_SPACE = OSError(28, "No space left on device")


def state(step: int, **fields: Any) -> RunState:
    return RunState(
        **{
            **{"step": step, "epoch": 1, "batch": 2, "hard_problem_ids": ("a", "b")},
            **{"library_version": 3, "num_ledger_entries": 4},
            **fields,
        }
    )


def saved(run_dir: Path, *steps: int, keep_last: int = 9, resumed: Path | None = None) -> CheckpointSaver:
    saver = CheckpointSaver(run_dir, FakePolicy(), keep_last, resumed)
    for step in steps:
        saver.begin(state(step))
    saver.finish()
    return saver


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_the_newest_checkpoints_are_kept_and_the_last_is_found(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 10, 30, keep_last=2)
    assert names(tmp_path) == ["latest", "step-000010", "step-000030"]
    found = tmp_path / "checkpoints" / "step-000030"
    assert latest_checkpoint(tmp_path) == found
    assert read_state(found / STATE_FILE) == state(30)
    manifest = json.loads((found / "manifest.json").read_text())
    assert set(manifest["files"]) == {"run_state.json", "policy/policy.json"}
    assert manifest["versions"]["megatron-core"]
    assert latest_checkpoint(tmp_path / "fresh") is None


def test_the_best_checkpoint_outlives_newer_ones_until_another_is_better(tmp_path: Path) -> None:
    def best(step: int) -> Best:
        return Best(checkpoint=f"step-{step:06d}", step=step, set="heldout", metric="avg", score=step / 10)

    saver = CheckpointSaver(tmp_path, FakePolicy(), keep_last=1)
    assert read_best(tmp_path) is None
    for step in (1, 2, 3, 4):
        saver.begin(state(step), best(step) if step == 2 else None)
    saver.finish()
    assert names(tmp_path) == ["best", "latest", "step-000002", "step-000004"]
    assert read_best(tmp_path) == best(2)
    saver.point_best(best(4))
    saver.begin(state(5))
    saver.finish()
    assert names(tmp_path) == ["best", "latest", "step-000004", "step-000005"]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-000005"
    (tmp_path / "checkpoints" / "best").write_text("{}")
    with pytest.raises(CheckpointError, match="names no best checkpoint"):
        read_best(tmp_path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "hurt", "named"),
    [
        ("policy/policy.json", truncate, r"policy/policy\.json has 0 bytes where 1 were written"),
        ("policy/policy.json", flip_a_bit, r"policy/policy\.json does not match its sha256"),
        ("policy/policy.json", Path.unlink, r"policy/policy\.json is missing"),
        ("run_state.json", truncate, r"run_state\.json has \d+ bytes"),
        ("manifest.json", truncate, r"manifest\.json cannot be read"),
        ("manifest.json", Path.unlink, r"no manifest\.json: it was never completed"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, hurt: Callable[[Path], None], named: str
) -> None:
    saved(tmp_path, 1, 2)
    folder = tmp_path / "checkpoints"
    hurt(folder / "step-000002" / file)
    assert latest_checkpoint(tmp_path) == folder / "step-000001"
    assert "step-000002 is damaged" in caplog.text
    with pytest.raises(CheckpointError, match=rf"step-000002 is damaged: (its |it has )?{named}"):
        undamaged(folder / "step-000002")
    hurt(folder / "step-000001" / file)
    with pytest.raises(CheckpointError, match=rf"step-000001 is damaged.*{named}.*no checkpoint is left"):
        latest_checkpoint(tmp_path)


def test_a_user_can_go_back_to_an_earlier_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3)
    (tmp_path / "checkpoints" / "latest").write_text("step-000002\n")
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-000002"
    saved(tmp_path, 2, keep_last=1)
    assert names(tmp_path) == ["latest", "step-000002", "step-000003"], "a later one is not ours to remove"
    (tmp_path / "checkpoints" / "latest").write_text("step-000001")
    with pytest.raises(CheckpointError, match="names 'step-000001', which is not there"):
        latest_checkpoint(tmp_path)


def test_a_damaged_checkpoint_is_not_one_of_those_that_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, 10, 20)
    flip_a_bit(tmp_path / "checkpoints" / "step-000020" / "policy" / "policy.json")
    good = latest_checkpoint(tmp_path)
    saved(tmp_path, 15, keep_last=2, resumed=good)
    assert names(tmp_path) == ["latest", "step-000010", "step-000015", "step-000020"]
    saved(tmp_path, 25, keep_last=2, resumed=latest_checkpoint(tmp_path))
    assert names(tmp_path) == ["latest", "step-000015", "step-000025"]


@pytest.mark.parametrize(
    "content", ["[]", "7", "{", "[" * 100_000, '{"files": []}', '{"files": {"a": {"size_bytes": []}}}']
)
def test_a_file_of_a_checkpoint_that_is_other_json_is_damage_and_no_crash(tmp_path: Path, content: str) -> None:
    saved(tmp_path, 1)
    checkpoint = tmp_path / "checkpoints" / "step-000001"
    (checkpoint / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read"):
        undamaged(checkpoint)
    (checkpoint / STATE_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=r"run_state\.json is no readable run state"):
        read_state(checkpoint / STATE_FILE)


def test_a_pointer_that_is_no_name_is_an_error_with_its_path(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    pointer = tmp_path / "checkpoints" / "latest"
    pointer.write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="latest must hold the name of a checkpoint"):
        latest_checkpoint(tmp_path)
    pointer.unlink()
    pointer.mkdir()
    with pytest.raises(CheckpointError, match="latest must hold the name of a checkpoint"):
        latest_checkpoint(tmp_path)


def test_the_newest_checkpoint_that_a_healthy_step_has_shown_good_is_kept_and_is_the_way_back(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    saver = CheckpointSaver(tmp_path, FakePolicy(), keep_last=1)
    assert "no checkpoint yet" in saver.way_back(is_newest_good=False)
    for step in (1, 2, 3):
        saver.confirm(step)
        saver.begin(state(step))
        saver.finish()
    assert names(tmp_path) == ["latest", "step-000002", "step-000003"], "step 3 was healthy, so were the weights of 2"
    for step in (4, 5, 6):  # their gradients are not finite
        saver.begin(state(step))
        saver.finish()
    assert names(tmp_path) == ["latest", "step-000002", "step-000006"]
    assert f"{folder}/step-000002 is the newest that is good: write step-000002" in saver.way_back(is_newest_good=False)
    assert f"{folder}/step-000006 is good" in saver.way_back(is_newest_good=True)
    saver.confirm(7)
    assert f"{folder}/step-000006 is good" in saver.way_back(is_newest_good=False)
    saver.begin(state(7))
    saver.finish()
    assert names(tmp_path) == ["latest", "step-000006", "step-000007"]
    again = CheckpointSaver(tmp_path, FakePolicy(), keep_last=1, resumed=folder / "step-000007")
    assert "no checkpoint is known to be good" in again.way_back(is_newest_good=False)


class SlowPolicy(FakePolicy):
    """Writes when it is told to."""

    def save(self, directory: Path) -> Future[Mapping[str, FileDigest]]:
        self.directory = directory
        self.written: Future[Mapping[str, FileDigest]] = Future()
        return self.written

    def write(self) -> None:
        self.written.set_result(FakePolicy.save(self, self.directory).result())


def test_nothing_is_a_checkpoint_before_everything_is_written(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    policy = SlowPolicy()
    saver = CheckpointSaver(tmp_path, policy, keep_last=1)
    saver.begin(state(2))
    saver.check()
    # Here a kill would leave the first one, and its remains are cleared away.
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-000001"
    assert names(tmp_path) == [".partial-step-000002", "latest", "step-000001"]
    policy.write()
    saver.finish()
    assert names(tmp_path) == ["latest", "step-000002"]


def test_a_failure_is_told_at_the_next_step_and_the_checkpoint_before_stays(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    policy = SlowPolicy()
    saver = CheckpointSaver(tmp_path, policy, keep_last=1)
    saver.begin(state(2))
    policy.written.set_exception(NO_SPACE)
    with pytest.raises(CheckpointError, match=r"step-000002 could not be written.*No space left on device"):
        saver.begin(state(3))
    saver.check()
    assert names(tmp_path) == ["latest", "step-000001"]
    assert damage_of(tmp_path / "checkpoints" / "step-000001") is None


def test_a_failure_is_told_also_when_the_disk_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(path: Path) -> None:
        raise OSError(116, "Stale file handle")

    policy = SlowPolicy()
    saver = CheckpointSaver(tmp_path, policy, keep_last=1)
    saver.begin(state(1))
    monkeypatch.setattr("megatron_p2o.run_folder.checkpoints.shutil.disk_usage", stale)
    monkeypatch.setattr("megatron_p2o.run_folder.checkpoints.WRITE_TIMEOUT_S", 20.0)
    policy.written.set_exception(NO_SPACE)
    with pytest.raises(CheckpointError, match=r"step-000001 could not be written: .*No space left on device"):
        saver.finish()


def test_a_checkpoint_of_the_same_step_takes_the_others_place(tmp_path: Path) -> None:
    saver = saved(tmp_path, 1)
    saver.begin(state(1, epoch=2))
    saver.finish()
    found = tmp_path / "checkpoints" / "step-000001"
    assert read_state(found / STATE_FILE).epoch == 2
    assert names(tmp_path) == ["latest", "step-000001"]
    # A kill between the two renames.
    found.rename(found.with_name(".replaced-step-000001"))
    assert latest_checkpoint(tmp_path) == found and damage_of(found) is None


def test_a_state_keeps_the_numbers_of_a_round_also_those_that_say_yes_or_no(tmp_path: Path) -> None:
    numbers = {"best_score": 1.0, "is_cut_off": False, "pass_at_n_plain": 0}
    state = RunState(
        step=1, epoch=0, batch=1, hard_problem_ids=(), library_version=0, num_ledger_entries=0, first_round=numbers
    )
    write_state(tmp_path / "run_state.json", state)
    assert read_state(tmp_path / "run_state.json").first_round == numbers
