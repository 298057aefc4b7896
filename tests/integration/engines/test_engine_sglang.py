"""The rollout engine on real SGLang servers. One pair of servers serves all tests; the last test ends them.

The second of the pair is on another node, as far as the run can tell: behind that node's daemon.
"""

import base64
import copy
import json
import os
import pickle
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_p2o.config.read import dump_config
from megatron_p2o.config.tree import Config, DataConfig, ModelConfig, RolloutConfig, RunConfig, one_task
from megatron_p2o.policy.weights.hf_directory import write_hf_directory
from megatron_p2o.processes import HostMemory
from megatron_p2o.rollout.broker import Broker, EnginesLost
from megatron_p2o.rollout.engines import SglangEngines
from megatron_p2o.rollout.refresh.refresh_verdict import RefreshFailed
from megatron_p2o.rollout.servers.client import EngineClient
from megatron_p2o.rollout.servers.remote import ADDRESS_VARIABLE, KeptDaemon
from megatron_p2o.rollout.start import start_engines
from megatron_p2o.testing.engines.losses import ENGINE_START_TIMEOUT_S, find_hang_soon, wait_for_engines
from megatron_p2o.testing.tiny_model import write_tiny_qwen3
from megatron_p2o.types import PLAIN, Completion, Problem, Prompt, SamplingParams

pytestmark = pytest.mark.slow

EOS = 2
WAIT_S = 120
MOST_REFRESHES = 20
TOLERANCE = 1e-5
"""fp32 log-probs of about -10: measured 3e-6 at most."""


def config_of(model: Path, **rollout: Any) -> Config:
    defaults: dict[str, Any] = {
        "num_engines": 2,
        "max_running_requests": 32,
        "max_total_tokens": 16384,
        "startup_timeout_s": ENGINE_START_TIMEOUT_S,
        "request_timeout_s": WAIT_S,
        "stall_timeout_s": WAIT_S,
        "max_restarts": 1,
    }
    return Config(
        run=RunConfig(name="test"),
        model=ModelConfig(path=str(model), dtype="float32"),
        data=DataConfig(train=one_task("unused")),
        rollout=RolloutConfig(**defaults | rollout),
    )


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory of several files, written as the policy exports its weights."""
    source = write_tiny_qwen3(tmp_path_factory.mktemp("source"), seed=3)
    directory = tmp_path_factory.mktemp("model")
    write_hf_directory(load_file(source / "model.safetensors").items(), source, directory, max_file_bytes=20_000)
    return directory


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def daemon(model_path: Path, run_dir: Path) -> Iterator[KeptDaemon]:
    (run_dir / "config.yaml").write_text(dump_config(config_of(model_path)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ADDRESS_VARIABLE, "127.0.0.2")
        kept = KeptDaemon(run_dir / "config.yaml", node_rank=1, head_address="127.0.0.1")
    with closing(kept):
        yield kept


@pytest.fixture(scope="module")
def engines(model_path: Path, run_dir: Path, daemon: KeptDaemon) -> Iterator[SglangEngines]:
    # A server on the CPU goes through the motions of giving its memory away, and keeps it.
    with start_engines(config_of(model_path), run_dir, [EOS], [daemon.address], releases_memory=True) as started:
        yield started


@pytest.fixture(scope="module")
def trainer(model_path: Path) -> Any:
    """The independent truth: transformers' model, whose weights the tests change and push."""
    return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()


class Versions:
    """Pushes changed weights, each time under the next version."""

    def __init__(self) -> None:
        self.current = 0

    def push(self, engines: SglangEngines, trainer: Any) -> int:
        generator = torch.Generator().manual_seed(self.current)
        with torch.no_grad():
            for parameter in trainer.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        self.current += 1
        engines.refresh(trainer.state_dict().items(), self.current)
        return self.current


@pytest.fixture(scope="module")
def versions() -> Versions:
    return Versions()


def prompts(num_problems: int, group_size: int = 1, length: int = 20) -> list[Prompt]:
    generator = np.random.default_rng(num_problems)
    asked: list[Prompt] = []
    for index in range(num_problems):
        ids = generator.integers(3, 99, length, dtype=np.int32)
        problem = Problem(id=str(index), question="", answer="")
        asked += [Prompt(problem=problem, template=PLAIN, sampling_ids=ids, training_ids=ids)] * group_size
    return asked


def sample(engines: SglangEngines, asked: Sequence[Prompt], **sampling: Any) -> list[Completion]:
    parameters = SamplingParams(**{"temperature": 1.0, "max_new_tokens": 24, "seed": 5} | sampling)
    answers = dict(engines.generate(asked, parameters))
    assert sorted(answers) == list(range(len(asked)))
    return [answers[index] for index in range(len(asked))]


def reference_logprobs(trainer: Any, completion: Completion, temperature: float = 1.0) -> np.ndarray:
    """Return transformers' log-probs of the response, one full forward pass without a cache."""
    prompt_ids = completion.prompt.sampling_ids
    ids = torch.tensor(np.concatenate([prompt_ids, completion.token_ids]), dtype=torch.int64)
    with torch.no_grad():
        logprobs = (trainer(ids[None]).logits[0].float() / temperature).log_softmax(-1)
    return logprobs[:-1].gather(1, ids[1:, None])[len(prompt_ids) - 1 :, 0].numpy()


def assert_matches(trainer: Any, completions: Sequence[Completion], temperature: float = 1.0) -> None:
    for completion in completions:
        expected = reference_logprobs(trainer, completion, temperature)
        np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_transformers(engines: SglangEngines, trainer: Any, temperature: float) -> None:
    completions = sample(engines, prompts(12, group_size=2), temperature=temperature)
    assert_matches(trainer, completions, temperature)
    assert all(completion.logprobs.dtype == np.float32 for completion in completions)


def test_greedy_tokens_are_the_most_likely_ones(engines: SglangEngines, trainer: Any) -> None:
    for completion in sample(engines, prompts(6), temperature=0.0):
        ids = torch.tensor(np.concatenate([completion.prompt.sampling_ids, completion.token_ids]), dtype=torch.int64)
        with torch.no_grad():
            best = trainer(ids[None]).logits[0].argmax(-1)
        start = len(completion.prompt.sampling_ids) - 1
        assert completion.token_ids.tolist() == best[start:-1].tolist()


def test_rollouts_of_a_group_and_of_both_engines_differ(engines: SglangEngines) -> None:
    completions = sample(engines, prompts(1, group_size=64), max_new_tokens=8)
    assert len({tuple(completion.token_ids) for completion in completions}) > 32


def test_a_completion_stops_at_the_end_token_or_at_its_length(engines: SglangEngines) -> None:
    completions = sample(engines, prompts(64, group_size=2), max_new_tokens=48)
    reasons = [completion.finish_reason for completion in completions]
    assert set(reasons) == {"stop", "length"}, "an untrained policy ends a few of so many responses"
    for completion in completions:
        assert len(completion.logprobs) == len(completion.token_ids)
        assert EOS not in completion.token_ids[:-1]
        assert (completion.token_ids[-1] == EOS) == (completion.finish_reason == "stop")
        assert completion.finish_reason == "stop" or len(completion.token_ids) == 48


def test_logprobs_under_top_p_are_those_of_the_whole_distribution(engines: SglangEngines, trainer: Any) -> None:
    # Why `rollout.top_p` must be 1: the tokens are drawn from another distribution than this.
    assert_matches(trainer, sample(engines, prompts(12), top_p=0.5))


def test_a_response_ends_at_any_of_the_tokens_that_end_one(engines: SglangEngines) -> None:
    server, others = engines._supervisor.servers[0], list(range(40, 60))
    broker = Broker(slots_per_engine=32, request_timeout_s=WAIT_S, stall_timeout_s=WAIT_S)
    stop_at = [EOS, *others]
    try:
        broker.add_engine(
            "engine 0", lambda: EngineClient(server.base_url, server.api_key, server.admin_key, stop_at, WAIT_S), str
        )
        sampling = SamplingParams(temperature=1.0, max_new_tokens=48)
        futures = [broker.submit(asked, replace(sampling, seed=seed)) for seed, asked in enumerate(prompts(32))]
        completions = [future.result(WAIT_S) for future in futures]
    finally:
        broker.close()
    assert {int(completion.token_ids[-1]) for completion in completions} & set(others)
    for completion in completions:
        assert not set(stop_at) & set(completion.token_ids[:-1].tolist())
        assert (completion.token_ids[-1] in stop_at) == (completion.finish_reason == "stop")


def test_a_request_that_is_too_long_for_the_model_is_given_up_alone(
    engines: SglangEngines, caplog: pytest.LogCaptureFixture
) -> None:
    num_positions = 2048
    fits, too_long = prompts(1, length=num_positions - 24), prompts(1, length=num_positions - 23)
    completions = sample(engines, [*fits, *too_long, *too_long, *prompts(2)])
    assert [len(completion.token_ids) > 0 for completion in completions] == [True, False, False, True, True]
    assert [completion.finish_reason == "abort" for completion in completions] == [False, True, True, False, False]
    assert engines.metrics()["engine/refused_count"] == 2
    assert "2 completions were refused by their engine" in caplog.text
    assert "maximum context length of 2048 tokens" in caplog.text


def test_leaving_the_iterator_early_frees_the_engine(engines: SglangEngines) -> None:
    for _ in engines.generate(prompts(40), SamplingParams(temperature=1.0, max_new_tokens=200)):
        break
    assert len(sample(engines, prompts(4))) == 4


def test_a_request_out_of_time_keeps_the_tokens_it_has(engines: SglangEngines, trainer: Any) -> None:
    for limit_s in (2.0, 8.0, 32.0):  # an engine that is stalled for all of the time has no token
        aborted = [one for one in long_completions(engines, limit_s) if one.finish_reason == "abort"]
        started = [completion for completion in aborted if completion.token_ids.size]
        assert_matches(trainer, started[:4])
        if started:
            return
    pytest.fail("1900 tokens for each of 32 sequences take longer than two seconds, and one token takes less")


def long_completions(engines: SglangEngines, request_timeout_s: float) -> list[Completion]:
    """Return what the first engine samples of 32 completions of 1900 tokens in a limited time."""
    server = engines._supervisor.servers[0]
    broker = Broker(slots_per_engine=32, request_timeout_s=request_timeout_s, stall_timeout_s=WAIT_S)
    try:
        broker.add_engine(
            "engine 0", lambda: EngineClient(server.base_url, server.api_key, server.admin_key, [EOS], WAIT_S), str
        )
        sampling = SamplingParams(temperature=1.0, max_new_tokens=1900)
        futures = [broker.submit(asked, replace(sampling, seed=seed)) for seed, asked in enumerate(prompts(32))]
        return [future.result(WAIT_S) for future in futures]
    finally:
        broker.close()


def test_refreshed_weights_are_served_under_their_version(
    engines: SglangEngines, trainer: Any, versions: Versions
) -> None:
    before = sample(engines, prompts(4), temperature=0.0)
    assert {completion.weight_versions for completion in before} == {(versions.current,)}
    for _ in range(2):
        version = versions.push(engines, trainer)
        completions = sample(engines, prompts(16, group_size=2))
        assert_matches(trainer, completions)
        assert {completion.weight_versions for completion in completions} == {(version,)}
        assert engines.broker.version == version
    after = sample(engines, prompts(4), temperature=0.0)
    assert [list(completion.token_ids) for completion in after] != [list(completion.token_ids) for completion in before]


@pytest.mark.parametrize("is_lent", [False, True], ids=["memory kept", "memory lent before"])
def test_requests_that_run_during_a_refresh_go_on_under_the_new_weights(
    engines: SglangEngines, trainer: Any, versions: Versions, model_path: Path, is_lent: bool
) -> None:
    old = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    # On a busy machine all may have been answered before the pause of a refresh comes: then the next one is tried.
    for _ in range(MOST_REFRESHES):
        old.load_state_dict(trainer.state_dict())
        completions = sample_through_refresh(engines, trainer, versions, is_lent)
        version = versions.current
        if is_lent:
            assert completions[-1].weight_versions == (version,)
        across = [c for c in completions if c.weight_versions == (version - 1, version)]
        for completion in across[:4]:
            matches_old = np.abs(completion.logprobs - reference_logprobs(old, completion)) < TOLERANCE
            matches_new = np.abs(completion.logprobs - reference_logprobs(trainer, completion)) < TOLERANCE
            num_old = int(np.argmin(matches_old)) if not matches_old.all() else len(matches_old)
            assert 0 < num_old < len(matches_old)
            assert matches_new[num_old:].all(), "the cache of the old weights must not be read after the refresh"
        if across:
            return
    pytest.fail("no refresh fell into the generation")


def sample_through_refresh(engines: SglangEngines, trainer: Any, versions: Versions, is_lent: bool) -> list[Completion]:
    """Return completions of evolution, the weights being changed once each has its first token.

    `is_lent`: the last of them is asked for while the engines' memory is lent.
    """
    asked, sampling = prompts(24), SamplingParams(temperature=1.0, max_new_tokens=600)
    futures = [
        engines.broker.submit(each, replace(sampling, seed=seed), "evolution") for seed, each in enumerate(asked)
    ]
    # An engine answers in order, and these two go where the first two went, one to each engine: when they have their
    # only token, those before them have their first of many.
    short = replace(sampling, max_new_tokens=1)
    for last in [engines.broker.submit(each, short, "evolution") for each in asked[:2]]:
        last.result(WAIT_S)
    if is_lent:
        engines.release_memory()
        futures.append(engines.broker.submit(asked[0], replace(sampling, max_new_tokens=8), "evolution"))
    versions.push(engines, trainer)
    return [future.result(WAIT_S) for future in futures]


def test_weights_that_change_on_the_way_are_not_served_until_a_good_refresh(
    engines: SglangEngines, trainer: Any, versions: Versions
) -> None:
    def damaged_in_transit() -> Iterator[tuple[str, torch.Tensor]]:
        yield from trainer.state_dict().items()
        engines._sync._staged.buckets[0].content[5] ^= 1

    with pytest.raises(RefreshFailed, match=r"1 weights that differ from the trainer's: model\.embed_tokens\.weight"):
        engines.refresh(damaged_in_transit(), versions.current + 1)
    with pytest.raises(RefreshFailed):
        sample(engines, prompts(1))
    version = versions.push(engines, trainer)
    completions = sample(engines, prompts(4))
    assert_matches(trainer, completions)
    assert {completion.weight_versions for completion in completions} == {(version,)}


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.k_norm.weight", "model.layers.0.self_attn.v_proj.weight", "lm_head.weight"]
)
def test_weights_that_change_inside_the_engine_are_noticed(
    engines: SglangEngines, trainer: Any, versions: Versions, name: str
) -> None:
    damaged = trainer.state_dict()[name].clone()
    damaged.view(-1)[3] += 1e-3

    async def damage(_: str, client: EngineClient) -> None:
        await client.update_weights([plain_payload(name, damaged)], None, False)

    engines._sync.load(engines._sync.stage(trainer.state_dict().items(), verify=True), verify=True)
    engines.broker.call_every_engine(damage).result(WAIT_S)
    with pytest.raises(RefreshFailed, match=f"1 weights that differ from the trainer's: {name}"):
        engines._sync.check(versions.current + 1, verify=True)
    versions.push(engines, trainer)
    assert_matches(trainer, sample(engines, prompts(2)))


def test_the_ranks_of_one_engine_take_their_slices_and_a_small_cache_is_warned_of(
    model_path: Path, trainer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changed, versions = copy.deepcopy(trainer), Versions()
    config = config_of(model_path, num_engines=1, tensor_parallel=2, max_total_tokens=8192)
    with start_engines(config, tmp_path, [EOS]) as engines:
        assert "the KV cache of engine 0 holds 8192 tokens, fewer than a prompt and its response may" in caplog.text
        for _ in range(2):  # copies are recorded, then replayed
            version = versions.push(engines, changed)
            completions = sample(engines, prompts(4))
            assert_matches(changed, completions)
            assert {completion.weight_versions for completion in completions} == {(version,)}


def plain_payload(name: str, tensor: torch.Tensor) -> str:
    """Return a tensor as SGLang's own update route takes it, without shared memory."""

    return base64.b64encode(pickle.dumps([(name, FloatTensor(tensor.tolist()))])).decode()


class FloatTensor:
    """Pickles as a call of `torch.FloatTensor`, which SGLang's unpickler allows."""

    def __init__(self, values: list[Any]) -> None:
        self._values = values

    def __reduce__(self) -> tuple[type, tuple[list[Any]]]:
        return torch.FloatTensor, (self._values,)


def test_nobody_without_the_keys_samples_or_changes_weights(
    engines: SglangEngines, run_dir: Path, daemon: KeptDaemon
) -> None:
    server, remote = engines._supervisor.servers

    def status(path: str, key: str | None, url: str = server.base_url) -> int:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        request = urllib.request.Request(url + path, json.dumps({"input_ids": [5]}).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=WAIT_S) as response:
                return response.status
        except urllib.error.HTTPError as error:
            return error.code

    assert status("/generate", None) == status("/generate", "wrong") == 401
    assert status("/begin_weight_update", server.api_key) == 401
    assert status("/generate", server.api_key) == 200
    assert status("/generate", None, remote.base_url) == status("/generate", server.admin_key, remote.base_url) == 401
    assert status("/generate", remote.api_key, remote.base_url) == 200
    assert engines._relay is not None
    relay = engines._relay.current()
    keys = (server.api_key, server.admin_key, daemon.address.key, relay.key)
    family = [psutil.Process(pid) for pid in (server.pid, remote.pid, daemon.process.pid, relay.process.pid)]
    family += [child for member in list(family) for child in member.children(recursive=True)]
    logs = [path.read_text() for path in (run_dir / "engines").glob("*.log")]
    assert len(logs) == 4, "two engines, a daemon and a relay"
    exposed = [*logs, *(" ".join(member.cmdline()) for member in family), *(str(member.environ()) for member in family)]
    assert not [key for key in keys for text in exposed if key in text]
    listening = [c.laddr.ip for member in family for c in member.net_connections() if c.status == psutil.CONN_LISTEN]
    assert set(listening) <= {"127.0.0.1", "127.0.0.2", "::"}, "torch's store, inside SGLang, listens everywhere"
    assert listening.count("127.0.0.2") == 1, "only the daemon is there for other nodes"


def test_the_host_memory_of_every_engine_and_relay_is_known_whatever_node_it_is_on(
    engines: SglangEngines, daemon: KeptDaemon
) -> None:
    def told_and_seen() -> list[tuple[HostMemory, int]]:
        assert engines._relay is not None
        launchers = [psutil.Process(server.pid) for server in engines._supervisor.servers]
        families = [[launcher, *launcher.children(recursive=True)] for launcher in launchers]
        assert all(len(family) > 1 for family in families)
        relays = [[psutil.Process(pid)] for pid in (engines._relay.current().process.pid, daemon.process.pid)]
        told = [*engines.host_memory(), *engines.relay_memory()]
        seen = [sum(process.memory_info().rss for process in family) for family in (*families, *relays)]
        return list(zip(told, seen, strict=True))

    def are_equal(pairs: list[tuple[HostMemory, int]]) -> bool:
        return all(memory.resident_bytes == pytest.approx(seen, rel=0.05) for memory, seen in pairs)

    # Nothing is sampled meanwhile, but the machine may take pages back between two looks.
    pairs = told_and_seen()
    for _ in range(4):
        if not are_equal(pairs):
            time.sleep(1)
            pairs = told_and_seen()
    assert are_equal(pairs), pairs
    assert all(memory.peak_bytes >= memory.resident_bytes for memory, _ in pairs)


def test_a_relay_that_is_killed_is_a_loss_of_its_node_s_engines_alone(
    engines: SglangEngines, trainer: Any, versions: Versions
) -> None:
    version = versions.push(engines, trainer)
    here, there = engines._supervisor.servers
    num_restarts = engines.metrics()["engine/restarts_count"]
    iterator = engines.generate(prompts(48, group_size=2), SamplingParams(temperature=1.0, max_new_tokens=100, seed=5))
    answers = [next(iterator)]
    assert engines._relay is not None
    os.kill(engines._relay.current().process.pid, signal.SIGKILL)
    answers += list(iterator)
    assert sorted(index for index, _ in answers) == list(range(96))
    assert {completion.weight_versions for _, completion in answers} == {(version,)}
    assert_matches(trainer, [completion for _, completion in answers])
    wait_for_engines(engines, 2, num_restarts + 1)
    assert engines.metrics()["engine/restarts_count"] == num_restarts + 1
    assert engines._supervisor.servers[0] is not here and engines._supervisor.servers[1] is there
    assert_matches(trainer, sample(engines, prompts(4)))


def test_a_daemon_that_is_killed_is_started_again_and_its_engines_with_it(
    engines: SglangEngines, daemon: KeptDaemon, trainer: Any, versions: Versions, run_dir: Path
) -> None:
    version = versions.push(engines, trainer)
    here, there = engines._supervisor.servers
    family = [psutil.Process(there.pid), *psutil.Process(there.pid).children(recursive=True)]
    num_restarts = engines.metrics()["engine/restarts_count"]
    iterator = engines.generate(prompts(48, group_size=2), SamplingParams(temperature=1.0, max_new_tokens=100, seed=5))
    answers = [next(iterator)]
    killed, address = daemon.process, daemon.address
    killed.kill()
    answers += list(iterator)
    assert sorted(index for index, _ in answers) == list(range(96))
    wait_for_engines(engines, 2, num_restarts + 1)
    assert daemon.process.pid != killed.pid and daemon.address == address
    assert engines.metrics()["engine/restarts_count"] == num_restarts + 1
    assert engines._supervisor.servers[0] is here and engines._supervisor.servers[1] is not there
    assert not psutil.wait_procs(family, timeout=WAIT_S)[1], "the engines ended with the daemon that started them"
    completions = sample(engines, prompts(40, group_size=2))
    assert {completion.weight_versions for completion in completions} == {(version,)}
    assert_matches(trainer, completions)
    versions.push(engines, trainer)
    assert_matches(trainer, sample(engines, prompts(40, group_size=2)))
    assert (run_dir / "engines" / "daemon-1.restart-1.log").exists()


def test_engines_that_die_or_hang_are_replaced_under_the_current_weights(
    engines: SglangEngines, trainer: Any, versions: Versions
) -> None:
    version = versions.push(engines, trainer)
    first, second = engines._supervisor.servers
    num_restarts = engines.metrics()["engine/restarts_count"]
    family = [psutil.Process(first.pid), psutil.Process(second.pid)]
    family += [child for server in list(family) for child in server.children(recursive=True)]
    (scheduler,) = [
        process for process in family if process.name() == "sglang::scheduler" and process.ppid() == second.pid
    ]
    scheduler.suspend()  # before it has requests: it could have answered all of them by now
    find_hang_soon(engines, second.name)
    iterator = engines.generate(prompts(48, group_size=2), SamplingParams(temperature=1.0, max_new_tokens=100, seed=5))
    answers = [next(iterator)]
    os.kill(first.pid, signal.SIGKILL)
    answers += list(iterator)
    assert sorted(index for index, _ in answers) == list(range(96))
    assert {completion.weight_versions for _, completion in answers} == {(version,)}
    assert_matches(trainer, [completion for _, completion in answers])
    wait_for_engines(engines, 2, num_restarts + 2)
    assert engines.metrics()["engine/restarts_count"] == num_restarts + 2
    # Only now: this reaps a process of ours, whose end must be left to the supervisor to see.
    assert not psutil.wait_procs(family, timeout=WAIT_S)[1], "the hung engine was killed"


def test_engines_that_die_or_hang_in_a_refresh_drop_out_and_join_again_with_its_weights(
    engines: SglangEngines, trainer: Any, versions: Versions
) -> None:
    first, second = engines._supervisor.servers
    family = [psutil.Process(first.pid), psutil.Process(second.pid)]
    family += [child for server in list(family) for child in server.children(recursive=True)]

    def refresh_amid_which(number: signal.Signals, server: Any) -> None:
        def interrupted() -> Iterator[tuple[str, torch.Tensor]]:
            for index, item in enumerate(trainer.state_dict().items()):
                if index == 5:
                    os.kill(server.pid, number)
                    if number == signal.SIGSTOP:
                        find_hang_soon(engines, server.name)
                yield item

        with torch.no_grad():
            for parameter in trainer.parameters():
                parameter.mul_(1.02)
        versions.current += 1
        engines.refresh(interrupted(), versions.current)

    refresh_amid_which(signal.SIGKILL, first)
    assert engines.broker.num_engines == 1
    assert_matches(trainer, sample(engines, prompts(4)))

    # The one that is left hangs: the other comes back, if it has not yet, to weights that no engine has seen.
    refresh_amid_which(signal.SIGSTOP, second)
    assert_matches(trainer, sample(engines, prompts(4)))
    wait_for_engines(engines, 2)
    completions = sample(engines, prompts(40, group_size=2))
    assert_matches(trainer, completions)
    assert {completion.weight_versions for completion in completions} == {(versions.current,)}
    assert not psutil.wait_procs(family, timeout=WAIT_S)[1], "the hung engine was killed"


def test_losing_every_engine_for_good_is_one_error_with_their_last_words(
    engines: SglangEngines, trainer: Any, versions: Versions, model_path: Path
) -> None:
    """Ends the module's engines: their model is gone, so none can be started again."""
    versions.push(engines, trainer)
    family = [psutil.Process(server.pid) for server in engines._supervisor.servers]
    family += [child for server in list(family) for child in server.children(recursive=True)]
    (model_path / "config.json").rename(model_path / "config.gone")
    for server in engines._supervisor.servers:
        os.kill(server.pid, signal.SIGKILL)
    lost = r"(?s)all 2 engines are lost, each after rollout\.max_restarts=1.*engine 0: .*engine 1: .*config"
    with pytest.raises(EnginesLost, match=lost):
        sample(engines, prompts(2))
    with pytest.raises(EnginesLost):
        engines.refresh(trainer.state_dict().items(), 99)

    engines.close()
    engines.close()
    assert not psutil.wait_procs(family, timeout=WAIT_S)[1]
