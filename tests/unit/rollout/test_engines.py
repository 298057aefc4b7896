"""What the engines of a run do at a refresh, by the settings; no engine is started."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import Tensor

from megatron_p2o.interfaces import NamedWeights
from megatron_p2o.rollout.engines import SglangEngines
from megatron_p2o.testing.fakes import FakeRenderer, fake_config, fake_problem
from megatron_p2o.types import PLAIN, SamplingParams


class Sync:
    """Stands in for the refresh itself and notes whether weights were to be compared."""

    def __init__(self) -> None:
        self.compared: list[bool] = []
        self.fails = False

    def refresh(self, weights: NamedWeights, version: int, *, verify: bool) -> SimpleNamespace:
        if self.fails:
            raise RuntimeError("no")
        self.compared.append(verify)
        return SimpleNamespace(metrics=dict)

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("every", "expected"),
    [(1, [True] * 5), (2, [True, False, True, False, True]), (4, [True, False, False, False, True]), (0, [False] * 5)],
)
def test_weights_are_compared_at_the_first_refresh_and_at_every_nth_after_it(
    every: int, expected: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engines_of(every, tmp_path) as engines:
        sync = Sync()
        monkeypatch.setattr(engines, "_sync", sync)
        for version in range(1, 6):
            engines.refresh(no_weights(), version)
        assert sync.compared == expected


def test_a_refresh_that_failed_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with engines_of(2, tmp_path) as engines:
        sync = Sync()
        monkeypatch.setattr(engines, "_sync", sync)
        sync.fails = True
        with pytest.raises(RuntimeError, match="no"):
            engines.refresh(no_weights(), 1)
        sync.fails = False
        for version in (1, 2):
            engines.refresh(no_weights(), version)
        assert sync.compared == [True, False]


def test_a_gate_that_does_not_close_refuses_the_rollouts_and_lets_servers_start_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engines_of(2, tmp_path) as engines:
        let_go: list[bool] = []
        monkeypatch.setattr(engines, "_sync", Sync())
        monkeypatch.setattr(engines._supervisor, "let_go", lambda: let_go.append(True))
        with monkeypatch.context() as stuck:
            stuck.setattr(engines.broker, "admit", stuck_gate)
            with pytest.raises(TimeoutError, match="stuck"):
                engines.refresh(no_weights(), 1)
        assert let_go == [True]
        prompt = FakeRenderer().render(fake_problem(1), PLAIN)
        with pytest.raises(TimeoutError, match="stuck"):
            list(engines.generate([prompt], SamplingParams(temperature=1.0, max_new_tokens=1)))
        engines.refresh(no_weights(), 1)
        assert let_go == [True, True]


def stuck_gate(priorities: frozenset[str]) -> None:
    raise TimeoutError("the loop is stuck")


def no_weights() -> Iterator[tuple[str, Tensor]]:
    yield from ()


def engines_of(verify_every: int, run_dir: Path) -> closing[SglangEngines]:
    config = fake_config({"rollout.verify_every": verify_every})
    return closing(
        SglangEngines(
            config, run_dir, [], lambda *_: pytest.fail("no server"), stop_token_ids=[], releases_memory=False
        )
    )
