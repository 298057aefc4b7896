"""Evolution as a process of its own: rounds over the socket, kills, stops, silence, and the death of rank 0."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_p2o.config.tree import (
    AssignmentConfig,
    Config,
    DataConfig,
    EvolutionConfig,
    HardConfig,
    ModelConfig,
    ReflectionConfig,
    RolloutConfig,
    RunConfig,
    one_task,
)
from megatron_p2o.evolve.process.beside import BesideTraining
from megatron_p2o.evolve.process.conduct import journal_path
from megatron_p2o.evolve.process.session import EvolutionSession
from megatron_p2o.evolve.record.history import template_digest
from megatron_p2o.evolve.record.library import EMPTY_LIBRARY, PublishedLibrary, library_path, load_library
from megatron_p2o.evolve.search.publish import rounds_path
from megatron_p2o.evolve.trial import FreeScore, Rejection, Trial
from megatron_p2o.interfaces import RoundInterrupted
from megatron_p2o.records import to_json
from megatron_p2o.run.trials import round_statistics
from megatron_p2o.testing.evolution import (
    KEY_PHRASES,
    SOON_S,
    KeyPhraseTask,
    families_served,
    is_running,
    make_problems,
    scores_in,
    time_machine,
    wait_until,
    wait_until_gone,
)
from megatron_p2o.tiny.problems import PHRASES
from megatron_p2o.types import Problem, SamplingParams, Template

PROBLEMS = make_problems(60)
WARM_LIBRARY = PublishedLibrary(
    version=1, templates=(Template(id=1, text=" ".join(KEY_PHRASES["affine"]), parent=None, score=0.3),)
)
SOLVED = Trial(reward=1.0, response_text="", finish_reason="stop", num_tokens=1, weight_version=1)
ROUND_TIMEOUT_S = 600.0
"""Longer than any round here takes. Where it is to be over, the session's clock is put forward."""


@pytest.fixture
def phrases(tmp_path: Path) -> Path:
    path = tmp_path / "phrases.txt"
    path.write_text("\n".join(PHRASES) + "\n")
    return path


@pytest.fixture
def sessions() -> Iterator[list[EvolutionSession]]:
    """Sessions appended here are closed at the end."""
    opened: list[EvolutionSession] = []
    yield opened
    for session in opened:
        session.close()


def config_of(phrases: Path, **evolution: Any) -> Config:
    settings = {
        "max_rollouts": 600,
        "reflection": ReflectionConfig(backend="phrasebook", phrases=str(phrases)),
        "round_timeout_s": ROUND_TIMEOUT_S,
        **evolution,
    }
    return Config(
        run=RunConfig(name="test"),
        model=ModelConfig(path="unused"),
        data=DataConfig(train=one_task("unused"), question_format="Please: {question}"),
        rollout=RolloutConfig(max_new_tokens=77, top_p=0.9),
        hard=HardConfig(min_problems=10),
        evolution=EvolutionConfig(**settings),
    )


class KillingTask(KeyPhraseTask):
    """Signals the service at given requests, and notes what its journal held when it was dead."""

    def __init__(self, kill_at: set[int], journal: Path, signal_number: signal.Signals = signal.SIGKILL) -> None:
        super().__init__(PROBLEMS)
        self.session: EvolutionSession | None = None
        self.asked: list[tuple[str, str]] = []
        """(template digest, problem id) in order."""
        self.signalled: list[int] = []
        """Process ids."""
        self.journalled: list[tuple[int, set[tuple[str, str]]]] = []
        """At each kill: number of requests so far, scores on disk."""
        self.after_signal: Callable[[], None] = lambda: None
        self._kill_at = kill_at
        self._journal = journal
        self._signal = signal_number

    def submit(self, template_text: str, problem: Problem, sampling: SamplingParams) -> "Future[Trial | Rejection]":
        self.asked.append((template_digest(template_text), problem.id))
        if len(self.asked) in self._kill_at:
            assert self.session is not None and self.session.service_process_id is not None
            self.signalled.append(self.session.service_process_id)
            os.kill(self.signalled[-1], self._signal)
            if self._signal == signal.SIGKILL:
                wait_until_gone(self.signalled[-1])
                self.journalled.append((len(self.asked), scores_in(self._journal)))
            self.after_signal()
        return super().submit(template_text, problem, sampling)


def killing_session(
    config: Config, run_dir: Path, kill_at: set[int], signal_number: signal.Signals = signal.SIGKILL, **options: Any
) -> tuple[EvolutionSession, KillingTask]:
    task = KillingTask(kill_at, journal_path(run_dir, 0), signal_number)
    session = EvolutionSession(config, run_dir, task.submit, **options)
    task.session = session
    return session, task


# Rounds


def test_round_publishes_templates_that_solve_hard_problems(
    tmp_path: Path, phrases: Path, sessions: list[EvolutionSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_p2o.terminal.TELL_EVERY_S", 0.0)
    task, said = KeyPhraseTask(PROBLEMS), list[str]()
    session = EvolutionSession(config_of(phrases, max_rollouts=7000), tmp_path, task.submit)
    session.announce = said.append
    sessions.append(session)
    library = session.evolve(PROBLEMS, EMPTY_LIBRARY, epoch=0)
    assert said[0] == "prompt evolution: round 0"
    counts = [int(found[1]) for line in said if (found := re.search(r"rollouts: (\d+) of 7000 done after", line))]
    assert len(counts) == len(said) - 1 and counts == sorted(counts) and 0 < counts[-1] <= task.requests.total()
    assert library.version == 1 and library == load_library(library_path(tmp_path, 1))
    served = set[str]().union(*(families_served(template.text) for template in library.templates))
    assert served == {"affine", "cross", "walk"}
    assert all(len(library.assigned(problem)) == 6 for problem in PROBLEMS)
    (stats,) = session.last_rounds
    assert stats is not None and stats.ended_by == "budget" and stats.duration_s > 0
    assert stats.num_rollouts == task.requests.total() and 6990 < stats.num_rollouts <= 7000
    assert (stats.num_hard, stats.num_dev, stats.num_feedback) == (60, 30, 30)
    assert stats.coverage == 1.0 and stats.best_score > 0.5
    numbers = round_statistics([stats])
    assert (numbers["is_cut_off"], numbers["is_reflection_lost"]) == (0, 0)
    assert numbers["num_proposals"] == sum(stats.outcomes.values())
    assert 0 < numbers["num_accepted"] == stats.outcomes["accepted"] == stats.num_candidates - 1
    assert numbers["num_refused"] == sum(count for name, count in stats.outcomes.items() if "refused" in name)
    assert json.loads(rounds_path(tmp_path).read_text()) == to_json(stats)
    assert (session.num_service_losses, session.num_failed_trials) == (0, 0)

    process_id = session.service_process_id
    assert process_id is not None
    task.requests.clear()
    again = session.evolve(PROBLEMS, library, epoch=1)
    assert session.service_process_id == process_id, "one process serves all rounds"
    assert again.version == 2
    assert {text for text, *_ in task.requests} >= {template.text for template in library.templates}, "warm start"
    session.close()
    sessions.clear()
    assert not is_running(process_id)


@pytest.mark.parametrize("is_measured", [True, False])
def test_a_run_says_which_templates_are_drawn_by_score_although_transfer_was_asked_for(
    is_measured: bool,
    tmp_path: Path,
    phrases: Path,
    sessions: list[EvolutionSession],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A measurement crosses the border between the processes, and the journal, to the library; its want is told."""
    task = KeyPhraseTask(PROBLEMS, reliances={"affine": -0.1, "cross": -1.5, "walk": -0.5} if is_measured else None)
    config = replace(config_of(phrases, max_rollouts=3000), assignment=AssignmentConfig(weight="transfer"))
    session = EvolutionSession(config, tmp_path, task.submit)
    sessions.append(session)
    library = session.evolve(PROBLEMS, EMPTY_LIBRARY, epoch=0)
    (stats,) = session.last_rounds
    assert library.templates and stats.num_unweighed == (0 if is_measured else len(library.templates))
    assert all((template.reliance is not None) == is_measured for template in library.templates)
    assert round_statistics([stats])["num_unweighed"] == stats.num_unweighed
    told = f"evolution.unweighed: {stats.num_unweighed} of {stats.num_templates} templates of round 0"
    assert [told in record.getMessage() for record in caplog.records if "unweighed" in record.getMessage()] == (
        [] if is_measured else [True]
    )


def test_a_round_beside_training_that_is_cut_off_goes_on_where_it_was(
    tmp_path: Path, phrases: Path, sessions: list[EvolutionSession]
) -> None:
    class Slow(KeyPhraseTask):
        """Sets an event at its hundredth rollout."""

        def __init__(self) -> None:
            super().__init__(PROBLEMS)
            self.is_under_way = threading.Event()

        def submit(self, template_text: str, problem: Problem, sampling: SamplingParams) -> "Future[Trial | Rejection]":
            if self.requests.total() == 100:
                self.is_under_way.set()
            return super().submit(template_text, problem, sampling)

    first_task = Slow()
    first = EvolutionSession(config_of(phrases, max_rollouts=3500), tmp_path, first_task.submit)
    sessions.append(first)
    beside = BesideTraining(first)
    assert beside.evolve(PROBLEMS, EMPTY_LIBRARY, epoch=0) is EMPTY_LIBRARY
    assert first_task.is_under_way.wait(SOON_S)
    running = beside.running
    assert running is not None and running.epoch == 0
    process_id = first.service_process_id
    assert process_id is not None
    first.close()
    sessions.clear()
    assert not is_running(process_id)
    known = scores_in(journal_path(tmp_path, 0))
    assert known

    second_task = KeyPhraseTask(PROBLEMS)
    second = EvolutionSession(config_of(phrases, max_rollouts=3500), tmp_path, second_task.submit)
    sessions.append(second)
    hard = [problem for problem in PROBLEMS if problem.id in running.problem_ids]
    library = second.evolve(hard, EMPTY_LIBRARY, running.epoch)
    assert library.templates
    assert not known & {(template_digest(text), problem_id) for text, problem_id, *_ in second_task.requests}


def test_a_round_that_is_waited_for_ends_when_the_run_is_to_stop_and_goes_on_later(
    tmp_path: Path, phrases: Path, sessions: list[EvolutionSession]
) -> None:
    asked: list[tuple[str, str]] = []
    is_stopping = threading.Event()

    class StoppingTask(KeyPhraseTask):
        def submit(self, template_text: str, problem: Problem, sampling: SamplingParams) -> "Future[Trial | Rejection]":
            asked.append((template_digest(template_text), problem.id))
            if len(asked) == 100:
                is_stopping.set()
            return super().submit(template_text, problem, sampling) if len(asked) < 100 else Future()

    config = config_of(phrases)
    stopped = EvolutionSession(config, tmp_path, StoppingTask(PROBLEMS).submit, is_stopping=is_stopping.is_set)
    with pytest.raises(RoundInterrupted):
        stopped.evolve(PROBLEMS, EMPTY_LIBRARY, epoch=0)
    process_id = stopped.service_process_id
    stopped.close()
    assert process_id is None or not is_running(process_id)
    known = scores_in(journal_path(tmp_path, 0))
    assert 50 < len(known) < 100

    task = KeyPhraseTask(PROBLEMS)
    resumed = EvolutionSession(config, tmp_path, task.submit)
    sessions.append(resumed)
    library = resumed.evolve(PROBLEMS, EMPTY_LIBRARY, epoch=0)
    assert library.templates
    repeated = {(template_digest(text), problem_id) for text, problem_id, _, _ in task.requests} & known
    assert not repeated


def test_rollouts_are_sampled_as_configured(tmp_path: Path, phrases: Path, sessions: list[EvolutionSession]) -> None:
    asked: set[tuple[SamplingParams, str]] = set()
    task = KeyPhraseTask(PROBLEMS)

    def submit_trial(text: str, problem: Problem, sampling: SamplingParams) -> "Future[Trial | Rejection]":
        asked.add((replace(sampling, seed=None), problem.question))
        return task.submit(text, problem, sampling)

    sessions.append(EvolutionSession(config_of(phrases, plain_control=True), tmp_path, submit_trial))
    sessions[0].evolve(PROBLEMS, EMPTY_LIBRARY, epoch=0)
    greedy = SamplingParams(temperature=0.0, max_new_tokens=77, top_p=1.0)
    like_training = SamplingParams(temperature=0.6, max_new_tokens=77, top_p=0.9)
    assert {sampling for sampling, _ in asked} == {greedy, like_training}
    assert {question for _, question in asked} == {problem.question for problem in PROBLEMS}
    (stats,) = sessions[0].last_rounds
    assert stats is not None and stats.plain_coverage == 0.0, "a plain prompt never succeeds in this task"


def test_too_few_hard_problems_start_no_process(
    tmp_path: Path, phrases: Path, sessions: list[EvolutionSession]
) -> None:
    sessions.append(EvolutionSession(config_of(phrases), tmp_path, KeyPhraseTask(PROBLEMS).submit))
    library = sessions[0].evolve(PROBLEMS[:9], PublishedLibrary(version=4), epoch=0)
    assert library == PublishedLibrary(version=5)
    assert sessions[0].service_process_id is None
    assert sessions[0].last_rounds[0].ended_by == "too_few_hard"


def test_training_rollouts_given_to_the_session_reach_the_round(
    tmp_path: Path, phrases: Path, sessions: list[EvolutionSession]
) -> None:
    task = KeyPhraseTask(PROBLEMS)
    session = EvolutionSession(config_of(phrases), tmp_path, task.submit)
    sessions.append(session)
    failed = Trial(reward=0.0, response_text="?", finish_reason="stop", num_tokens=3, weight_version=3)
    for problem in PROBLEMS:
        session.observe(FreeScore(template_text="", problem_id=problem.id, trial=failed))
    session.evolve(PROBLEMS, EMPTY_LIBRARY, epoch=0)
    assert all(text for text, *_ in task.requests)
    session.evolve(PROBLEMS, EMPTY_LIBRARY, epoch=1)
    assert any(not text for text, *_ in task.requests), "they count for one round only"


# Kills


@pytest.mark.parametrize("kill_at", [1, 37, 160, 431])
def test_killed_service_resumes_and_neither_loses_nor_repeats_a_finished_rollout(
    tmp_path: Path, phrases: Path, sessions: list[EvolutionSession], kill_at: int
) -> None:
    session, task = killing_session(config_of(phrases), tmp_path, {kill_at})
    sessions.append(session)
    library = session.evolve(PROBLEMS, EMPTY_LIBRARY, epoch=0)
    ((num_asked, journalled),) = task.journalled
    if kill_at > 100:
        assert journalled, "the kill fell into the middle of the work"
    assert scores_in(journal_path(tmp_path, 0)) >= journalled, "lost"
    assert not set(task.asked[num_asked:]) & journalled, "repeated"
    assert session.last_rounds[0].ended_by == "budget" and session.last_rounds[0].num_restarts == 1
    assert 590 < session.last_rounds[0].num_rollouts <= 600
    assert library == load_library(library_path(tmp_path, 1))


def test_service_killed_twice_costs_the_round_but_not_what_it_found(
    tmp_path: Path, phrases: Path, sessions: list[EvolutionSession]
) -> None:
    session, task = killing_session(config_of(phrases), tmp_path, {200, 400})
    sessions.append(session)
    library = session.evolve(PROBLEMS, WARM_LIBRARY, epoch=0)
    (stats,) = session.last_rounds
    assert stats is not None and stats.ended_by == "service_lost" and stats.num_restarts == 2
    assert library.version == 2 and library.templates, "salvaged from the journal"
    assert library == load_library(library_path(tmp_path, 2))
    assert stats.num_rollouts == len(task.journalled[1][1])
    next_library = session.evolve(PROBLEMS, library, epoch=1)
    assert next_library.version == 3
    assert session.last_rounds[0].ended_by == "budget", "the next round has a service again"


def test_service_that_cannot_start_costs_evolution_only(
    tmp_path: Path, phrases: Path, sessions: list[EvolutionSession]
) -> None:
    sessions.append(EvolutionSession(config_of(phrases), tmp_path, KeyPhraseTask(PROBLEMS).submit))
    phrases.unlink()
    library = sessions[0].evolve(PROBLEMS, PublishedLibrary(version=3), epoch=0)
    assert library == PublishedLibrary(version=4)
    assert sessions[0].last_rounds[0].ended_by == "service_lost"
    assert "phrases.txt" in (tmp_path / "evolution" / "service.log").read_text()


# Time


def test_late_round_publishes_what_it_has_and_says_so(
    tmp_path: Path, phrases: Path, sessions: list[EvolutionSession], caplog: pytest.LogCaptureFixture
) -> None:
    task = KeyPhraseTask(PROBLEMS)
    unanswered: list[Future[Trial | Rejection]] = []

    def submit_trial(text: str, problem: Problem, sampling: SamplingParams) -> "Future[Trial | Rejection]":
        if task.requests.total() >= 200:
            unanswered.append(Future())
            return unanswered[-1]
        return task.submit(text, problem, sampling)

    config = config_of(phrases, plain_control=True)
    session = EvolutionSession(config, tmp_path, submit_trial, finish_grace_s=ROUND_TIMEOUT_S)
    sessions.append(session)
    put_forward = time_machine(session, ROUND_TIMEOUT_S)
    running = session.start(PROBLEMS, WARM_LIBRARY, epoch=0)
    journal = journal_path(tmp_path, 0)
    wait_until(lambda: len(unanswered) > 0 and len(scores_in(journal)) == 200, "every answer is in the journal")
    put_forward()
    library = running.result(SOON_S)
    (stats,) = session.last_rounds
    assert stats is not None and stats.ended_by == "deadline" and stats.num_rollouts == 200
    assert library.templates and session.num_service_losses == 0
    assert all(future.cancelled() for future in unanswered), "nobody waits for them any more"
    limit = f"evolution.round_timeout_s={ROUND_TIMEOUT_S:g}"
    assert f"round 0 is cut off by {limit} before its budget of rollouts is spent" in caplog.text
    assert "round 0 ended by deadline after 200 rollouts" in caplog.text
    assert round_statistics([stats])["is_cut_off"] == 1
    (line,) = rounds_path(tmp_path).read_text().splitlines()
    assert json.loads(line)["ended_by"] == "deadline"


def test_frozen_service_is_given_up_and_killed(tmp_path: Path, phrases: Path, sessions: list[EvolutionSession]) -> None:
    session, task = killing_session(config_of(phrases), tmp_path, {20}, signal.SIGSTOP, finish_grace_s=0.2)
    sessions.append(session)
    task.after_signal = time_machine(session, ROUND_TIMEOUT_S)
    library = session.evolve(PROBLEMS, EMPTY_LIBRARY, epoch=0)
    assert session.last_rounds[0].ended_by == "service_lost"
    assert library.version == 1
    wait_until_gone(task.signalled[0])


# Failures around it


def test_trials_that_raise_are_counted_and_end_with_plain_prompts(
    tmp_path: Path, phrases: Path, sessions: list[EvolutionSession]
) -> None:
    numbers = iter(range(10**9))

    def submit_trial(text: str, problem: Problem, sampling: SamplingParams) -> "Future[Trial | Rejection]":
        future: Future[Trial | Rejection] = Future()
        match next(numbers) % 4:
            case 0:
                raise RuntimeError("no engine")
            case 1:
                future.set_exception(ValueError("bad prompt"))
            case 2:
                future.cancel()
            case _:
                future.set_result(replace(SOLVED, num_tokens=1.5))  # pyright: ignore[reportArgumentType]
        return future

    sessions.append(EvolutionSession(config_of(phrases), tmp_path, submit_trial))
    library = sessions[0].evolve(PROBLEMS, EMPTY_LIBRARY, epoch=0)
    (stats,) = sessions[0].last_rounds
    assert stats is not None and stats.num_rollouts == 0 and stats.ended_by == "no_progress"
    assert library == PublishedLibrary(version=1)
    assert sessions[0].num_failed_trials == next(numbers) > 0
    (last_round,) = sessions[0].last_rounds
    assert last_round.num_failed_trials == sessions[0].num_failed_trials
    assert sessions[0].num_service_losses == 0


def test_served_model_reflects_for_a_round(
    tmp_path: Path, phrases: Path, sessions: list[EvolutionSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies: list[dict[str, Any]] = []
    keys: set[str | None] = set()
    held: list[dict[str, str]] = []
    monkeypatch.setenv("WANDB_API_KEY", "0123456789")
    monkeypatch.setenv("P2O_REFLECTION_API_KEY", "of another endpoint")

    class Model(BaseHTTPRequestHandler):
        """Suggests both key phrases of affine, worded anew each time."""

        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            keys.add(self.headers["Authorization"])
            template = f"{' '.join(KEY_PHRASES['affine'])} Variant {len(bodies)}."
            assert sessions[0].service_process_id is not None
            held.append(psutil.Process(sessions[0].service_process_id).environ())
            answer = {"choices": [{"message": {"content": f"Better:\n```\n{template}\n```"}}]}
            content = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Model) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        session = EvolutionSession(
            config_of(phrases, reflection=ReflectionConfig(backend="self")),
            tmp_path,
            KeyPhraseTask(PROBLEMS).submit,
            reflection_url=f"http://127.0.0.1:{server.server_port}/v1",
            reflection_model="initial-policy",
            reflection_api_key="sk-of-this-run",
        )
        sessions.append(session)
        library = session.evolve(PROBLEMS, EMPTY_LIBRARY, epoch=0)
        server.shutdown()
    assert library.templates and all("affine" in families_served(template.text) for template in library.templates)
    assert keys == {"Bearer sk-of-this-run"}
    assert held and all(each["P2O_REFLECTION_API_KEY"] == "sk-of-this-run" for each in held)
    assert not any("WANDB_API_KEY" in each for each in held)
    assert {body["model"] for body in bodies} == {"initial-policy"}
    prompt = bodies[0]["messages"][0]["content"]
    assert "Please: " in prompt and "The correct final answer is " in prompt, "as the policy was asked, with the answer"


def test_a_reflector_of_ones_own_works_in_the_service_with_the_secrets_it_names(
    tmp_path: Path,
    phrases: Path,
    sessions: list[EvolutionSession],
    monkeypatch: pytest.MonkeyPatch,
    installed_package: Callable[[str, str, str], Path],
) -> None:
    code = f"""
import os

class Writer:
    def __init__(self, login_env):
        assert os.environ[login_env] == "open sesame"
    def __call__(self, request):
        held = [name for name in ("WRITER_LOGIN", "WANDB_API_KEY") if name in os.environ]
        return "{" ".join(KEY_PHRASES["affine"])} " + f"Variant {{request.proposal}} held {{held}}."
"""
    installed_package("my_writer", code, "[megatron_p2o.reflectors]\nwriter = my_writer:Writer\n")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789")
    monkeypatch.setenv("WRITER_LOGIN", "open sesame")
    monkeypatch.setenv("P2O_SECRET_NAMES", "WRITER_LOGIN")
    reflection = ReflectionConfig(backend="writer", arguments={"login_env": "WRITER_LOGIN"})
    session = EvolutionSession(
        config_of(phrases, reflection=reflection, max_rollouts=300), tmp_path, KeyPhraseTask(PROBLEMS).submit
    )
    sessions.append(session)
    library = session.evolve(PROBLEMS, EMPTY_LIBRARY, epoch=0)
    assert library.templates and all("affine" in families_served(template.text) for template in library.templates)
    assert all("held ['WRITER_LOGIN']." in template.text for template in library.templates)


def test_dead_reflection_endpoint_pauses_evolution_and_says_so(
    tmp_path: Path, phrases: Path, sessions: list[EvolutionSession], caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(phrases, reflection=ReflectionConfig(backend="self", max_retries=0))
    session = EvolutionSession(
        config,
        tmp_path,
        KeyPhraseTask(PROBLEMS).submit,
        reflection_url="http://127.0.0.1:1/v1",
        reflection_model="initial-policy",
        reflection_api_key="sk-very-secret",
    )
    sessions.append(session)
    library = session.evolve(PROBLEMS, EMPTY_LIBRARY, epoch=0)
    assert library == PublishedLibrary(version=1)
    assert session.last_rounds[0].ended_by == "reflection_unavailable"
    assert "evolution pauses until the next round: http://127.0.0.1:1/v1/chat/completions" in caplog.text
    files = [path for path in tmp_path.rglob("*.*") if path.suffix in (".log", ".json", ".jsonl")]
    written = caplog.text + "".join(path.read_text() for path in files)
    assert len(files) >= 3
    assert "sk-very-secret" not in written


def test_unusable_reflection_settings_are_refused_at_the_start(tmp_path: Path, phrases: Path) -> None:
    task = KeyPhraseTask(PROBLEMS)
    config = config_of(phrases)
    phrases.write_text("# only a comment\n")
    with pytest.raises(ValueError, match="holds no phrase"):
        EvolutionSession(config, tmp_path, task.submit)
    lonely = replace(config, evolution=replace(config.evolution, reflection=ReflectionConfig(backend="self")))
    with pytest.raises(ValueError, match=r"needs evolution\.reflection\.base_url"):
        EvolutionSession(lonely, tmp_path, task.submit)


def test_service_dies_with_rank_0(tmp_path: Path, phrases: Path) -> None:
    program = textwrap.dedent(
        """
        import json, sys
        from concurrent.futures import Future
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        from test_evolution_service import EMPTY_LIBRARY, PROBLEMS, EvolutionSession, config_of

        def submit_trial(text, problem, sampling):
            print(json.dumps(session.service_process_id), flush=True)
            return Future()  # never done: the round hangs until this process is killed

        session = EvolutionSession(config_of(Path(sys.argv[2])), Path(sys.argv[3]), submit_trial)
        session.evolve(PROBLEMS, EMPTY_LIBRARY, 0)
        """
    )
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", program, here, str(phrases), str(tmp_path)]
    rank_0 = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert rank_0.stdout is not None
    try:
        service = json.loads(rank_0.stdout.readline())
        assert is_running(service)
        os.kill(service, signal.SIGSTOP)  # so that it cannot notice the closed socket: only the kernel can end it
    finally:
        rank_0.kill()
        rank_0.wait(SOON_S)
    wait_until_gone(service)


def test_service_holds_no_torch() -> None:
    named = "{'torch', 'megatron', 'openai', 'httpx'}"
    program = f"import sys, megatron_p2o.evolve.process.service; print({named} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, timeout=SOON_S).stdout
    assert printed.strip() == b"set()"
