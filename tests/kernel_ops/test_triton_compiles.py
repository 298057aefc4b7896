"""Every Triton kernel compiles for Hopper (sm_90a) on a machine without a GPU, into what was meant."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_BYTES_LIMIT = 232_448
"""What a block may have on Hopper."""
SPILL_STORES = {
    "exponentials, gradient with entropy": 110,
    "exponentials, scoring with entropy": 110,
    "exponentials, gradient with entropy, plain": 70,
    "exponentials, scoring with entropy, plain": 20,
}
"""Budget: in the epilogue, once per tile of 128 x 256 x D multiply-adds. Every other kernel must not spill."""


@pytest.fixture(scope="module")
def compiled():
    """What `compile_sm90.py` reports, by variant; a process of its own, since this one may interpret kernels."""
    pytest.importorskip("triton", reason="triton is not installed: nothing to compile")
    script = Path(__file__).parents[2] / "kernels" / "bench" / "compile_sm90.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=600, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {kernel["name"]: kernel for kernel in json.loads(done.stdout)}


def test_every_kernel_fits_hopper_and_keeps_to_its_spill_budget(compiled):
    assert len(compiled) == 32
    for name, kernel in compiled.items():
        assert kernel["shared_bytes"] <= SHARED_BYTES_LIMIT, name
        assert kernel["registers"] <= 255, name
        assert kernel["instructions"]["STL"] <= SPILL_STORES.get(name, 0), name


def test_the_product_runs_on_tensor_cores_fed_by_bulk_copies(compiled):
    products = {name: kernel["instructions"] for name, kernel in compiled.items() if name.startswith("exponentials")}
    assert len(products) == 5
    for name, instructions in products.items():
        assert instructions["HGMMA"] > 0 and instructions["UTMALDG"] > 0, name
        assert (instructions["UTMASTG"] > 0) == ("gradient" in name), name
        assert (instructions["USETMAXREG"] > 0) == ("plain" not in name), name


def test_no_half_of_a_warp_specialized_row_block_is_moved_twice(compiled):
    for name, kernel in compiled.items():
        # The ranges of targets and of sums: without them nothing would have been looked at.
        is_halved = name.startswith("exponentials") and "plain" not in name
        assert (kernel["num_halved_ranges"] >= 2) == is_halved, name
        assert kernel["num_halved_ranges_moved_twice"] == 0, name


def test_a_range_that_is_moved_twice_is_found(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "kernels"))
    from bench.halved_ranges import halved_ranges

    moved_twice = """
    partition1(%num_rows: i32) num_warps(4) {
      %47 = arith.addi %row_start, %c64_i32 : i32
      %rows = tt.make_range {end = 128 : i32, start = 64 : i32} : tensor<64xi32>
      %rows_31 = tt.splat %47 : i32 -> tensor<64xi32>
      %rows_33 = arith.addi %rows_31, %rows : tensor<64xi32>
    """
    assert halved_ranges(moved_twice) == (1, 1)
    assert halved_ranges(moved_twice.replace("tt.splat %47", "tt.splat %row_start")) == (1, 0)
