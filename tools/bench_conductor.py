r"""Time what rank 0 spends on each completion that the engines send, and what it holds of it in memory.

    python tools/bench_conductor.py --json tools/results/cpu_conductor.json
    python tools/bench_conductor.py --engines 8 --steps 5          # in a minute

The engines are fake: they speak HTTP, answer every /generate of SGLang at once with the same completion, and run in one
process of their own, so that a step's time is what the conductor needs. `ours` is the trainer's path:
`SglangEngines.generate`, with the relay of rank 0's node in front of all engines. `direct` is the same without a relay.
`plain` has an HTTP client in rank 0's process that reads the JSON there, as simple trainers do. Each row is a fresh
process; the ways take turns within one run.

`ms`: processor time of rank 0's process per completion, all threads. `per_s`: completions per second of wall clock.
`others_ms`: processor time of the relay and the fake engines. `bytes`: rank 0's memory at its peak
beyond what it had before the first completion and beyond the arrays of a step, which keeps all its completions, per
token of a step. `growth`: resident bytes per step between the second tenth of the steps and the last.
"""

import argparse
import asyncio
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import numpy as np
import orjson
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # where PYTHONSAFEPATH leaves it out

from fake_engines import VERSION, completion  # isort: skip
from random_policy import measured_on  # isort: skip; makes ours importable

from bench.measure import write_result

from megatron_p2o.config.tree import Config, DataConfig, ModelConfig, RolloutConfig, RunConfig, one_task
from megatron_p2o.processes import HostMemory, allow_many_files
from megatron_p2o.rollout.engines import SglangEngines
from megatron_p2o.rollout.servers.answers import Generation
from megatron_p2o.rollout.servers.client import Mirror
from megatron_p2o.rollout.servers.relay_link import RelayRoute
from megatron_p2o.rollout.servers.start import HeadRelay
from megatron_p2o.types import PLAIN, Completion, Problem, Prompt, SamplingParams

PROMPT_TOKENS = 300
GROUP_SIZE = 8
BYTES_OF_A_TOKEN = 8
"""In the arrays of a completion: an int32 and a float32."""

FAKE_ENGINES = Path(__file__).with_name("fake_engines.py")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What one process measures."""

    way: str
    num_tokens: int
    num_engines: int
    num_steps: int
    num_completions: int
    """Completions of a step; all are asked for at once."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=("plain", "direct", "ours"), default=["plain", "ours"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[12_000, 200], help="of a completion")
    parser.add_argument("--engines", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--flat-steps", type=int, default=100, help="of ours where the engines are fewest")
    parser.add_argument(
        "--completions", type=int, default=128, help="of a step, of 12,000 tokens; more of shorter ones"
    )
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(json.dumps(measured(Case(**json.loads(arguments.case)))))
        return
    rows = []
    print(f"{'way':6} {'tokens':>6} {'engines':>7} {'ms':>7} {'per_s':>6} {'others_ms':>9} {'bytes':>6} {'growth':>8}")
    for case in cases(arguments):
        row = in_a_process(case)
        rows.append(row)
        print(
            f"{row['way']:6} {row['num_tokens']:>6} {row['num_engines']:>7} {row['ms']:>7.3f} {row['per_s']:>6.0f} "
            f"{row['others_ms']:>9.3f} {row['bytes']:>6.1f} {row['growth']:>8.0f}",
            flush=True,
        )
    environment = measured_on(torch.device("cpu")) | {"clock": "processor time, wall clock for per_s"}
    write_result(arguments.json, {"environment": environment, "rows": rows})


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    for num_tokens in arguments.tokens:
        for num_engines in arguments.engines:
            for way in arguments.ways:
                is_long = way == "ours" and num_engines == min(arguments.engines)
                yield Case(
                    way=way,
                    num_tokens=num_tokens,
                    num_engines=num_engines,
                    num_steps=arguments.flat_steps if is_long else arguments.steps,
                    num_completions=arguments.completions * max(1, min(16, 12_000 // num_tokens)),
                )


def in_a_process(case: Case) -> dict[str, Any]:
    command = [sys.executable, __file__, "--case", json.dumps(asdict(case))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measured(case: Case) -> dict[str, Any]:
    """Return the row of a case, in a process of its own."""
    allow_many_files()
    prompts, sampling = prompts_of(case), SamplingParams(temperature=1.0, max_new_tokens=case.num_tokens)
    with fake_engines(case) as servers, tempfile.TemporaryDirectory(prefix="bench_conductor_") as folder:
        kind = PlainEngines if case.way == "plain" else SglangEngines
        relay = HeadRelay(Path(folder)) if case.way == "ours" else None
        for server in servers if relay is not None else ():
            server.relay = relay.current().route_to(server.base_url, server.api_key)
        engines = kind(
            config_of(case),
            Path(folder),
            servers,
            no_restart,
            stop_token_ids=[0],
            releases_memory=False,
            relay=relay,
        )
        with engines:
            check(list(engines.generate(prompts[: 2 * GROUP_SIZE], sampling)), case)
            before = psutil.Process().memory_info().rss
            steps = [step(engines, prompts, sampling) for _ in range(case.num_steps)]
    tenth = max(1, case.num_steps // 10)
    resident = [each["resident"] for each in steps]
    early, late = median(resident[tenth : 2 * tenth] or resident[:1]), median(resident[-tenth:])
    return {
        **asdict(case),
        **{name: median(each[name] for each in steps) for name in ("ms", "per_s", "others_ms")},
        "bytes": (peak_bytes() - before) / (case.num_completions * case.num_tokens) - BYTES_OF_A_TOKEN,
        "ms_first_tenth": median(each["ms"] for each in steps[:tenth]),
        "ms_last_tenth": median(each["ms"] for each in steps[-tenth:]),
        "growth": (late - early) / max(1, case.num_steps - 2 * tenth),
    }


def step(engines: SglangEngines, prompts: Sequence[Prompt], sampling: SamplingParams) -> dict[str, float]:
    """Sample a step's completions and keep them all, as a trainer does until the update."""
    gc.collect()
    resident = psutil.Process().memory_info().rss
    others_s, own_s, start_s = family_s(), time.process_time(), time.perf_counter()
    kept = [done for _, done in engines.generate(prompts, sampling)]
    wall_s, own_s = time.perf_counter() - start_s, time.process_time() - own_s
    others_s = family_s() - others_s
    return {
        "ms": 1e3 * own_s / len(kept),
        "per_s": len(kept) / wall_s,
        "others_ms": 1e3 * others_s / len(kept),
        "resident": float(resident),
    }


def check(outcomes: Sequence[tuple[int, Completion]], case: Case) -> None:
    """End the benchmark unless every completion is the engines', bit for bit."""
    ids, logprobs = completion(case.num_tokens)
    for _, each in outcomes:
        is_right = np.array_equal(each.token_ids, ids) and np.array_equal(each.logprobs, logprobs)
        if not (is_right and each.finish_reason == "length" and each.weight_versions == (VERSION,)):
            raise SystemExit(f"{case.way}: a completion is not what the engine sent")


def prompts_of(case: Case) -> list[Prompt]:
    ids = np.arange(PROMPT_TOKENS, dtype=np.int32)
    problems = [Problem(id=str(n), question="", answer="") for n in range(case.num_completions // GROUP_SIZE)]
    return [
        Prompt(problem=problem, template=PLAIN, sampling_ids=ids, training_ids=ids)
        for problem in problems
        for _ in range(GROUP_SIZE)
    ]


def config_of(case: Case) -> Config:
    return Config(
        run=RunConfig(name="bench"),
        model=ModelConfig(path="none"),
        data=DataConfig(train=one_task("none.jsonl")),
        rollout=RolloutConfig(num_engines=case.num_engines, max_new_tokens=case.num_tokens),
    )


def no_restart(name: str, restart: int) -> "FakeServer":
    raise SystemExit(f"{name} was lost: the numbers mean nothing")


@dataclass(slots=True)
class FakeServer:
    """Implements `server.Server` for one of the fake engines, which this process does not own."""

    name: str
    base_url: str
    api_key: str = "user"
    admin_key: str = "admin"
    log_path: Path = Path("log")
    mirror: Mirror | None = None
    relay: RelayRoute | None = None

    def is_alive(self) -> bool:
        return True

    def wait_until_ready(self, timeout_s: float) -> None: ...

    def log_tail(self) -> str:
        return ""

    def host_memory(self) -> HostMemory:
        return HostMemory()

    def stop(self) -> None: ...


@contextmanager
def fake_engines(case: Case) -> Iterator[list[FakeServer]]:
    """Start the fake engines and yield them as servers."""
    command = [sys.executable, str(FAKE_ENGINES), str(case.num_engines), str(case.num_tokens)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    try:
        urls = json.loads(process.stdout.readline())
        yield [FakeServer(f"engine {index}", url) for index, url in enumerate(urls)]
    finally:
        process.stdin.close()
        process.wait(timeout=60)


class PlainEngines(SglangEngines):
    """The same engines, read by a plain HTTP client."""

    def _client_of(self, server: Any) -> Any:
        return PlainClient(server.base_url)


class PlainClient:
    """One HTTP request per completion, its JSON read where it arrives."""

    def __init__(self, base_url: str) -> None:
        self._url = f"{base_url}/generate"
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))

    async def generate(
        self, token_ids: np.ndarray[Any, Any], sampling: SamplingParams, request_id: str, **_: Any
    ) -> Generation:
        parameters = {"temperature": sampling.temperature, "max_new_tokens": sampling.max_new_tokens}
        request = {
            "rid": request_id,
            "input_ids": token_ids.tolist(),
            "sampling_params": parameters,
            "return_logprob": True,
        }
        async with self._session.post(self._url, json=request) as response:
            meta = orjson.loads(await response.read())["meta_info"]
        triples = meta["output_token_logprobs"]
        return Generation(
            token_ids=np.array([token for _, token, _ in triples], dtype=np.int32),
            logprobs=np.array([logprob for logprob, _, _ in triples], dtype=np.float32),
            finish_reason=meta["finish_reason"]["type"],
            weight_versions=(int(meta["weight_version"]),),
        )

    async def cache_tokens(self) -> int:
        return 2**30

    async def probe(self, timeout_s: float) -> None:
        await asyncio.sleep(0)

    async def close(self) -> None:
        await self._session.close()


def family_s() -> float:
    """Return the processor seconds of the processes that this one has started."""
    times = [process.cpu_times() for process in psutil.Process().children(recursive=True)]
    return sum(each.user + each.system for each in times)


def peak_bytes() -> int:
    """Return the peak of this process's resident memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
