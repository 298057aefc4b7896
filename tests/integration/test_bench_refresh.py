"""The benchmark of a weight refresh runs against a real engine, and every way of it brings the weights."""

import json
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.slow

TOOL = Path(__file__).parents[2] / "tools" / "bench_refresh.py"


def test_every_way_brings_the_weights_and_its_parts_add_up(tmp_path: Path):
    command = [sys.executable, str(TOOL), "--shape", "tiny", "--engines", "1", "--repeats", "1", "--bucket-mib", "4"]
    command += ["--json", str(tmp_path / "result.json")]
    # A file, because torch's sharing daemon would hold a pipe open.
    with (tmp_path / "log").open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=log, timeout=240, check=False)
    assert done.returncode == 0, (tmp_path / "log").read_text()  # it stops when a way leaves other weights
    result = json.loads((tmp_path / "result.json").read_text())
    # By hand: 4 layers, hidden 128, heads of 16: 8 query, 2 key; MLP 384; 8,192 tokens, head and embedding tied.
    per_layer = 2 * 128 * 128 + 2 * 128 * 32 + 3 * 128 * 384 + 2 * 128 + 2 * 16
    assert result["num_bytes"] == 4 * (8192 * 128 + 4 * per_layer + 128)
    ways = [(arm["way"], arm["is_verified"]) for arm in result["arms"]]
    ours = [(f"ours, {way}", is_verified) for way in ("host", "device") for is_verified in (True, False)]
    assert ways == [*ours, ("sglang tensor", False), ("sglang disk", False)]
    for arm in result["arms"][:4]:
        seconds = {key: values["median"] for key, values in arm["later"].items()}
        assert 0 < seconds["convert_s"] + seconds["fill_s"] + seconds["stall_s"] < seconds["total_s"]
    assert [arm["first"] is not None for arm in result["arms"]] == [True, False, True, False, False, False]


def test_a_lost_engine_is_named_with_the_end_of_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(TOOL.parent))
    import bench_refresh

    def call_every_engine(call):
        answers = Future()
        answers.set_result({"engine-1": [-1.0]})
        return answers

    (tmp_path / "engine-0.log").write_text("loaded\nout of memory\n")
    with pytest.raises(SystemExit, match=r"1 of 2 engines were lost\nengine-0.log:\nloaded\nout of memory"):
        bench_refresh.probed(SimpleNamespace(call_every_engine=call_every_engine), 2, tmp_path)
