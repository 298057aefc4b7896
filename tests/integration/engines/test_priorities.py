"""Training goes first inside an engine, too: it takes KV cache from evolution, which loses time and no token."""

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path

import numpy as np
import pytest

from megatron_p2o.config.tree import Config, DataConfig, ModelConfig, RolloutConfig, RunConfig, one_task
from megatron_p2o.rollout.engines import SglangEngines, own_sampling
from megatron_p2o.rollout.start import start_engines
from megatron_p2o.testing.tiny_model import write_tiny_qwen3
from megatron_p2o.types import PLAIN, Completion, Problem, Prompt, SamplingParams

pytestmark = pytest.mark.slow

WAIT_S = 240
CACHE_TOKENS = 4096
NO_STOP = 101
"""A token that the model does not have: every completion is as long as it may be."""

NUM_TRAINING, TRAINING_TOKENS = 24, 100
NUM_EVOLUTION, EVOLUTION_TOKENS = 100, 240


def config_of(model: Path) -> Config:
    return Config(
        run=RunConfig(name="test"),
        model=ModelConfig(path=str(model), dtype="float32"),
        data=DataConfig(train=one_task("unused")),
        # Slots for all: what is scarce is the KV cache.
        rollout=RolloutConfig(
            max_running_requests=NUM_TRAINING + NUM_EVOLUTION,
            max_total_tokens=CACHE_TOKENS,
            request_timeout_s=WAIT_S,
            deterministic=True,
        ),
    )


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SglangEngines]:
    config = config_of(write_tiny_qwen3(tmp_path_factory.mktemp("model"), seed=3))
    with start_engines(config, tmp_path_factory.mktemp("run"), [NO_STOP]) as started:
        yield started


def prompts(kind: str, count: int, length: int = 40) -> list[Prompt]:
    def one(index: int) -> Prompt:
        ids = np.random.default_rng([index, *kind.encode()]).integers(3, 99, length).astype(np.int32)
        problem = Problem(id=f"{kind} {index}", question="", answer="")
        return Prompt(problem=problem, template=PLAIN, sampling_ids=ids, training_ids=ids)

    return [one(index) for index in range(count)]


def submit_evolution(engines: SglangEngines, asked: Sequence[Prompt]) -> list[Future[Completion]]:
    sampling = SamplingParams(temperature=0.0, max_new_tokens=EVOLUTION_TOKENS, seed=5)
    return [
        engines.broker.submit(prompt, own, priority="evolution")
        for prompt, own in zip(asked, own_sampling(asked, sampling), strict=True)
    ]


def training(engines: SglangEngines) -> list[Completion]:
    sampling = SamplingParams(temperature=1.0, max_new_tokens=TRAINING_TOKENS, seed=7)
    answers = dict(engines.generate(prompts("training", NUM_TRAINING), sampling))
    return [answers[index] for index in range(NUM_TRAINING)]


def assert_equal_bits(ours: Sequence[Completion], theirs: Sequence[Completion]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        assert one.logprobs.tobytes() == other.logprobs.tobytes()


def test_training_overtakes_a_hundred_evolution_requests_which_lose_no_token(engines: SglangEngines) -> None:
    alone = training(engines)
    undisturbed = [future.result(WAIT_S) for future in submit_evolution(engines, prompts("evolution", NUM_EVOLUTION))]

    behind = submit_evolution(engines, prompts("evolution", NUM_EVOLUTION))
    done, _ = wait(behind, WAIT_S, return_when=FIRST_COMPLETED)
    assert done, "the engine is at work on evolution"
    num_before = sum(future.done() for future in behind)
    first = training(engines)
    num_overtaken_by = sum(future.done() for future in behind) - num_before
    # KV cache for all of training is taken at once: 24 x (40 + 100) of 4,096 tokens. What is left holds two or three
    # requests of evolution while training samples its 100 tokens.
    assert num_overtaken_by <= 4
    preempted = [future.result(WAIT_S) for future in behind]
    assert_equal_bits(first, alone)
    assert_equal_bits(preempted, undisturbed)


def test_an_engine_that_does_not_take_the_plugin_is_an_error_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_PLUGINS", "another")
    config = config_of(write_tiny_qwen3(tmp_path / "model", seed=3))
    with pytest.raises(ValueError, match=r"cannot put training before evolution: .* unset SGLANG_PLUGINS"):
        start_engines(config, tmp_path, [NO_STOP])
