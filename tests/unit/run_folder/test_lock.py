import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TextIO

import pytest

from megatron_p2o.run_folder.lock import hold_run

HOLD = """
import sys, time
from pathlib import Path
from megatron_p2o.run_folder.lock import hold_run
with hold_run(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_holder_is_told_who_has_the_folder_until_that_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        who = rf"{re.escape(str(folder))} is in use by process {holder.pid} on \S+: .* remove .*/lock$"
        with pytest.raises(ValueError, match=who), hold_run(folder):
            pass
        holder.send_signal(signal.SIGKILL)
    with hold_run(folder):
        # The name of the holder before, which may be longer, is gone.
        assert (folder / "lock").read_text().startswith(f"process {os.getpid()} on ")
        assert (folder / "lock").read_text().count("process") == 1


def test_a_patient_start_takes_the_folder_when_the_one_before_lets_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_held, may_end = threading.Event(), threading.Event()
    told: list[str] = []

    def tell(text: str, stream: TextIO) -> None:
        assert stream is sys.stderr
        told.append(text)
        may_end.set()

    def hold() -> None:
        with hold_run(tmp_path):
            is_held.set()
            assert may_end.wait(20)

    before = threading.Thread(target=hold)
    monkeypatch.setattr("megatron_p2o.run_folder.lock.say", tell)
    before.start()
    assert is_held.wait(120)
    with hold_run(tmp_path, patience_s=120), pytest.raises(ValueError, match="in use by process"), hold_run(tmp_path):
        pass
    before.join()
    assert told == [f"waiting for another p2o to let go of {tmp_path / 'lock'}"]
