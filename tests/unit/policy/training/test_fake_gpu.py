"""The GPU path on fake tensors: devices and dtypes fit, and the host waits for the device only where it must."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_p2o.testing.tiny_model import write_kernel_sized_qwen3

WAITS = {
    # How many rows the head computes decides its chunks.
    "forward": {"item in advantage/triton_path.py:active_token_index_triton": 1},
    "logprobs": {
        # The rows whose log-probs are asked for are known to the host by their number.
        "nonzero in policy/model/head.py:_logprobs": 1,
        "nonzero in policy/training/forward.py:_on_positions": 1,
        # The result itself: log-probs and whose they are, when the device has nothing left to do.
        "mask in policy/training/forward.py:_by_sample": 2,
        "to cpu in policy/training/forward.py:_by_sample": 2,
    },
}


def test_the_device_is_waited_for_only_where_its_answer_is_needed(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed: there is no GPU path")
    program = Path(__file__).parent / "fake_gpu_pass.py"
    command = [sys.executable, "-W", "ignore", str(program), str(write_kernel_sized_qwen3(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["waits"] == WAITS
    assert report["samples"] == [0, 1, 2, 3, 4]
    both = {"target_logits_kernel", "exponentials_kernel", "softmax_rows_kernel"}
    gradients = {"token_losses_kernel", "hidden_grad_kernel", "scale_rows_kernel", "add_target_rows_kernel"}
    rows = {"count_active_kernel", "active_token_index_kernel"}
    assert set(report["launches"]) == both | gradients | rows and set(report["logprobs_launches"]) == both
