"""Measure what the steps of a real engine on this machine's CPU take, and hold the simulated engine to it.

    python tools/calibrate_engine.py --output tools/results/cpu_engine.json

Batches of equal requests give the coefficients by least squares. Then mixed workloads, which gave none of them, are
sampled by the real engine and by the simulated one: a KV cache that is too small, training behind evolution. Times are
processor time of the engine's scheduler, which computes on one core and waits for nothing: other work on the machine
hardly changes them.
"""

import argparse
import asyncio
import json
import math
import os
import platform
import statistics
import tempfile
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray

from megatron_p2o.config.tree import (
    Config,
    DataConfig,
    EvolutionConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    one_task,
)
from megatron_p2o.rollout.engines import SglangEngines
from megatron_p2o.rollout.requests import PRIORITY_IN_ENGINE, Priority
from megatron_p2o.rollout.start import start_engines
from megatron_p2o.simulation.batch import EngineCoefficients
from megatron_p2o.simulation.engine import SimulatedEngine
from megatron_p2o.simulation.virtual_time import simulate
from megatron_p2o.testing.tiny_model import write_tiny_qwen3
from megatron_p2o.types import PLAIN, Completion, Problem, Prompt, SamplingParams

NO_END = 1000
"""A token that the tiny model does not have: every completion is as long as it is asked to be."""

CACHE_TOKENS = 4096
CHUNK_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a workload."""

    prompt_tokens: int
    tokens: int
    priority: Priority = "training"


Workload = list[Request]


def equal_batches() -> list[Workload]:
    """Return the workloads that the coefficients are fitted to: they fit the cache, and each is one batch."""
    shapes = [
        (1, 32, 96),
        (1, 512, 96),
        (4, 32, 96),
        (4, 512, 96),
        (16, 32, 96),
        (16, 128, 96),
        (32, 16, 64),
        (8, 256, 8),
        (1, 16, 4),
        (16, 16, 4),
        (4, 512, 4),
    ]
    return [[Request(prompt, tokens)] * count for count, prompt, tokens in shapes]


def held_out() -> dict[str, Workload]:
    """Return the workloads that both engines sample, by name."""
    random = np.random.default_rng(0)

    def lengths(count: int) -> list[int]:
        return [int(length) for length in np.clip(random.lognormal(4.0, 0.8, count), 8, 256)]

    training = [Request(40, length) for length in lengths(24)]
    evolution = [Request(40, length, "evolution") for length in lengths(64)]
    return {
        "24 training": training,
        "24 training behind 16 evolution": [*evolution[:16], *training],
        "24 training behind 64 evolution": [*evolution, *training],
        "96 training, cache too small": [Request(40, length) for length in lengths(96)],
    }


def fitted(workloads: list[Workload], seconds: list[float]) -> EngineCoefficients:
    """Return the coefficients that give these seconds in the least squares of relative errors, none below 0."""
    rows = np.array([row_of(workload) for workload in workloads])
    weights = 1 / np.array(seconds)[:, None]
    solution = nonnegative_least_squares(rows * weights, np.ones(len(seconds)))
    step, sequence, cached, prefill_step, prefill_token = solution
    return EngineCoefficients(
        step_s=step,
        sequence_s=sequence,
        cached_token_s=cached,
        prefill_step_s=prefill_step,
        prefill_token_s=prefill_token,
        chunk_tokens=CHUNK_TOKENS,
    )


def row_of(workload: Workload) -> list[float]:
    """Return how often a batch of equals takes each coefficient."""
    count, prompt, tokens = len(workload), workload[0].prompt_tokens, workload[0].tokens
    steps = tokens - 1
    attended = count * sum(prompt + done for done in range(1, tokens))
    return [steps, steps * count, attended, -(-count * prompt // CHUNK_TOKENS), count * prompt]


def nonnegative_least_squares(rows: NDArray[np.float64], target: NDArray[np.float64]) -> list[float]:
    """Return the solution without the columns that would be negative."""
    used = list(range(rows.shape[1]))
    while True:
        solution = np.linalg.lstsq(rows[:, used], target, rcond=None)[0]
        if (solution >= 0).all():
            found = dict(zip(used, solution, strict=True))
            return [float(found.get(column, 0.0)) for column in range(rows.shape[1])]
        used.pop(int(solution.argmin()))


def prompts(workload: Workload, salt: int) -> list[Prompt]:
    """Return prompts that share no beginning, with each other or with another `salt`."""

    def one(index: int, request: Request) -> Prompt:
        ids = np.random.default_rng([salt, index]).integers(3, 99, request.prompt_tokens).astype(np.int32)
        problem = Problem(id=f"{salt}/{index}", question="", answer="")
        return Prompt(problem=problem, template=PLAIN, sampling_ids=ids, training_ids=ids)

    return [one(index, request) for index, request in enumerate(workload)]


def scheduler_of(engines: SglangEngines) -> psutil.Process:
    """Return the process that computes the engine's steps."""
    family = psutil.Process(engines._supervisor.servers[0].pid).children(recursive=True)
    return next(process for process in family if process.name().startswith("sglang::sched"))


def processor_s(process: psutil.Process) -> float:
    """Return the processor time of a process's first thread, to the nanosecond."""
    return int(Path(f"/proc/{process.pid}/schedstat").read_text().split()[0]) / 1e9


def real_seconds(engines: SglangEngines, workload: Workload, salt: int) -> float:
    """Return what the real engine takes until all training requests have ended."""
    scheduler = scheduler_of(engines)
    begin = processor_s(scheduler)
    futures: list[tuple[Priority, Future[Completion]]] = [
        (
            request.priority,
            engines.broker.submit(
                prompt, SamplingParams(temperature=1.0, max_new_tokens=request.tokens, seed=salt), request.priority
            ),
        )
        for request, prompt in zip(workload, prompts(workload, salt), strict=True)
    ]
    for priority, future in futures:
        if priority == "training":
            future.result()
    took = processor_s(scheduler) - begin
    for request, (_, future) in zip(workload, futures, strict=True):
        if len(future.result().token_ids) != request.tokens:
            raise RuntimeError(f"{len(future.result().token_ids)} tokens where {request.tokens} were asked for")
    return took


def simulated_seconds(coefficients: EngineCoefficients, workload: Workload) -> float:
    """Return the same of the simulated engine."""

    async def run() -> float:
        engine = SimulatedEngine(
            coefficients, lambda _, sampling: sampling.max_new_tokens, cache_tokens=CACHE_TOKENS, max_running=256
        )
        tasks: list[tuple[Priority, asyncio.Task[object]]] = []
        for index, (request, prompt) in enumerate(zip(workload, prompts(workload, 0), strict=True)):
            sampling = SamplingParams(temperature=1.0, max_new_tokens=request.tokens)
            asked = engine.generate(
                prompt.sampling_ids, sampling, str(index), priority=PRIORITY_IN_ENGINE[request.priority]
            )
            tasks.append((request.priority, asyncio.ensure_future(asked)))
        await asyncio.gather(*(task for priority, task in tasks if priority == "training"))
        return asyncio.get_running_loop().time()

    return simulate(lambda _: run())


def measured(engines: SglangEngines, workload: Workload, repeats: int) -> list[float]:
    return [real_seconds(engines, workload, salt=1 + repeat) for repeat in range(repeats)]


def config_of(model: Path) -> Config:
    return Config(
        run=RunConfig(name="calibration"),
        model=ModelConfig(path=str(model), dtype="float32"),
        data=DataConfig(train=one_task("unused")),
        rollout=RolloutConfig(max_running_requests=256, max_total_tokens=CACHE_TOKENS),
        # What is compared are the engines: the broker holds nothing back.
        evolution=EvolutionConfig(max_slowdown=math.inf),
        sglang={"chunked_prefill_size": CHUNK_TOKENS},
    )


def calibration(repeats: int) -> dict[str, object]:
    """Return the coefficients, what they were fitted to, and the errors of the simulation."""
    with tempfile.TemporaryDirectory(prefix="p2o-calibrate-") as folder:
        config = config_of(write_tiny_qwen3(Path(folder) / "model", seed=3, end_token_id=NO_END))
        with start_engines(config, Path(folder) / "run", [NO_END]) as engines:
            measured(engines, equal_batches()[0], 1)  # the first request pays for what is loaded late
            fitted_to = [(workload, measured(engines, workload, repeats)) for workload in equal_batches()]
            seconds = [statistics.median(times) for _, times in fitted_to]
            coefficients = fitted([workload for workload, _ in fitted_to], seconds)
            compared = {name: (load, measured(engines, load, repeats)) for name, load in held_out().items()}
    cases = {
        name: {
            "measured_s": [round(time_s, 4) for time_s in times],
            "simulated_s": round(simulated_seconds(coefficients, load), 4),
            "error": round(simulated_seconds(coefficients, load) / statistics.median(times) - 1, 4),
        }
        for name, (load, times) in compared.items()
    }
    return {
        "coefficients": asdict(coefficients),
        "fit": [
            {
                "requests": len(load),
                "prompt_tokens": load[0].prompt_tokens,
                "tokens": load[0].tokens,
                "measured_s": [round(time_s, 4) for time_s in times],
                "fitted_s": round(float(np.dot(row_of(load), list(asdict(coefficients).values())[:5])), 4),
            }
            for load, times in fitted_to
        ],
        "held_out": cases,
        "cache_tokens": CACHE_TOKENS,
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    text = json.dumps(calibration(options.repeats), indent=1)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
