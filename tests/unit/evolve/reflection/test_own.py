"""A reflector of one's own: how it is named, what it is given, and that nothing it does gets round the guards."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_p2o.config.tree import ReflectionConfig
from megatron_p2o.evolve.process.conduct import conduct_round, journal_path, split_of
from megatron_p2o.evolve.record.history import RoundHistory
from megatron_p2o.evolve.record.journal import read_journal
from megatron_p2o.evolve.reflection.own import MAX_FAILURES
from megatron_p2o.evolve.reflection.reflection import (
    Example,
    ReflectionRefused,
    ReflectionRequest,
    ReflectionUnavailable,
)
from megatron_p2o.evolve.reflection.reflectors import Reflector, build_reflector, check_settings, secrets_of
from megatron_p2o.evolve.trial import Trial
from megatron_p2o.processes import PROXY_VARIABLES
from megatron_p2o.testing.evolution import KeyPhraseTask, make_problems, round_spec

PROBLEMS = make_problems(60)

TRIAL = Trial(reward=0.0, response_text="7", finish_reason="stop", num_tokens=1, weight_version=0, feedback="too small")

REQUEST = ReflectionRequest(
    proposal=3,
    parent_text="Think.",
    examples=(Example(problem=PROBLEMS[0], trial=TRIAL),),
    task_description="Guess a number.",
)

CODE = """
import asyncio, os, time
from megatron_p2o.evolve.reflection.reflection import ReflectionRefused, ReflectionUnavailable

def plain(request, suffix="!"):
    (example,) = request.examples
    seen = [request.parent_text, request.task_description, example.problem.question, example.trial.feedback]
    return " | ".join(seen) + suffix

async def later(request):
    await asyncio.sleep(0)
    return f"proposal {request.proposal}"

class Writer:
    closed = []
    def __init__(self, key_env):
        self.key = os.environ[key_env]
    def __call__(self, request):
        return self.key
    async def close(self):
        self.closed.append(self.key)

def two(request, other):
    return ""

def raises(request):
    raise KeyError("instruction")

def number(request):
    return 7

async def hangs(request):
    await asyncio.sleep(60)

def refuses(request):
    raise ReflectionRefused("nothing new")

def is_gone(request):
    raise ReflectionUnavailable("moved")

class Silent:
    pass

answer = "42"

def leaks(request):
    return f"The answer is {request.examples[0].problem.answer}."

def marks(request):
    return f"Well.<|im_end|> {request.proposal}"
"""


@pytest.fixture
def own(installed_package: Callable[[str, str, str], Path]) -> Path:
    """Return the file of an installed package whose reflector `shouting` is an entry point."""
    entry_points = "[megatron_p2o.reflectors]\nshouting = my_reflectors:plain\n"
    return installed_package("my_reflectors", CODE, entry_points) / "my_reflectors.py"


def reflector(backend: str, **settings: Any) -> Reflector:
    return build_reflector(ReflectionConfig(backend=backend, **settings), 1, {})


def proposed(backend: str, **settings: Any) -> str:
    return asyncio.run(reflector(backend, **settings).propose(REQUEST))


def refusal(backend: str, **settings: Any) -> str:
    with pytest.raises(ValueError) as refused:
        check_settings(ReflectionConfig(backend=backend, **settings))
    assert str(refused.value).startswith(f"evolution.reflection.backend={backend} ")
    return str(refused.value)


def test_it_is_an_entry_point_a_function_of_a_module_or_of_a_file(own: Path) -> None:
    seen = f"Think. | Guess a number. | {PROBLEMS[0].question} | too small"
    assert proposed("shouting") == f"{seen}!"
    assert proposed("my_reflectors:plain", arguments={"suffix": "?"}) == f"{seen}?"
    assert proposed(f"{own}:plain") == f"{seen}!"
    assert proposed(f"{own}:later") == "proposal 3"


def test_a_class_is_made_once_and_closed_and_finds_its_key_by_name(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_PASS_PHRASE", "open sesame")
    config = ReflectionConfig(backend="my_reflectors:Writer", arguments={"key_env": "MY_PASS_PHRASE"})
    assert secrets_of(config) == ("MY_PASS_PHRASE", *PROXY_VARIABLES)

    async def use() -> list[str]:
        built = build_reflector(config, 1, {})
        texts = [await built.propose(REQUEST) for _ in range(2)]
        await built.close()
        return [*texts, *built._function.closed]  # pyright: ignore[reportAttributeAccessIssue]

    assert asyncio.run(use()) == ["open sesame"] * 3


def test_what_cannot_be_called_is_refused_with_the_signature(own: Path) -> None:
    assert "is none of openai, self, phrasebook, shouting, nor package.module:callable" in refusal("shoutin")
    assert "(packages add names by the entry points megatron_p2o.reflectors)" in refusal("shoutin")
    expected = "has the signature (request, other) and must be callable as (request) (missing a required argument: "
    assert expected in refusal(f"{own}:two")
    assert "unexpected keyword argument 'suffiks'" in refusal("shouting", arguments={"suffiks": 1})
    assert "must be made with evolution.reflection.arguments (missing a required argument: 'key_env')" in refusal(
        f"{own}:Writer"
    )
    assert "cannot be made (KeyError: 'UNSET')" in refusal(f"{own}:Writer", arguments={"key_env": "UNSET"})
    assert "has no method __call__(self, request)" in refusal(f"{own}:Silent")
    assert "is str, and must be callable as (request)" in refusal(f"{own}:answer")
    assert "cannot be imported (AttributeError" in refusal(f"{own}:missing")


def test_arguments_beside_a_backend_of_ours_are_refused() -> None:
    with pytest.raises(ValueError, match=r"evolution\.reflection\.arguments are of a backend of one's own"):
        check_settings(ReflectionConfig(backend="phrasebook", phrases="phrases.txt", arguments={"a": 1}))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("raises", "KeyError: 'instruction'"),
        ("number", "TypeError: it returned int, and not a text"),
        ("hangs", "it took longer than evolution.reflection.timeout_s=0.01"),
    ],
)
def test_a_failure_costs_a_proposal_and_five_in_a_row_pause_evolution(
    own: Path, name: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    built = reflector(f"{own}:{name}", timeout_s=0.01 if name == "hangs" else 60.0)

    async def ask() -> None:
        for _ in range(MAX_FAILURES - 1):
            with pytest.raises(ReflectionRefused, match="own reflector failed") as refused:
                await built.propose(REQUEST)
            assert refused.value.detail == reason
        with pytest.raises(ReflectionUnavailable) as unavailable:
            await built.propose(REQUEST)
        assert str(unavailable.value).endswith(f"failed {MAX_FAILURES} times in a row, the last time: {reason}")

    asyncio.run(ask())
    assert [record.exc_info is not None for record in caplog.records] == [True, *[False] * (MAX_FAILURES - 1)]


def test_it_may_refuse_or_give_up_by_itself(own: Path) -> None:
    for _ in range(2 * MAX_FAILURES):
        with pytest.raises(ReflectionRefused, match="nothing new"):
            proposed(f"{own}:refuses")
    with pytest.raises(ReflectionUnavailable, match="moved"):
        proposed(f"{own}:is_gone")


@pytest.mark.parametrize(("name", "refusal"), [("leaks", "leaks an answer"), ("marks", "chat markup")])
def test_what_it_returns_goes_through_the_guards(own: Path, tmp_path: Path, name: str, refusal: str) -> None:
    spec = round_spec(PROBLEMS, max_rollouts=60, num_lineages=1)
    split = split_of(spec)
    assert split is not None
    built = reflector(f"{own}:{name}")
    task = KeyPhraseTask(PROBLEMS)
    asyncio.run(conduct_round(spec, split, tmp_path, task, built, asyncio.Event(), lambda _: None))
    records, _ = read_journal(journal_path(tmp_path, 0))
    history = RoundHistory(records, lambda _: None, spec.fingerprint())
    assert history.reflections
    assert {reflected.refusal for reflected in history.reflections.values()} == {refusal}
    assert {text for text, *_ in task.requests} == {""}, "no candidate was ever tried"
