"""The examples of docs/extending.md do what the page says, named by the settings that stand beside them."""

import asyncio
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_p2o.cli import main
from megatron_p2o.config.callables import CallableKind
from megatron_p2o.config.read import load_config
from megatron_p2o.config.tree import Config
from megatron_p2o.data.problems import load_problems
from megatron_p2o.evolve.process.conduct import conduct_round, split_of
from megatron_p2o.evolve.record.library import library_path, load_library
from megatron_p2o.evolve.reflection import own as own_reflector
from megatron_p2o.evolve.reflection.phrasebook import Phrasebook
from megatron_p2o.evolve.reflection.reflection import Example, ReflectionRequest
from megatron_p2o.evolve.reflection.reflectors import build_reflector
from megatron_p2o.evolve.search import rules
from megatron_p2o.evolve.trial import Trial
from megatron_p2o.metrics.log import open_metrics_log
from megatron_p2o.metrics.sinks import registry
from megatron_p2o.metrics.values import Last
from megatron_p2o.rewards import functions
from megatron_p2o.rewards.function_grader import FunctionGrader
from megatron_p2o.rl import surrogate
from megatron_p2o.rl.objective import loss_rule
from megatron_p2o.rl.surrogate import check_surrogate, surrogate_named
from megatron_p2o.testing.evolution import KeyPhraseTask, families_served, make_problems, round_spec
from megatron_p2o.testing.tiny_model import write_tiny_qwen3
from megatron_p2o.tiny.problems import PHRASES
from megatron_p2o.types import CORRECT, Grade, Problem

PAGE = (Path(__file__).parents[3] / "docs" / "extending.md").read_text(encoding="utf-8")

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

PROBLEMS = make_problems(60)


def blocks(kind: str, section: str = "") -> list[str]:
    """Return the code blocks of a kind, of all sections whose title holds `section`."""
    parts = [part for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:] if section in part.partition("\n")[0]]
    assert parts, f"no section {section}"
    return [text for part in parts for label, text in BLOCK.findall(part) if label == kind]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Write all files of the page and start from their folder, as a user would."""
    for text in blocks("python"):
        name = re.match(r"# (\w+\.py)\n", text)
        assert name is not None, f"a block of code begins with the name of its file: {text[:40]}"
        (tmp_path / name[1]).write_text(text)
    monkeypatch.chdir(tmp_path)
    surrogate_named.cache_clear()  # a name means another file in each test
    yield tmp_path


def settings_of(section: str, number: int = 0) -> Config:
    path = Path(f"settings-{number}.yaml")
    path.write_text(blocks("yaml", section)[number])
    needed = ["run.name=test", "model.path=model", *([] if "data:" in path.read_text() else ["data.train=x"])]
    return load_config(path, needed)


def test_the_reward_pays_for_letters_that_mirror() -> None:
    grading = settings_of("reward").grading
    problem = Problem(id="p", question="q", answer=None, columns={"minimum_letters": 5})
    grader = FunctionGrader(replace(grading, num_workers=1, deadline_s=120))
    try:
        answers = ["Never odd or even.", "abcxa", "aba"]
        grades = [grader.submit(problem, answer, "stop").result(120) for answer in answers]
    finally:
        grader.close()
    assert grades == [
        CORRECT,
        Grade(reward=0.5, feedback="50% of the letters mirror."),
        Grade(reward=0.0, feedback="It has 3 letters; 5 are needed."),
    ]


def test_the_data_source_yields_the_problems_of_the_reward() -> None:
    data = settings_of("data source").data
    (task,) = data.train.values()
    problems = load_problems(task.file, data)
    assert problems == load_problems(task.file, data) and len(problems) == 500
    assert all(f"{problem.columns['minimum_letters']} letters" in problem.question for problem in problems)


def test_the_objective_has_the_gradient_of_ppo_at_ratio_one_and_fades_on_both_sides() -> None:
    objective = settings_of("objective").objective
    rule = loss_rule(objective)
    check_surrogate(objective, rule)
    assert callable(rule.surrogate)
    logprobs = torch.tensor([-2.0, -1.0, -3.0], dtype=torch.float64, requires_grad=True)
    ratio = (logprobs - torch.tensor([-2.0, -3.0, -1.0], dtype=torch.float64)).exp()
    losses = rule.surrogate(ratio, logprobs, torch.tensor([0.5, 0.5, 0.5], dtype=torch.float64), rule)
    (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
    assert gradient[0] == pytest.approx(-0.5)
    assert -0.05 < gradient[1] < 0 and -0.05 < gradient[2] < 0, "PPO has 0 and -0.5 times the ratio there"


@pytest.mark.parametrize("number", [0, 1], ids=["greedy", "one_by_one"])
def test_the_evolution_rules_find_templates_and_a_resumed_round_repeats_nothing(number: int, folder: Path) -> None:
    evolution = settings_of("evolution rule", number).evolution
    spec = round_spec(PROBLEMS, rules=evolution.rules, max_rollouts=1500)
    split = split_of(spec)
    assert split is not None

    def conduct(task: KeyPhraseTask, finish: asyncio.Event) -> Any:
        reflector = Phrasebook(PHRASES, 1)
        return asyncio.run(conduct_round(spec, split, folder, task, reflector, finish, lambda _: None))

    class Interrupted(KeyPhraseTask):
        """Dies at a request, as a process may."""

        async def run_trial(self, *given: Any, **more: Any) -> Any:
            if self.requests.total() >= 200:
                raise KeyboardInterrupt
            return await super().run_trial(*given, **more)

    first, second = Interrupted(PROBLEMS), KeyPhraseTask(PROBLEMS)
    with pytest.raises(KeyboardInterrupt):
        conduct(first, asyncio.Event())
    stats = conduct(second, asyncio.Event())
    assert stats.ended_by == "budget"
    assert 1400 < stats.num_rollouts <= 1500
    assert (first.requests & second.requests).total() <= 16 * 3, "of 16 lineages, what was in flight"
    library = load_library(library_path(folder, stats.library_version))
    best = max(library.templates, key=lambda template: template.score or 0)
    assert families_served(best.text) or (best.score or 0) > 0.1


def test_the_reflector_turns_feedback_into_an_instruction() -> None:
    reflection = settings_of("reflector").evolution.reflection
    trials = [
        Trial(reward=reward, response_text="", finish_reason="stop", num_tokens=1, weight_version=0, feedback=feedback)
        for reward, feedback in ((1.0, "fine"), (0.25, "It has 3 letters; 5 are needed."))
    ]
    examples = tuple(Example(problem=PROBLEMS[0], trial=trial) for trial in trials)
    request = ReflectionRequest(proposal=0, parent_text="Think.", examples=examples)
    text = asyncio.run(build_reflector(reflection, 1, {}).propose(request))
    assert text == "Think. Remember: It has 3 letters; 5 are needed."


def test_the_sink_writes_every_number(folder: Path) -> None:
    logging = settings_of("sink").logging
    with open_metrics_log(folder / "run", "run", logging, num_steps=1) as log:
        log.write(0, 0, {"train/loss": Last(0.25)})
    assert (folder / "run" / "numbers.csv").read_text().splitlines() == ["0,train/loss,0.25"]


def test_the_table_names_every_kind_with_its_parameters() -> None:
    kinds: dict[str, CallableKind] = {
        "grading.function": functions.KIND,
        "objective.surrogate": surrogate.KIND,
        "evolution.rules": rules.KIND,
        "evolution.reflection.backend": own_reflector.KIND,
        "logging.sinks": registry.OWN,
    }
    assert {name for name, kind in kinds.items() if f"`{name}` | `{kind.signature}` |" not in PAGE} == set()
    groups = {kind.entry_points for kind in kinds.values() if kind.entry_points}
    assert set(re.findall(r'entry-points\."([\w.]+)"', PAGE)) == groups


def test_the_dry_run_takes_all_of_them_together(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_qwen3(folder / "model", max_positions=400)
    settings: dict[str, Any] = {"run": {"name": "all"}, "model": {"path": "model", "dtype": "float32"}}
    for section in ("reward", "data source", "objective", "evolution rule", "reflector", "sink"):
        for name, values in yaml.safe_load(blocks("yaml", section)[0]).items():
            settings[name] = {**settings.get(name, {}), **values}
    settings["rollout"] = {"max_new_tokens": 8}
    Path("all.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train", "all.yaml", "--dry-run"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "500 problems" in said and "palindrome.py:reward" in said
    for name, breaks in (("smooth.py", "smooth"), ("greedy.py", "greedy"), ("csv_sink.py", "CsvSink")):
        Path(f"broken_{name}").write_text(Path(name).read_text().replace(breaks, f"{breaks}_gone"))
        Path("broken.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(settings).replace(name, f"broken_{name}"))))
        assert main(["train", "broken.yaml", "--dry-run"]) != 0
        assert f"broken_{name}:{breaks} cannot be imported (AttributeError" in capsys.readouterr().err
