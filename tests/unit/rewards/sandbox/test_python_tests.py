"""Which of an answer's names its Python tests see."""

import pytest

from megatron_p2o.rewards.sandbox.python_tests import names_for_tests


@pytest.mark.parametrize(
    ("test", "entry_point", "seen"),
    [
        ("assert abs(f(2) - 4) < 1e-6", None, ["f", "helper"]),
        ("def check(g):\n    assert all(g(x) for x in range(3))", "f", ["f", "helper"]),
        ("assert abs(-1) == 1", None, ["f", "abs", "all", "helper"]),
        ("import math\nassert math.floor(abs(-1.5)) == 1", None, ["f", "abs", "all", "helper"]),
        ("def check(g):\n    assert all(g(x) for x in range(3))", "abs", ["f", "abs", "helper"]),
    ],
)
def test_an_answer_hides_no_built_in_that_its_tests_need(test: str, entry_point: str | None, seen: list[str]) -> None:
    assert names_for_tests(["f", "abs", "all", "helper", "no name", 3], [(test, entry_point)]) == seen
