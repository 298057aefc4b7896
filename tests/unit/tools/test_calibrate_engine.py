"""The coefficients of an engine, found again from batches that were simulated with them."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from megatron_p2o.simulation.batch import EngineCoefficients

ROOT = Path(__file__).parents[3]


def coefficients(cached_token_s: float, chunk_tokens: int) -> EngineCoefficients:
    return EngineCoefficients(
        step_s=4e-3,
        sequence_s=3e-4,
        cached_token_s=cached_token_s,
        prefill_step_s=6e-3,
        prefill_token_s=2e-5,
        chunk_tokens=chunk_tokens,
    )


@pytest.mark.parametrize("cached_token_s", [0.0, 2e-7])
def test_coefficients_are_found_again_from_simulated_batches(tool: Any, cached_token_s: float) -> None:
    true = coefficients(cached_token_s, tool.CHUNK_TOKENS)
    workloads = tool.equal_batches()
    found = tool.fitted(workloads, [tool.simulated_seconds(true, workload) for workload in workloads])
    assert asdict(found) == pytest.approx(asdict(true), rel=1e-6, abs=1e-12)


def test_a_coefficient_that_would_be_negative_is_none(tool: Any) -> None:
    rows = tool.np.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
    step, each = tool.nonnegative_least_squares(rows, tool.np.array([3.0, 2.0, 1.0]))
    assert (step, each) == (pytest.approx(2.0), 0.0)
