"""What an engine on the CPU answers depends on the prompt, its seed and the weights: not on time or company."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from torch import Tensor

from megatron_p2o.config.tree import Config, DataConfig, ModelConfig, RolloutConfig, RunConfig, one_task
from megatron_p2o.rollout.engines import SglangEngines, own_sampling
from megatron_p2o.rollout.start import start_engines
from megatron_p2o.testing.tiny_model import write_tiny_qwen3
from megatron_p2o.types import PLAIN, Completion, Problem, Prompt, SamplingParams

pytestmark = pytest.mark.slow

WAIT_S = 120
SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=100, seed=7)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("model"), seed=3)


@pytest.fixture(scope="module")
def engines(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SglangEngines]:
    config = Config(
        run=RunConfig(name="test"),
        model=ModelConfig(path=str(model_path), dtype="float32"),
        data=DataConfig(train=one_task("unused")),
        rollout=RolloutConfig(max_running_requests=64, max_total_tokens=32768, request_timeout_s=WAIT_S),
        # Prompts are cut across chunks, at places that depend on what else is prefilled.
        sglang={"chunked_prefill_size": 150},
    )
    with start_engines(config, tmp_path_factory.mktemp("run"), [2]) as started:
        yield started


def prompt(problem: str, length: int) -> Prompt:
    """Return a prompt whose first half it shares with all others, as problems under one template do."""
    shared = np.random.default_rng(0).integers(3, 99, length // 2)
    own = np.random.default_rng([length, *problem.encode()]).integers(3, 99, length - length // 2)
    ids = np.concatenate([shared, own]).astype(np.int32)
    return Prompt(
        problem=Problem(id=problem, question="", answer=""), template=PLAIN, sampling_ids=ids, training_ids=ids
    )


def sample(engines: SglangEngines, prompts: Sequence[Prompt], sampling: SamplingParams = SAMPLING) -> list[Completion]:
    answers = dict(engines.generate(prompts, sampling))
    return [answers[index] for index in range(len(prompts))]


def sample_through_refresh(
    engines: SglangEngines, prompts: Sequence[Prompt], weights: Mapping[str, Tensor], version: int
) -> list[Completion]:
    """Return evolution's completions of `prompts`, refreshing the engine once each of them has its first token."""
    futures = [
        engines.broker.submit(one, own, priority="evolution")
        for one, own in zip(prompts, own_sampling(prompts, SAMPLING), strict=True)
    ]
    # The engine answers in order: when the last one has its only token, those before it have their first of many.
    last, short = [prompt("last", 20)], replace(SAMPLING, max_new_tokens=1)
    engines.broker.submit(last[0], next(own_sampling(last, short)), priority="evolution").result(WAIT_S)
    engines.refresh(weights.items(), version)
    return [future.result(WAIT_S) for future in futures]


def assert_equal_bits(ours: Completion, theirs: Completion) -> None:
    np.testing.assert_array_equal(ours.token_ids, theirs.token_ids)
    assert ours.logprobs.tobytes() == theirs.logprobs.tobytes()


def test_a_rollout_is_the_same_alone_in_company_and_after_a_pause(engines: SglangEngines, model_path: Path) -> None:
    asked = [prompt("a", 20), prompt("b", 63), prompt("b", 63), prompt("c", 140), prompt("d", 331)]
    alone = [
        sample(engines, asked[:1])[0],
        *sample(engines, asked[1:3]),
        *(sample(engines, [one])[0] for one in asked[3:]),
    ]
    assert max(len(completion.token_ids) for completion in alone) > 64
    assert not np.array_equal(alone[1].token_ids, alone[2].token_ids), "siblings have seeds of their own"

    others = [prompt(f"other {number}", 16 + 3 * number) for number in range(64)]
    mixed = [*others[:32], *asked, *others[32:]]
    for ours, theirs in zip(sample(engines, mixed)[32 : 32 + len(asked)], alone, strict=True):
        assert_equal_bits(ours, theirs)

    # A refresh in mid-generation takes the keys away and empties the prefix cache; the weights are what they were.
    # On a busy machine all may have been answered before its pause comes: then the next one is tried.
    weights = load_file(model_path / "model.safetensors")
    company = [*others[:24], *asked, *others[-24:]]
    for version in range(1, 21):
        paused = sample_through_refresh(engines, company, weights, version)
        for ours, theirs in zip(paused[24 : 24 + len(asked)], alone, strict=True):
            assert_equal_bits(ours, theirs)
        if any(one.weight_versions == (version - 1, version) for one in paused[24 : 24 + len(asked)]):
            return
    pytest.fail("no refresh fell into the generation")


def test_greedy_company_changes_no_rollout_and_is_not_changed(engines: SglangEngines) -> None:
    greedy = SamplingParams(temperature=0.0, max_new_tokens=100, seed=5)
    asked, trials = [prompt("a", 20), prompt("c", 140)], [prompt(f"trial {number}", 40) for number in range(6)]
    alone, trials_alone = sample(engines, asked), sample(engines, trials, greedy)
    futures = [
        engines.broker.submit(one, own, priority="evolution")
        for one, own in zip(trials, own_sampling(trials, greedy), strict=True)
    ]
    together = sample(engines, asked)
    for ours, theirs in zip(
        [*together, *(future.result(WAIT_S) for future in futures)], [*alone, *trials_alone], strict=True
    ):
        assert_equal_bits(ours, theirs)


def test_another_seed_gives_another_rollout_and_tokens_follow_their_probabilities(engines: SglangEngines) -> None:
    asked = [prompt("a", 20)] * 512
    first = sample(engines, asked, SamplingParams(temperature=1.0, max_new_tokens=1, seed=1))
    second = sample(engines, asked, SamplingParams(temperature=1.0, max_new_tokens=1, seed=2))
    tokens = np.array([[int(one.token_ids[0]) for one in batch] for batch in (first, second)])
    assert (tokens[0] != tokens[1]).mean() > 0.5
    probability = {int(one.token_ids[0]): float(np.exp(one.logprobs[0])) for one in (*first, *second)}
    likeliest = max(probability, key=probability.__getitem__)
    expected = probability[likeliest]
    # Five standard deviations of 1024 draws; seeds are fixed, so this cannot fail by chance.
    assert abs((tokens == likeliest).mean() - expected) < 5 * np.sqrt(expected * (1 - expected) / tokens.size)
