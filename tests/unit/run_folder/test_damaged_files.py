"""One byte that a disk has changed costs a run one line of a file, and that is named."""

import json
import random
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from megatron_p2o.config.tree import LoggingConfig
from megatron_p2o.metrics.jsonl import read_lines, read_records
from megatron_p2o.metrics.log import open_metrics_log
from megatron_p2o.metrics.read import read_metrics
from megatron_p2o.rl.hard_samples import LedgerEntry, entry_from
from megatron_p2o.run_folder.state import CheckpointError, LedgerFile

NUM_KEPT, NUM_LATER = 12, 3


def entry(number: int) -> LedgerEntry:
    return LedgerEntry(
        epoch=0,
        step=number // 4 + 1,
        problem_id=f"walk-{number}" if number < NUM_KEPT else f"LATER-{number}",
        plain_tries=4,
        plain_solved=number % 5,
        templated_tries=0,
        templated_solved=0,
    )


ENTRIES = [entry(number) for number in range(NUM_KEPT + NUM_LATER)]
LINES = [json.dumps(asdict(each)).encode() + b"\n" for each in ENTRIES]


def flipped(content: bytes, position: int, bit: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]


def test_every_flipped_byte_of_the_ledger_costs_at_most_the_lines_it_touches(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every fifth byte of what the checkpoint counts, and all around two newlines, each with a bit of its own."""
    path = tmp_path / "hard_samples.jsonl"
    rng = random.Random(0)
    num_bytes = sum(map(len, LINES[:NUM_KEPT]))
    newlines = (len(LINES[0]) - 1, num_bytes - 1)
    around = [newline + offset for newline in newlines for offset in range(-12, 13)]
    for position in sorted({*range(0, num_bytes, 5), *(place for place in around if place < num_bytes)}):
        caplog.clear()
        content = flipped(b"".join(LINES), position, rng.randrange(8))
        path.write_bytes(content)
        ledger = LedgerFile(path, NUM_KEPT)
        ledger.close()
        known = [history for each in ENTRIES if (history := ledger.ledger.history(each.problem_id))]
        whole = [each for history in known for each in history if each in ENTRIES[:NUM_KEPT]]
        assert not any(ledger.ledger.history(each.problem_id) for each in ENTRIES[NUM_KEPT:]), position
        is_noticed = "hard_samples.jsonl:" in caplog.text
        assert len(whole) >= NUM_KEPT - (2 if is_noticed else 1), position
        assert content.startswith(path.read_bytes()), "what is damaged stays where it is"
        assert ledger.num_entries == NUM_KEPT
        (tmp_path / "hard_samples.jsonl.discarded").unlink()


def test_a_damaged_entry_of_the_ledger_is_named_by_its_line_and_a_resume_later_counts_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "hard_samples.jsonl"
    lines = [*LINES[:4], b'{"epoch": 0, "step": 2, "problem_id": "walk-4", "plain_tries": 4, \xff\n', *LINES[5:]]
    path.write_bytes(b"".join(lines))
    first = LedgerFile(path, NUM_KEPT)
    assert "hard_samples.jsonl:5 is damaged" in caplog.text
    assert first.ledger.history("walk-4") == () and first.ledger.history("walk-5") == (ENTRIES[5],)
    first.append(ENTRIES[NUM_KEPT:])
    first.close()
    assert path.read_bytes() == b"".join(lines)
    assert (tmp_path / "hard_samples.jsonl.discarded").read_bytes() == b"".join(LINES[NUM_KEPT:])
    again = LedgerFile(path, first.num_entries)
    again.close()
    assert again.ledger.history("LATER-14") == (ENTRIES[14],)
    assert list(read_records(path, entry_from)) == [each for each in ENTRIES if each.problem_id != "walk-4"]
    with pytest.raises(CheckpointError, match="holds 15 ledger entries where the checkpoint counts 16: restore"):
        LedgerFile(path, 16)


@pytest.mark.parametrize(
    "damage", ['"plain_solved": 9', '"plain_tries": -4', '"plain_solved": "1"', '"plain_solvet": 1', '"step": 1.5']
)
def test_an_entry_that_is_json_but_cannot_be_true_is_damaged(tmp_path: Path, damage: str) -> None:
    name = damage.partition(":")[0].replace("solvet", "solved")
    path = tmp_path / "hard_samples.jsonl"
    changed = re.sub(rf"{name}: [^,}}]+", damage, LINES[2].decode())
    assert changed != LINES[2].decode()
    path.write_bytes(b"".join([LINES[0], changed.encode(), LINES[3]]))
    assert [each.problem_id for each in read_records(path, entry_from)] == ["walk-0", "walk-3"]


@pytest.mark.parametrize("reward", ["NaN", "-0.5", "1e9"])
def test_an_entry_with_impossible_rewards_is_damaged(tmp_path: Path, reward: str) -> None:
    path = tmp_path / "hard_samples.jsonl"
    changed = json.dumps({**json.loads(LINES[2]), "plain_reward": "?"}).replace('"?"', reward)
    path.write_bytes(b"".join([LINES[0], changed.encode() + b"\n", LINES[3]]))
    assert [each.problem_id for each in read_records(path, entry_from)] == ["walk-0", "walk-3"]


def test_a_damaged_line_of_the_metrics_stays_where_it_is_and_the_others_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    quiet = LoggingConfig(console=False)
    with open_metrics_log(tmp_path, "run", quiet, num_steps=9) as log:
        for step in range(1, 6):
            log.write(step, 0, {})
    lines = path.read_bytes().splitlines(keepends=True)
    for broken in (
        lines[1].replace(b"metrics", b"metric\xf3"),
        lines[1].replace(b'"step"', b'"stfp"'),
        lines[1].replace(b"{}", b"[" * 100_000),
    ):
        path.write_bytes(b"".join([lines[0], broken, *lines[2:]]))
        caplog.clear()
        with open_metrics_log(tmp_path, "run", quiet, num_steps=9, num_kept=4) as log:
            log.write(5, 0, {})
        assert [line.step for line in read_metrics(path)] == [1, 3, 4, 5]
        assert "metrics.jsonl:2 is damaged" in caplog.text
        assert path.read_bytes().splitlines(keepends=True)[1] == broken
    assert (tmp_path / "metrics.jsonl.discarded").read_bytes().splitlines(keepends=True)[0] == lines[4]


def test_a_newline_that_is_gone_and_one_too_many_shift_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [b'{"step": %d, "metrics": {}}\n' % step for step in range(6)]
    whole = b"".join(lines)
    for content in (whole.replace(b"}}\n", b"}}J", 2).replace(b"}}J", b"}}\n", 1), whole.replace(b"2, ", b"2\n ")):
        assert content != whole
        path.write_bytes(content)
        with open_metrics_log(tmp_path, "run", LoggingConfig(console=False), num_steps=9, num_kept=4):
            pass
        assert max(line["step"] for line in read_lines(path)) == 3
