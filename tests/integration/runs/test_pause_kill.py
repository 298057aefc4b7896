"""A run that is killed while its evolution is paused for training ends with the numbers of one that never was either.

Broker, round, journal, service, grader and checkpoints are real. Trainer and engines are fakes: an engine's next token
depends on the tokens before it alone, as under greedy decoding, so that what was paused can only go on rightly.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from megatron_p2o.config.read import load_config
from megatron_p2o.config.tree import Config
from megatron_p2o.evolve.process.beside import BesideTraining
from megatron_p2o.evolve.process.conduct import journal_path
from megatron_p2o.evolve.record.journal import read_journal
from megatron_p2o.interfaces import NamedWeights
from megatron_p2o.rollout.engines import SglangEngines
from megatron_p2o.rollout.servers.answers import Generation
from megatron_p2o.run import parts
from megatron_p2o.run.conductor import conduct
from megatron_p2o.run.inputs import load_inputs
from megatron_p2o.testing.fakes import FakePolicy
from megatron_p2o.testing.run_files import repeatable_numbers, whole_lines
from megatron_p2o.testing.tiny_model import write_tiny_qwen3
from megatron_p2o.tiny.problems import PHRASES
from megatron_p2o.types import SamplingParams, TokenIds, UpdateReport

EOS = 2
WAIT_S = 300.0
POLL_S = 0.01
TICK_S = 0.001
"""Between two tokens of an engine."""

KILLED_IN, ENDS_IN = 6, 7
"""Steps: the one in which a run is killed, and the one at whose end the round may end. It begins after step 4 of 8."""

NEVER_PAUSED = "whole"
"""Name of the run whose evolution has all slots that are free."""

pytestmark = pytest.mark.slow


def config_of(folder: Path, name: str) -> Config:
    evolution = {
        **{"rules": "reference", "beside_training": "true", "max_rollouts": 60, "num_lineages": 2},
        "max_slowdown": 100 if name == NEVER_PAUSED else 0,
        **{"dev_size": 8, "plain_control": "false", "max_template_tokens": 200, "reflection.backend": "phrasebook"},
        "reflection.phrases": folder / "phrases.txt",
    }
    overrides = [
        *(f"run.directory={folder}", f"run.name={name}", f"model.path={folder}/model", f"data.train={folder}/train"),
        *("schedule.problems_per_step=4", "schedule.problems_per_update=4", "schedule.epochs=2"),
        *("schedule.save_every_steps=1", "evaluation.at_start=false", "rollout.group_size=4", "hard.min_problems=4"),
        *("rollout.max_new_tokens=60", "rollout.num_engines=2", "rollout.max_running_requests=6"),
        *("grading.num_workers=1", f"grading.function={folder}/by_length.py:reward", "model.template_date=2026-01-02"),
        *("logging.console=false", "logging.rollouts_every_steps=1"),
        *(f"evolution.{setting}={value}" for setting, value in evolution.items()),
    ]
    return load_config(None, overrides)


class SteadyClient:
    """An engine whose next token is a function of those before it.

    While `holds_back`, a third of evolution's responses wait for their last token.
    """

    def __init__(self, watch: "Watch") -> None:
        self._watch = watch
        self._stops: dict[str, asyncio.Event] = {}

    async def generate(
        self, token_ids: TokenIds, sampling: SamplingParams, request_id: str, *, priority: int
    ) -> Generation:
        stop = self._stops[request_id] = asyncio.Event()
        is_training, own = priority == 1, list[int]()
        self._watch.running[request_id] = is_training
        while not stop.is_set():
            await asyncio.sleep(TICK_S)
            if is_training:
                self._watch.kill_if_due()
            mixed = zlib.crc32(np.array([*token_ids, *own], np.int32).tobytes())
            if not is_training and self._watch.holds_back and mixed % 48 == 0:
                self._watch.held.add(request_id)
                continue
            own.append(EOS if mixed % 16 == 0 else 97 + mixed // 16 % 26)
            if own[-1] == EOS or len(own) == sampling.max_new_tokens:
                break
        del self._watch.running[request_id], self._stops[request_id]
        self._watch.held.discard(request_id)
        reason = "abort" if stop.is_set() else "stop" if own[-1] == EOS else "length"
        return Generation(
            token_ids=np.array(own, np.int32),
            logprobs=np.full(len(own), -1.0, np.float32),
            finish_reason=reason,
            weight_versions=(self._watch.version,),
        )

    async def abort(self, request_id: str) -> None:
        for running_id, stop in self._stops.items():
            if running_id.startswith(request_id):
                stop.set()

    async def cache_tokens(self) -> int:
        return 2**30

    async def probe(self, timeout_s: float) -> None: ...

    async def close(self) -> None: ...


class Watch:
    """What a run is at, and when it is to be killed."""

    def __init__(self, config: Config, dies: bool) -> None:
        self._config, self._dies = config, dies
        self.running: dict[str, bool] = {}
        """Of each running request: whether it is training's."""
        self.held: set[str] = set()
        """Those that wait for their last token."""
        self.holds_back = True
        self.version = 0
        self.beside: BesideTraining | None = None
        self.engines: SglangEngines | None = None

    @property
    def round_has_ended(self) -> bool:
        assert self.beside is not None
        return self.beside._round is None or self.beside._round.library.done()

    @property
    def num_scored(self) -> int:
        """Trials on disk."""
        journal, _ = read_journal(journal_path(self._config.run.folder, 0))
        return sum(record["event"] == "Scored" for record in journal)

    @property
    def round_stands_still(self) -> bool:
        """Whether it has scores, and nothing but what is held back."""
        of_evolution = {request_id for request_id, is_training in list(self.running.items()) if not is_training}
        return bool(of_evolution) and of_evolution == self.held and self.num_scored > 0

    def wait_for(self, is_reached: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while not is_reached():
            assert time.monotonic() < deadline, f"{what}: {vars(self)}, {self.num_scored} scores"
            time.sleep(POLL_S)

    def kill_if_due(self) -> None:
        """End this process when evolution has tokens that are kept nowhere else. On the broker's loop."""
        if not self._dies or self.version + 1 != KILLED_IN:
            return
        assert self.engines is not None
        waiting = self.engines.broker._queues._queues["evolution"]
        kept = [len(each.kept.token_ids) for job in waiting._jobs.values() for each in job if each.kept is not None]
        if kept and not any(each.is_pausing for one in self.engines.broker._engines for each in one.running):
            seen = {"kept": kept, "scored": self.num_scored}
            (self._config.run.folder / "killed.json").write_text(json.dumps(seen))
            os.kill(os.getpid(), signal.SIGKILL)


class Policy(FakePolicy):
    """A trainer that gives evolution the time between two steps, and lets the round end in step `ENDS_IN`."""

    layers = SimpleNamespace(layers_reason="fake", attention_reason="fake")

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def update(self, *arguments: Any) -> UpdateReport:
        watch, step = self._watch, self._watch.version + 1
        if watch.beside is not None and watch.beside.running is not None:
            watch.wait_for(lambda: watch.round_stands_still, "the round does not stand still")
        if step == ENDS_IN:
            watch.holds_back = False
            watch.wait_for(lambda: watch.round_has_ended, "the round does not end")
        return super().update(*arguments)

    def plan_updates(self, num_updates: int) -> None: ...

    def memory(self) -> Sequence[Any]:
        return []

    def check_finite(self) -> None: ...


def run(folder: Path, name: str, dies: bool) -> None:
    """Train with a real broker, until the end or until `Watch` kills this process."""
    config = config_of(folder, name)
    watch = Watch(config, dies)

    class Refresh:
        """Stands in for the weights' way to engines that have none."""

        def refresh(self, weights: NamedWeights, version: int, *, verify: bool) -> SimpleNamespace:
            list(weights)
            watch.version = version
            return SimpleNamespace(metrics=dict)

        def close(self) -> None: ...

    class Kept(BesideTraining):
        def __init__(self, rounds: Any) -> None:
            super().__init__(rounds)
            watch.beside = self

    @contextmanager
    def engines_of(stop_token_ids: Sequence[int]) -> Iterator[SglangEngines]:
        started = SglangEngines(
            *(config, config.run.folder, [], lambda *_: pytest.fail("no server")),
            stop_token_ids=[EOS],
            releases_memory=False,
        )
        with closing(started) as watch.engines:
            started._sync = cast("Any", Refresh())
            for index in range(2):
                started.broker.add_engine(f"engine {index}", cast("Any", lambda: SteadyClient(watch)), str)
            yield started

    parts.BesideTraining = Kept  # to know when the round has ended: training asks it between steps only
    taken: Any = (Policy(watch), load_inputs(config), engines_of)
    conduct(config, config.run.folder, *taken)


def start(folder: Path, name: str, *, dies: bool) -> None:
    """Run this file to its end."""
    command = [sys.executable, __file__, str(folder), name, "dies" if dies else "lives"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=2 * WAIT_S, check=False)
    assert ended.returncode == (-signal.SIGKILL if dies else 0), ended.stdout + ended.stderr


def test_a_run_killed_while_evolution_is_paused_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    write_tiny_qwen3(tmp_path / "model", max_positions=512)
    (tmp_path / "phrases.txt").write_text("\n".join(PHRASES) + "\n")
    rows = [{"id": f"p{number}", "question": f"{number}+1", "answer": "2"} for number in range(16)]
    (tmp_path / "train").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "by_length.py").write_text(
        "def reward(problem, response, finish_reason):\n    return float(len(response) % 8 == 0)\n"
    )
    whole, killed = tmp_path / NEVER_PAUSED, tmp_path / "killed"
    start(tmp_path, whole.name, dies=False)
    start(tmp_path, "killed", dies=True)
    seen = json.loads((killed / "killed.json").read_text())
    assert seen["kept"] and seen["scored"] > 0, "tokens that were paused, and trials that are on disk"
    assert not (killed / "templates" / "library-1.json").exists()
    start(tmp_path, "killed", dies=False)
    assert num_pauses(whole) == 0 < num_pauses(killed)
    assert without_compute(killed) == without_compute(whole)
    assert tokens_spent(killed) == tokens_spent(whole)
    assert '"text": "' in (whole / "templates" / "library-1.json").read_text(), "the round has found templates"
    for path in (whole / "hard_samples.jsonl", *(whole / "templates").iterdir(), *(whole / "rollouts").iterdir()):
        assert (killed / path.relative_to(whole)).read_text() == path.read_text(), path.name


def num_pauses(run_dir: Path) -> float:
    lines = whole_lines(run_dir / "metrics.jsonl")
    return sum(line["metrics"].get("engine/evolution_pauses_count", 0.0) for line in lines)


def without_compute(run_dir: Path) -> list[Any]:
    """Return the metrics but for the account, which counts trials of the round when they come."""
    numbers = repeatable_numbers(run_dir)
    return [(*at, {key: each[key] for key in each if not key.startswith("compute/")}) for *at, each in numbers]


def tokens_spent(run_dir: Path) -> dict[str, float]:
    """Return the account at the end, by which every trial is in."""
    last = whole_lines(run_dir / "metrics.jsonl")[-1]["metrics"]
    return {key: last[key] for key in last if key.startswith("compute/") and key.endswith("_tokens")}


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "dies")
