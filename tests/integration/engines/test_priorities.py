"""Training goes first inside an engine, too: it takes KV cache from evolution, which loses time and no token."""

import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path

import numpy as np
import pytest

from megatron_p2o.config.tree import (
    Config,
    DataConfig,
    EvolutionConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    one_task,
)
from megatron_p2o.rollout.engines import SglangEngines, own_sampling
from megatron_p2o.rollout.start import start_engines
from megatron_p2o.testing.tiny_model import write_tiny_qwen3
from megatron_p2o.types import PLAIN, Completion, Problem, Prompt, SamplingParams

pytestmark = pytest.mark.slow

WAIT_S = 600
MOST_TRIES = 10
CACHE_TOKENS = 4096
RARE_END = 101
"""A token that ends a completion, like the model's own: completions have many lengths."""

NUM_TRAINING, TRAINING_TOKENS = 24, 100
NUM_EVOLUTION, EVOLUTION_TOKENS = 100, 240
TRAINING = SamplingParams(temperature=1.0, max_new_tokens=TRAINING_TOKENS, seed=7)


def config_of(model: Path, max_slowdown: float = math.inf) -> Config:
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
        evolution=EvolutionConfig(max_slowdown=max_slowdown),
    )


@pytest.fixture(scope="module", params=[math.inf, 0.0], ids=["preempted by the engine", "paused by the broker"])
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SglangEngines]:
    config = config_of(write_tiny_qwen3(tmp_path_factory.mktemp("model"), seed=3), request.param)
    with start_engines(config, tmp_path_factory.mktemp("run"), [RARE_END]) as started:
        yield started


def max_slowdown_of(engines: SglangEngines) -> float:
    return engines._config.evolution.max_slowdown


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
    answers = dict(engines.generate(prompts("training", NUM_TRAINING), TRAINING))
    return [answers[index] for index in range(NUM_TRAINING)]


def train_amid_evolution(engines: SglangEngines) -> tuple[list[str], list[Completion], list[Completion]]:
    """Have training come when the first request of evolution has ended.

    Return the kinds of the requests in the order in which they ended, and the completions of both kinds.
    """
    ended: list[str] = []

    async def submit_training() -> list[Future[Completion]]:
        asked = prompts("training", NUM_TRAINING)
        futures = [
            engines.broker.submit(prompt, own) for prompt, own in zip(asked, own_sampling(asked, TRAINING), strict=True)
        ]
        for future in futures:
            future.add_done_callback(lambda _: ended.append("training"))
        return futures

    behind = submit_evolution(engines, prompts("evolution", NUM_EVOLUTION))
    for future in behind:
        future.add_done_callback(lambda _: ended.append("evolution"))
    done, _ = wait(behind, WAIT_S, return_when=FIRST_COMPLETED)
    assert done, "the engine is at work on evolution"
    # On the broker's loop, where no request ends before its end is noted.
    ahead = engines.broker._thread.run(submit_training()).result(WAIT_S)
    first, preempted = ([future.result(WAIT_S) for future in futures] for futures in (ahead, behind))
    return ended, first, preempted


def assert_equal_bits(ours: Sequence[Completion], theirs: Sequence[Completion]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        assert one.logprobs.tobytes() == other.logprobs.tobytes()


def test_training_overtakes_a_hundred_evolution_requests_which_lose_no_token(engines: SglangEngines) -> None:
    alone = training(engines)
    undisturbed = [future.result(WAIT_S) for future in submit_evolution(engines, prompts("evolution", NUM_EVOLUTION))]

    # While this process is stalled the engine goes on with evolution: that may add to both numbers.
    for _ in range(MOST_TRIES):
        engines.metrics()
        ended, first, preempted = train_amid_evolution(engines)
        assert_equal_bits(first, alone)
        assert_equal_bits(preempted, undisturbed)
        begin, end = ended.index("training"), len(ended) - ended[::-1].index("training")
        num_before, num_overtaken_by = ended[:begin].count("evolution"), ended[begin:end].count("evolution")
        # The cache holds 14 requests of evolution: training would wait for more than 80 of them in an engine's own
        # order. KV cache for all of training is taken at once: 24 x (40 + 100) of 4,096 tokens. What is left holds two
        # or three requests of evolution while training samples its 100 tokens.
        if num_before < NUM_EVOLUTION // 2 and num_overtaken_by <= 4:
            break
    else:
        pytest.fail(f"training came after {num_before} requests of evolution and was overtaken by {num_overtaken_by}")
    assert (engines.metrics()["engine/evolution_pauses_count"] > 0) == (max_slowdown_of(engines) == 0)


def test_evolution_that_gave_way_to_training_survives_its_engine(engines: SglangEngines) -> None:
    alone = training(engines)
    undisturbed = [future.result(WAIT_S) for future in submit_evolution(engines, prompts("evolution", 30))]

    for _ in range(MOST_TRIES):
        behind = submit_evolution(engines, prompts("evolution", 30))
        wait(behind, WAIT_S, return_when=FIRST_COMPLETED)
        answers = engines.generate(prompts("training", NUM_TRAINING), TRAINING)
        first = [next(answers)]
        does_evolution_wait = any(not future.done() for future in behind)
        if does_evolution_wait:
            os.kill(engines._supervisor.servers[0].pid, signal.SIGKILL)
        by_index = dict([*first, *answers])
        assert_equal_bits([by_index[index] for index in range(NUM_TRAINING)], alone)
        assert_equal_bits([future.result(WAIT_S) for future in behind], undisturbed)
        if does_evolution_wait:
            break
    else:
        pytest.fail("evolution was always over when the first of training was")
    # If both ended just before the engine did, its end shows only when somebody looks.
    deadline = time.monotonic() + WAIT_S
    while engines._supervisor.num_restarts == 0 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert engines.metrics()["engine/restarts_count"] == 1


def test_an_engine_that_does_not_take_the_plugin_is_an_error_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_PLUGINS", "another")
    config = config_of(write_tiny_qwen3(tmp_path / "model", seed=3))
    with pytest.raises(ValueError, match=r"cannot put training before evolution: .* unset SGLANG_PLUGINS"):
        start_engines(config, tmp_path, [RARE_END])
