"""The simulated engine against closed forms: what a batch takes can be counted by hand."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from megatron_p2o.simulation.batch import EngineCoefficients
from megatron_p2o.simulation.engine import SimulatedEngine
from megatron_p2o.simulation.virtual_time import SimulationStalled, simulate
from megatron_p2o.types import SamplingParams

STEP, SEQUENCE, TOKEN = 0.006, 20e-6, 0.06e-6
COEFFICIENTS = EngineCoefficients(
    step_s=STEP, sequence_s=SEQUENCE, cached_token_s=TOKEN, prefill_step_s=0.01, prefill_token_s=1e-5, chunk_tokens=1000
)
PROMPT = 200


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    simulate(lambda _: main())


def engine_with(length: int = 0, **options: Any) -> SimulatedEngine:
    """Return an engine that answers as long as it may unless `length` is given."""
    defaults: dict[str, Any] = {"cache_tokens": 10**9, "max_running": 1000}
    return SimulatedEngine(COEFFICIENTS, lambda ids, sampling: length or sampling.max_new_tokens, **defaults | options)


class Asked:
    """Requests to an engine, and when each was answered."""

    def __init__(self, engine: SimulatedEngine) -> None:
        self.engine = engine
        self.ended_s: dict[str, float] = {}
        self.order: list[str] = []

    async def ask(self, name: str, num_tokens: int, prompt: int | None = None, priority: int = 0) -> int:
        ids = np.full(PROMPT, abs(hash(name)) % 10**6 if prompt is None else prompt, np.int32)
        sampling = SamplingParams(temperature=1.0, max_new_tokens=num_tokens)
        generation = await self.engine.generate(ids, sampling, name, priority=priority)
        self.ended_s[name] = asyncio.get_running_loop().time()
        self.order.append(name)
        return len(generation.token_ids)


def prefill(num_tokens: int) -> float:
    return 0.01 + 1e-5 * num_tokens


def decode(num_sequences: int, tokens_of_each: int, prompts: int) -> float:
    """Return the sum over the steps, written out: the first token of each comes with the prefill."""
    cached = np.arange(1, tokens_of_each) * num_sequences + prompts
    return float(np.sum(STEP + SEQUENCE * num_sequences + TOKEN * cached))


def test_one_request_takes_its_prefill_and_its_steps() -> None:
    async def main() -> None:
        asked = Asked(engine_with())
        assert await asked.ask("one", 3000) == 3000
        assert asked.ended_s["one"] == pytest.approx(prefill(PROMPT) + decode(1, 3000, PROMPT), rel=1e-9)
        assert asked.engine.counts.num_steps == 2999

    run(main)


def test_a_batch_of_equals_ends_together_and_a_shared_prompt_is_computed_once() -> None:
    async def main() -> None:
        asked = Asked(engine_with())
        await asyncio.gather(*(asked.ask(f"{index}", 500, prompt=7) for index in range(40)))
        # 39 of them compute one token of the prompt they find in the cache.
        took = prefill(PROMPT + 39) + decode(40, 500, 40 * PROMPT)
        assert list(asked.ended_s.values()) == pytest.approx([took] * 40, rel=1e-9)

    run(main)


def test_prompts_longer_than_a_chunk_are_computed_in_several_steps() -> None:
    async def main() -> None:
        asked = Asked(engine_with())
        await asyncio.gather(*(asked.ask(f"{index}", 1, prompt=index) for index in range(12)))
        # 12 prompts of 200 in chunks of 1,000: the third step holds the rest.
        assert max(asked.ended_s.values()) == pytest.approx(2 * prefill(1000) + prefill(400), rel=1e-9)

    run(main)


def test_requests_that_the_cache_cannot_hold_queue_for_it() -> None:
    async def main() -> None:
        # The first two fill the cache to the last token but what a third one would need: waves of two.
        cache = 2 * (PROMPT + 1000) + 600
        asked = Asked(engine_with(cache_tokens=cache, max_running=2))
        await asyncio.gather(*(asked.ask(f"{index}", 1000, prompt=index) for index in range(6)))
        wave = prefill(2 * PROMPT) + decode(2, 1000, 2 * PROMPT)
        assert sorted(asked.ended_s.values()) == pytest.approx([wave, wave, 2 * wave, 2 * wave, 3 * wave, 3 * wave])
        assert asked.engine.counts.num_retracted == 0

    run(main)


def test_a_full_cache_retracts_and_loses_no_token() -> None:
    async def main() -> None:
        engine = engine_with(length=1400, cache_tokens=6000)
        lengths = await asyncio.gather(*(Asked(engine).ask(f"{index}", 1500, prompt=index) for index in range(16)))
        assert lengths == [1400] * 16
        assert engine.counts.num_retracted > 0
        assert engine.counts.num_tokens == 16 * 1400, "a retracted token is kept, not sampled again"

    run(main)


@pytest.mark.parametrize("has_priorities", [True, False])
def test_training_behind_evolution_goes_first_where_there_are_priorities(has_priorities: bool) -> None:
    async def main() -> None:
        asked = Asked(engine_with(cache_tokens=10_000, has_priorities=has_priorities))
        evolution = [asyncio.ensure_future(asked.ask(f"evolution {n}", 900, prompt=n)) for n in range(40)]
        await asyncio.sleep(1.0)
        begin = asyncio.get_running_loop().time()
        await asyncio.gather(*(asked.ask(f"training {n}", 300, prompt=100 + n, priority=1) for n in range(8)))
        took = asyncio.get_running_loop().time() - begin
        num_before = sum(name.startswith("evolution") for name in asked.order)
        alone = prefill(1000) + prefill(600) + decode(8, 300, 8 * PROMPT)
        await asyncio.gather(*evolution)
        if has_priorities:
            # Company in the batch costs something; the queue nothing.
            assert num_before == 0
            assert took < 1.1 * alone
        else:
            assert num_before > 10

    run(main)


def test_a_pause_costs_a_prefill_of_what_was_there_and_marks_both_versions() -> None:
    async def main() -> None:
        engine = engine_with()
        sampling = SamplingParams(temperature=1.0, max_new_tokens=2000)
        request = asyncio.ensure_future(engine.generate(np.zeros(PROMPT, np.int32), sampling, "one"))
        await asyncio.sleep(3.0)
        await engine.pause()
        sampled = engine.counts.num_tokens
        await asyncio.sleep(100.0)
        assert engine.counts.num_tokens == sampled, "nothing is sampled meanwhile"
        await engine.resume(version=1)
        assert (await request).weight_versions == (0, 1)
        assert engine.counts.num_tokens == 2000
        assert engine.counts.num_prefilled == PROMPT + PROMPT + sampled

    run(main)


def test_an_aborted_request_ends_with_what_it_has() -> None:
    async def main() -> None:
        engine = engine_with()
        sampling = SamplingParams(temperature=1.0, max_new_tokens=2000)
        request = asyncio.ensure_future(engine.generate(np.zeros(PROMPT, np.int32), sampling, "one"))
        await asyncio.sleep(1.0)
        await engine.abort("one")
        generation = await request
        assert generation.finish_reason == "abort"
        assert 100 < len(generation.token_ids) < 2000

    run(main)


def test_a_simulation_that_waits_for_nothing_says_so() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(SimulationStalled):
        run(main)


def test_a_simulation_that_leaves_nothing_running_gives_its_outcome() -> None:
    async def main() -> str:
        await asyncio.sleep(3600)
        return f"{asyncio.get_running_loop().time():.0f} s"

    assert simulate(lambda _: main()) == "3600 s"
