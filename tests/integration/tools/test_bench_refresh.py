"""The benchmark of a weight refresh runs against a real engine, and every way of it brings the weights."""

import json
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.slow

TOOL = Path(__file__).parents[3] / "tools" / "bench_refresh.py"


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


def test_without_engines_the_trainer_s_part_of_every_way_is_timed(tmp_path: Path):
    command = [sys.executable, str(TOOL), "--shape", "tiny", "--engines", "0", "--repeats", "2"]
    command += ["--bucket-mib", "1", "4", "--json", str(tmp_path / "result.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    ways = [(arm["way"], arm["bucket_mib"], arm["is_verified"]) for arm in result["arms"]]
    ours = [(f"ours, {way}", mib, check) for mib in (1, 4) for way in ("host", "device") for check in (True, False)]
    assert ways == [("gather", None, False), *ours] and result["missing"] == ""
    assert all(arm["num_engines"] == 0 for arm in result["arms"])


@pytest.mark.parametrize("way", ["host", "device"])
def test_a_weight_that_lies_otherwise_ends_the_benchmark(way: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(TOOL.parent))
    import random_policy  # noqa: F401  makes ours importable
    import torch
    import weight_path

    from megatron_p2o.rollout.buckets.staging import MemoryFile
    from megatron_p2o.rollout.refresh.weight_sync import WeightSync

    weights = [("good", torch.arange(6.0)), ("torn", torch.arange(5.0))]

    def torn(entry, bucket):
        if entry.name == "torn":
            bucket[entry.offset_bytes] ^= 1

    if way == "host":
        sync = WeightSync(
            weight_path.NoEngines(), Path(), tensor_parallel=1, answer_timeout_s=1.0, bucket_bytes=1 << 20
        )
        stage = sync.stage

        def staged(weights, *, verify):
            for bucket in stage(weights, verify=verify):
                for entry in bucket.message(0, bucket.address, verify=True).entries:
                    torn(entry, bucket.content)
                yield bucket

        with pytest.raises(SystemExit, match="torn lies in host memory otherwise"):
            weight_path.check_host(SimpleNamespace(stage=staged), weights)
        sync.close()
        return
    spans = [MemoryFile(64) for _ in range(2)]

    def put(index, entry, tensor):
        entry.view(spans[index % 2].content).copy_(tensor)
        torn(entry, spans[index % 2].content)

    with pytest.raises(SystemExit, match="torn lies on the device otherwise"):
        weight_path.check_device(SimpleNamespace(put=put, _spans=spans), weights, 1 << 20)


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
