"""The journal under SIGKILL of a process that does nothing but write it."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_p2o.evolve.record.journal import Journal, read_journal

WRITER = """
import sys, time
from pathlib import Path
from megatron_p2o.evolve.record.journal import Journal

journal = Journal(Path(sys.argv[1]))
number = len(journal.records)
print("writing", flush=True)
for number in range(number, number + 3000):  # not without end: its kill may come late, and the disk is finite
    journal.append({"number": number, "text": "x" * (number * 37 % 5000)})
time.sleep(600)
"""

SEVERAL_RECORDS_BYTES = 20_000


def test_journal_killed_at_random_moments_never_loses_or_repeats_a_record(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    rng = random.Random(0)
    num_records = 0
    for _ in range(8):
        num_bytes = path.stat().st_size if path.exists() else 0
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        with writer.stdout:
            assert writer.stdout.readline() == b"writing\n"
            while path.stat().st_size < num_bytes + SEVERAL_RECORDS_BYTES:
                assert writer.poll() is None
                time.sleep(0.001)
            time.sleep(rng.uniform(0.0, 0.05))
            writer.send_signal(signal.SIGKILL)
            writer.wait(30)
        records, _ = read_journal(path)
        assert [record["number"] for record in records] == list(range(len(records)))
        assert len(records) >= num_records
        num_records = len(records)
    assert num_records > 8
    with Journal(path) as journal:
        journal.append({"number": num_records})
    assert read_journal(path)[0][-1] == {"number": num_records}
