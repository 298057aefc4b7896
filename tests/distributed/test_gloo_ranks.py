"""The fork harness itself."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from megatron_p2o.testing.distributed import run_gloo_ranks


def test_ranks_compute_together_and_results_come_back_in_rank_order():
    def total_of_ranks(offset: int) -> tuple[int, float]:
        value = torch.tensor(float(dist.get_rank() + offset))
        dist.all_reduce(value)
        return dist.get_rank(), float(value)

    assert run_gloo_ranks(total_of_ranks, 3, 10) == [(0, 33.0), (1, 33.0), (2, 33.0)]


def test_a_failing_rank_is_reported_with_its_traceback_and_frees_the_others():
    def fail_on_rank_1() -> None:
        if dist.get_rank() == 1:
            raise ArithmeticError("broken on purpose")
        dist.barrier()

    with pytest.raises(RuntimeError, match=r"rank 1:\nTraceback(.|\n)*ArithmeticError: broken on purpose"):
        run_gloo_ranks(fail_on_rank_1, 2)


def test_a_rank_that_dies_is_reported_with_its_exit_code():
    def die_on_rank_0() -> None:
        if dist.get_rank() == 0:
            os._exit(7)

    with pytest.raises(RuntimeError, match=r"rank 0:\nthe process died without an exception \(exit code 7\)"):
        run_gloo_ranks(die_on_rank_0, 2)


def test_a_hanging_rank_is_killed_at_the_limit():
    def sleep_on_rank_1() -> int:
        if dist.get_rank() == 1:
            time.sleep(600)
        return os.getpid()

    message = ""
    for limit_s in (0.7, 5.0, 60.0):  # on a busy machine rank 0 may not end within the shorter ones either
        with pytest.raises(TimeoutError) as caught:
            run_gloo_ranks(sleep_on_rank_1, 2, timeout_s=limit_s)
        message = str(caught.value)
        assert message.endswith(f" within {limit_s:g} s; they were killed")
        if "ranks [1]" in message:
            break
    assert message.startswith("sleep_on_rank_1 did not end on ranks [1] within ")
