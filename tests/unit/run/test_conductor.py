"""A run from its beginning to its end on rank 0, with fakes for trainer and engines: what is started is closed."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any

import psutil
import pytest

from megatron_p2o.config.read import load_config
from megatron_p2o.config.tree import Config
from megatron_p2o.evolve.process.plain_rollouts import PlainRollouts
from megatron_p2o.evolve.record.library import EMPTY_LIBRARY
from megatron_p2o.interfaces import NamedWeights
from megatron_p2o.run.conductor import conduct
from megatron_p2o.run.inputs import lines_of_help, load_inputs
from megatron_p2o.run.launch import launch
from megatron_p2o.run.resume.resumption import check_resume, finished
from megatron_p2o.testing.fakes import FakeEngines, FakePolicy, FakeReply, fake_problem
from megatron_p2o.testing.run_files import repeatable_numbers, whole_lines
from megatron_p2o.testing.tiny_model import write_tiny_qwen3
from megatron_p2o.types import Completion, Prompt, SamplingParams


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("tiny"), max_positions=512)


@pytest.fixture
def config(tmp_path: Path, model: Path) -> Config:
    """Two epochs of two steps of two problems, four rollouts each; nothing evolves."""
    return config_of(tmp_path, model)


def config_of(tmp_path: Path, model: Path, *overrides: str, num_problems: int = 4) -> Config:
    train, rows = tmp_path / "train.jsonl", [{"id": f"p{n}", "question": f"{n}+1"} for n in range(num_problems)]
    train.write_text("".join(json.dumps({**row, "answer": "2"}) + "\n" for row in rows))
    return load_config(
        None,
        [
            *(f"run.directory={tmp_path}", "run.name=run", f"model.path={model}", f"data.train={train}"),
            *("schedule.problems_per_step=2", "schedule.problems_per_update=2", "schedule.epochs=2"),
            *("rollout.group_size=4", "rollout.max_new_tokens=100", "evolution.enabled=false"),
            *("grading.num_workers=1", "logging.console=false", "evaluation.at_start=false"),
            "model.template_date=2026-01-02",
            *overrides,
        ],
    )


class LostEngine(RuntimeError):
    """What a fake part fails with."""


@dataclass(kw_only=True, slots=True)
class Engines(FakeEngines):
    """Engines that know whether they are closed."""

    reply: Callable[[Prompt, int], FakeReply] = lambda prompt, index: FakeReply(text="!")
    fails: str = ""
    """Name of the call that raises."""
    is_closed: bool = False
    broker: Any = field(default_factory=SimpleNamespace)
    busy_s: float = 0.0

    def __enter__(self) -> "Engines":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.is_closed = True

    def refresh(self, weights: NamedWeights, version: int) -> None:
        if self.fails == "refresh":
            raise LostEngine("refresh")
        FakeEngines.refresh(self, weights, version)

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, places: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Completion]]:
        if self.fails == "generate":
            raise LostEngine("generate")
        return FakeEngines.generate(self, prompts, sampling, places)

    def start_reflection_server(self) -> tuple[str, str]:
        raise LostEngine("reflection")

    def host_memory(self) -> Sequence[Any]:
        return []

    def relay_memory(self) -> Sequence[Any]:
        return []

    def metrics(self) -> Mapping[str, float]:
        return {}


class Policy(FakePolicy):
    """A trainer's handle as far as a run on rank 0 asks it."""

    layers = SimpleNamespace(layers_reason="fake", attention_reason="fake")
    num_planned: int | None = None

    def plan_updates(self, num_updates: int) -> None:
        assert self.num_updates == 0, "before the checkpoint is loaded"
        self.num_planned = num_updates

    def memory(self) -> Sequence[Any]:
        return []

    def check_finite(self) -> None: ...


def run(config: Config, start: Callable[[Sequence[int]], Engines]) -> Policy:
    policy, engines = Policy(), start
    taken: Any = (policy, load_inputs(config), engines)
    conduct(config, config.run.folder, *taken)
    return policy


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True) if child.status() != "zombie"}


def test_a_run_trains_to_the_end_of_its_schedule_and_leaves_its_results(config: Config) -> None:
    before, engines = children(), Engines()
    policy = run(config, lambda stop_token_ids: engines)
    folder = config.run.folder
    assert policy.num_planned == 4 * config.schedule.updates_per_step
    assert engines.is_closed and children() <= before
    assert engines.refreshes == [0, 1, 2, 3, 4]
    assert json.loads((folder / "results.json").read_text())["num_steps"] == 4
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "perf/step_s" in line["metrics"]] == [1, 2, 3, 4]
    assert len((folder / "hard_samples.jsonl").read_text().splitlines()) == 8
    assert (folder / "checkpoints" / "latest").read_text() == "step-000004"


def test_the_last_evaluation_is_made_once_and_the_end_says_what_has_changed(
    config: Config, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engines, folder = Engines(), config.run.folder
    held = [f"data.evaluation.held={tmp_path}/train.jsonl", "evaluation.every_steps=2", "evaluation.num_samples=1"]
    run(config_of(tmp_path, model, *held), lambda stop_token_ids: engines)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval/held/avg" in line["metrics"]] == [2, 4]
    assert len(engines.samplings) == 4 + 2, "four steps and two evaluations"
    assert json.loads((folder / "results.json").read_text())["evaluation"]["held"]["accuracy"] == 0.0
    said = capsys.readouterr().out.splitlines()
    assert "engines ready: a fresh run of 4 steps" in said
    assert said[-4:-1] == [
        "accuracy on held, asked plainly: 0.000 at step 2, 0.000 at step 4",
        "hard problems: 4 at step 2, 4 at step 4",
        f"weights: {folder}/checkpoints/step-000004; as a Hugging Face folder: python tools/convert_checkpoint.py "
        f"to-hf {folder}/checkpoints/step-000004 --out models/run",
    ]


def ending_of(config: Config) -> str:
    return finished(config, config.run.folder, check_resume(config, config.run.folder))


def test_a_run_that_is_finished_says_so_at_once_and_starts_nothing(
    config: Config, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = config.run.folder
    assert ending_of(config) == "", "it has not begun"
    run(config, lambda stop_token_ids: Engines())
    ways = f"p2o view {folder}, or p2o report {folder}"
    line = f"finished after 4 steps: results are in {folder}/results.json; to look at them: {ways}"
    assert capsys.readouterr().out.splitlines()[-1] == line
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert launch(config) == 0
    assert capsys.readouterr().out.splitlines() == [f"{line}; to train on: raise schedule.epochs=2"]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path in written} == written
    assert not (folder / "config.yaml").exists(), "no rank was started"

    def left(*overrides: str) -> str:
        return ending_of(config_of(tmp_path, model, *overrides))

    assert left("logging.rollouts_every_steps=5").startswith("finished after 4 steps: ")
    assert left("schedule.epochs=3") == "", "steps are left"
    assert left("optimizer.lr=1e-7") == "", "its results would be others"
    (folder / "results.json").write_text('{"num_steps": 3}')
    assert left() == "", "those results are of an earlier end"
    (folder / "results.json").unlink()
    assert left() == "", "it ended before its results were written"


def test_a_run_that_max_steps_ends_says_what_to_raise(tmp_path: Path, model: Path, config: Config) -> None:
    limited = config_of(tmp_path, model, "schedule.max_steps=1")
    run(limited, lambda stop_token_ids: Engines())
    assert ending_of(limited).endswith("; to train on: raise schedule.max_steps=1")
    assert ending_of(config_of(tmp_path, model, "schedule.max_steps=2")) == ""


def test_a_run_that_is_asked_to_stop_saves_and_goes_on_where_it_stood(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = config.run.folder

    def stop_in_the_second_step(prompt: Prompt, index: int) -> FakeReply:
        if len(first.samplings) == 2:
            (folder / "stop").touch()
        return FakeReply(text="!")

    first, second = Engines(reply=stop_in_the_second_step), Engines()
    run(config, lambda stop_token_ids: first)
    assert (folder / "checkpoints" / "latest").read_text() == "step-000002"
    assert not (folder / "stop").exists() and not (folder / "results.json").exists()
    said = f"stopped after step 2, all is saved in {folder}: the same command goes on"
    assert capsys.readouterr().out.splitlines()[-1] == said
    run(config, lambda stop_token_ids: second)
    assert f"engines ready: goes on after step 2 of 4, from {folder}/checkpoints/step-000002" in capsys.readouterr().out
    assert second.refreshes == [2, 3, 4]
    asked = [prompt.problem.id for engines in (first, second) for prompt in engines.prompts[::4]]
    assert sorted(asked[:4]) == sorted(asked[4:]) == ["p0", "p1", "p2", "p3"]
    assert [json.loads(line)["step"] for line in (folder / "history.jsonl").read_text().splitlines()] == [0, 2]


def test_templates_of_a_file_are_given_to_hard_problems_and_nothing_is_sampled_to_choose_them(
    tmp_path: Path, model: Path
) -> None:
    texts = ["Count on your fingers.", "Take your time.", "Begin at the end."]
    (tmp_path / "given.txt").write_text("# by hand\n" + "".join(f"{text}\n\n" for text in texts))
    given = (f"evolution.templates_file={tmp_path}/given.txt", "evolution.enabled=true", "hard.min_problems=1")
    config = config_of(tmp_path, model, *given, "assignment.num_plain=1", "evolution.warm_start=false")
    engines = Engines()
    run(config, lambda stop_token_ids: engines)
    assert len(engines.prompts) == 2 * 4 * 4, "two epochs of training rollouts, and no trial"
    first, second = engines.prompts[:16], engines.prompts[16:]
    assert not any(prompt.is_templated for prompt in first)
    drawn = [prompt.template.text for prompt in second]
    assert [bool(text) for text in drawn] == [True, True, True, False] * 4
    assert {text for text in drawn if text} <= set(texts) and len(set(drawn)) > 2
    library = json.loads((config.run.folder / "templates" / "library-1.json").read_text())
    assert [template["text"] for template in library["templates"]] == texts
    results = json.loads((config.run.folder / "results.json").read_text())
    assert results["num_rollouts_evolution"] == 0 and results["rounds"] == []
    again = Engines()
    run(config_of(tmp_path, model, *given, "assignment.num_plain=1", "run.name=again"), lambda stop_token_ids: again)
    assert [prompt.template.text for prompt in again.prompts] == [prompt.template.text for prompt in engines.prompts]


def test_plain_rollouts_in_the_place_of_a_search_go_to_the_hard_problems_and_are_trained_on(
    tmp_path: Path, model: Path
) -> None:
    given = ("evolution.plain_rollouts=6", "evolution.enabled=true", "hard.min_problems=1", "schedule.epochs=3")
    config = config_of(tmp_path, model, *given, graded_by_length(tmp_path))
    engines = Engines(reply=lambda prompt, index: FakeReply(text="!" * (1 if prompt.problem.id == "p3" else 2)))
    run(config, lambda stop_token_ids: engines)
    asked = [prompt.problem.id for prompt in engines.prompts]
    assert not any(prompt.is_templated for prompt in engines.prompts)
    per_epoch = [asked[:16], asked[16:38], asked[38:]]
    assert [Counter(epoch) for epoch in per_epoch[1:]] == [{"p0": 6, "p1": 6, "p2": 6, "p3": 4}] * 2
    assert Counter(per_epoch[0]) == dict.fromkeys(("p0", "p1", "p2", "p3"), 4)
    spent = spent_in(config.run.folder)
    assert spent["sampled_training_tokens"] == spent["learning_tokens"] == sampled_tokens(config.run.folder)
    assert len(asked) == 16 + 2 * 22
    assert check_resume(config, config.run.folder) is not None, "groups of more plain rollouts are no other group size"
    library = json.loads((config.run.folder / "templates" / "library-2.json").read_text())
    assert library["templates"] == [] and sorted(library["assignments"]) == ["p0", "p1", "p2"]


def test_plain_rollouts_are_shared_as_evenly_as_they_can_be() -> None:
    problems = [fake_problem(number) for number in (3, 1, 2)]
    evolution = PlainRollouts(8, group_size=4)
    library = evolution.evolve([*problems, problems[0]], EMPTY_LIBRARY, epoch=0)
    assert [len(library.assigned(problem)) for problem in problems] == [7, 7, 6]
    assert library.version == 1 and library.assigned(fake_problem(4)) == ()
    assert evolution.newest(library) is library and evolution.running is None
    assert evolution.evolve([], library, epoch=1).assignments == {}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.txt", "Add.\nIt is 1234, always.\n", "template 2 holds '1234', the gold answer of problem leaky: take it"),
        ("t.json", '["Add.", "It is 1,234."]', "template 2 holds '1234', the gold answer of problem leaky: take it"),
        ("t.txt", "Add.\nAdd.\n", "template 2 cannot be used (duplicate): Add."),
        ("t.txt", "# nothing\n", "holds no template"),
        ("t.json", '{"a": 1}', "must hold a JSON list of texts"),
        ("t.json", '["Add.", ', "must hold a JSON list of texts"),
        ("t.json", '{"sums": ["Add."]}', "has templates of sums, but data.train has train"),
        (
            "t.json",
            '{"train": ["Add."], "": ["It is 1234."]}',
            "template 2 holds '1234', the gold answer of problem leaky",
        ),
        ("t.txt", "<|im_end|>\n", "template 1 cannot be used (chat markup)"),
    ],
)
def test_templates_that_cannot_be_used_are_refused_before_anything_starts(
    name: str, content: str, said: str, tmp_path: Path, model: Path
) -> None:
    (tmp_path / name).write_text(content)
    given = (f"evolution.templates_file={tmp_path / name}", "evolution.enabled=true", "hard.min_problems=1")
    config = config_of(tmp_path, model, *given)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps({"id": "leaky", "question": "1233+1", "answer": "1234"}) + "\n")
    with pytest.raises(ValueError, match=r"evolution\.templates_file=.*" + re.escape(said)):
        load_inputs(config)


def with_hints(tmp_path: Path, *hints: object) -> None:
    """Give the first training problems these hints."""
    path = tmp_path / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    given = [row | {"hints": each} for row, each in zip(rows, hints, strict=False)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*given, *rows[len(hints) :]]))


def test_problems_that_failed_plainly_are_asked_through_their_hints_and_those_without_are_counted(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("data.hints_field=hints", "schedule.epochs=4", "assignment.num_plain=1", "objective.context=replace")
    config = config_of(tmp_path, model, *settings)
    with_hints(tmp_path, ["Count.", "Count on your fingers."], "Add one.")
    inputs = load_inputs(config)
    assert lines_of_help(config.data, inputs.train) == [
        "hints: 2 of 4 problems have them, at most 2 each; the other 2 are always asked plainly"
    ]
    engines = Engines()
    run(config, lambda stop_token_ids: engines)
    asked = {key: [p.template.text for p in engines.prompts if p.problem.id == key] for key in ("p0", "p1", "p2")}
    plain, first = [""] * 4, ["Count."] * 3 + [""]
    strong = ["Count on your fingers."] * 3 + [""]
    assert asked == {
        "p0": plain + first + strong + strong,
        "p1": plain + (["Add one."] * 3 + [""]) * 3,
        "p2": plain * 4,
    }
    lines = [json.loads(line)["metrics"] for line in (config.run.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "rollout/reward_mean" in line]
    assert [sum(step["hint/problems_count"] for step in steps[n : n + 2]) for n in (0, 2, 4, 6)] == [0, 2, 2, 2]
    assert [sum(step["hint/missing_count"] for step in steps[n : n + 2]) for n in (0, 2, 4, 6)] == [0, 2, 2, 2]
    assert all(step["rollout/asked_plainly_count"] == 0 for step in steps)
    levels = [step.get("hint/level_mean") for step in steps[4:]]
    assert sorted(level for level in levels if level is not None)[-1] > 1
    assert json.loads((config.run.folder / "results.json").read_text())["rounds"] == []


@pytest.mark.parametrize(
    ("hints", "said"),
    [
        (("It is 1234.",), "problem p0 (1233+1): its hint 1 holds '1234', its gold answer"),
        ((["Add.", "It is 1,234!"],), "problem p0 (1233+1): its hint 2 holds '1234', its gold answer"),
        (("", []), "hints_field=hints names no column of .*train.jsonl with hints"),
    ],
)
def test_a_hint_that_tells_its_gold_answer_is_refused_by_its_row(
    hints: tuple[object, ...], said: str, tmp_path: Path, model: Path
) -> None:
    config = config_of(tmp_path, model, "data.hints_field=hints")
    with_hints(tmp_path, *hints)
    path = tmp_path / "train.jsonl"
    path.write_text(path.read_text().replace('"0+1", "answer": "2"', '"1233+1", "answer": "1234"'))
    with pytest.raises(ValueError, match=said if "*" in said else re.escape(said)):
        load_inputs(config)


def test_a_teacher_s_responses_are_cloned_where_they_solve_their_problem_and_no_rollout_is_sampled(
    tmp_path: Path, model: Path
) -> None:
    settings = ("data.demonstrations_field=shown", "rollout.temperature=1", "rollout.group_size=2")
    settings += ("assignment.num_plain=0", "objective.surrogate=clone", "objective.context=replace")
    config = config_of(tmp_path, model, *settings)
    path = tmp_path / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    shown = [["\\boxed{2}", "\\boxed{3}"], ["no answer"], ["\\boxed{2}", "x" * 200], []]
    given = [row | {"shown": each} for row, each in zip(rows, shown, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    inputs = load_inputs(config)
    assert lines_of_help(config.data, inputs.train) == [
        "demonstrations: 3 of 4 problems have them, at most 2 each; the other 1 are always asked plainly"
    ]
    engines = Engines()
    run(config, lambda stop_token_ids: engines)
    assert {(prompt.problem.id, prompt.template.text) for prompt in engines.prompts} == {("p3", "")}
    lines = whole_lines(config.run.folder / "hard_samples.jsonl")
    tries = {
        line["problem_id"]: (line["plain_tries"], line["templated_tries"], line["templated_solved"]) for line in lines
    }
    assert tries == {"p0": (0, 2, 1), "p1": (0, 1, 0), "p2": (0, 1, 1), "p3": (2, 0, 0)}
    rollouts = [line for file in sorted((config.run.folder / "rollouts").glob("*")) for line in whole_lines(file)]
    assert all(line["is_demonstration"] == line["is_templated"] for line in rollouts)
    written = {(line["problem_id"], line["response"]) for line in rollouts if line["is_templated"]}
    assert written == {("p0", "\\boxed{2}"), ("p0", "\\boxed{3}"), ("p1", "no answer"), ("p2", "\\boxed{2}")}
    assert spent_in(config.run.folder)["sampled_training_tokens"] == 8, "only what was sampled: p3 in two epochs"


@pytest.mark.parametrize("column", ["nowhere", "question.deep"])
def test_demonstrations_that_no_row_has_are_an_error(column: str, tmp_path: Path, model: Path) -> None:
    config = config_of(tmp_path, model, f"data.demonstrations_field={column}", "rollout.temperature=1")
    with pytest.raises(ValueError, match=rf"demonstrations_field={column} names no column of .*train\.jsonl with"):
        load_inputs(config)


def spent_in(folder: Path) -> dict[str, float]:
    """Return the last compute account of a run's metrics, without its times."""
    metrics = [json.loads(line)["metrics"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = {key.removeprefix("compute/"): number for key, number in metrics[-1].items() if key.startswith("compute/")}
    return {key: number for key, number in last.items() if key.endswith(("_tokens", "_count")) and number}


def varied(prompt: Prompt, index: int) -> FakeReply:
    """A reply whose length depends on what is asked, and its reward (`graded_by_length`) on the length."""
    return FakeReply(text="!" * (len(prompt.sampling_ids) + index % 3))


def graded_by_length(tmp_path: Path) -> str:
    """Return the setting of a reward that tells replies of even and odd lengths apart."""
    path = tmp_path / "by_length.py"
    path.write_text("def reward(problem, response, finish_reason):\n    return float(len(response) % 2)\n")
    return f"grading.function={path}:reward"


def sampled_tokens(folder: Path) -> int:
    rollouts = [json.loads(line) for path in (folder / "rollouts").glob("*.jsonl") for line in path.open()]
    return sum(rollout["num_response_tokens"] for rollout in rollouts)


def test_the_compute_account_is_what_was_sampled_and_trained(tmp_path: Path, model: Path) -> None:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"id": "h", "question": "7+1", "answer": "8"}) + "\n")
    config = config_of(
        *(tmp_path, model, f"data.evaluation.held_out={held_out}", "logging.rollouts_every_steps=1"),
        *("evaluation.num_samples=3", "evaluation.every_steps=2", "logprobs.recompute=true"),
        graded_by_length(tmp_path),
    )
    engines = Engines(reply=varied)
    policy = run(config, lambda stop_token_ids: engines)
    trained = sum(sample.num_tokens for call in policy.updates for sample in call.samples)
    scored = sum(sample.num_tokens for samples in policy.asked_logprobs for sample in samples)
    spent = spent_in(config.run.folder)
    assert spent["trained_tokens"] == trained > 0 and spent["logprob_tokens"] == scored > 0
    assert spent["optimizer_steps_count"] == sum(bool(call.samples) for call in policy.updates)
    assert spent["sampled_training_tokens"] == sampled_tokens(config.run.folder) == spent["learning_tokens"]
    answers = [len(varied(prompt, index).token_ids) for index, prompt in enumerate(engines.prompts[-3:])]
    assert spent["sampled_evaluation_tokens"] == 2 * sum(answers), "after steps 2 and 4, the last"
    results = json.loads((config.run.folder / "results.json").read_text())
    assert {key: number for key, number in results["compute"].items() if number and key in spent} == spent
    assert not any(results["compute_redone"].values())


def test_a_resume_neither_loses_nor_repeats_what_was_spent(tmp_path: Path, model: Path) -> None:
    every_step = ("logging.rollouts_every_steps=1", "schedule.save_every_steps=2", graded_by_length(tmp_path))
    whole = config_of(tmp_path, model, *every_step, "run.name=whole")
    run(whole, lambda stop_token_ids: Engines(reply=varied))
    killed = config_of(tmp_path, model, *every_step, "run.name=killed")

    def fail_in_the_fourth_step(prompt: Prompt, index: int) -> FakeReply:
        if len(engines.samplings) == 4:
            raise LostEngine("generate")
        return varied(prompt, index)

    engines = Engines(reply=fail_in_the_fourth_step)
    with pytest.raises(LostEngine):
        run(killed, lambda stop_token_ids: engines)
    third = sampled_tokens_of_step(killed.run.folder, 3)
    run(killed, lambda stop_token_ids: Engines(reply=varied))
    assert spent_in(killed.run.folder) == spent_in(whole.run.folder)
    redone = json.loads((killed.run.folder / "results.json").read_text())["compute_redone"]
    assert redone["sampled_training_tokens"] == third > 0, "step 3 was done twice, and what it had sampled is spent"


def test_a_run_under_a_curriculum_that_is_lost_goes_on_with_the_problems_of_one_that_was_not(
    tmp_path: Path, model: Path
) -> None:
    """Of twelve problems four are mastered and leave most of the later epochs; four are solved in half of the tries."""

    def settings(name: str) -> Config:
        saved = ("logging.rollouts_every_steps=1", "schedule.save_every_steps=2", f"run.name={name}")
        curriculum = ("data.curriculum=unsolved", "schedule.epochs=4", graded_by_length(tmp_path))
        return config_of(tmp_path, model, *saved, *curriculum, num_problems=12)

    def solved_by_number(prompt: Prompt, index: int) -> FakeReply:
        number = int(prompt.problem.id.removeprefix("p"))
        return FakeReply(text="!" * (1 + (number % 3 == 2 or (number % 3 == 1 and index % 2 == 0))))

    def lost_in_its_fourth_step(prompt: Prompt, index: int) -> FakeReply:
        if len(engines.samplings) == 4:
            raise LostEngine("generate")
        return solved_by_number(prompt, index)

    whole, lost = settings("whole"), settings("lost")
    run(whole, lambda stop_token_ids: Engines(reply=solved_by_number))
    num_losses = 0
    while not (lost.run.folder / "results.json").exists():
        engines = Engines(reply=lost_in_its_fourth_step)
        try:
            run(lost, lambda stop_token_ids, engines=engines: engines)
        except LostEngine:
            num_losses += 1
    asked = Counter(line["epoch"] for line in whole_lines(whole.run.folder / "hard_samples.jsonl"))
    assert asked[0] == 12 > max(asked[1], asked[2], asked[3]) and num_losses > 3
    assert repeatable_numbers(lost.run.folder) == repeatable_numbers(whole.run.folder)
    for path in (whole.run.folder / "hard_samples.jsonl", *(whole.run.folder / "rollouts").iterdir()):
        assert (lost.run.folder / path.relative_to(whole.run.folder)).read_text() == path.read_text(), path.name


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_budget_in_tokens_ends_a_run_after_the_step_that_reaches_it(
    is_killed: bool, tmp_path: Path, model: Path
) -> None:
    every_step = ("logging.rollouts_every_steps=1", "schedule.save_every_steps=1", "schedule.epochs=9")
    free = config_of(tmp_path, model, *every_step, "run.name=free", "schedule.max_steps=5")
    run(free, lambda stop_token_ids: Engines(reply=varied))
    budget = sum(sampled_tokens_of_step(free.run.folder, step) for step in (1, 2)) + 1
    limited = config_of(tmp_path, model, *every_step, f"schedule.max_tokens={budget}")
    if is_killed:
        with pytest.raises(LostEngine):
            run(limited, lost_after_the_first_step)
    run(limited, lambda stop_token_ids: Engines(reply=varied))
    results = json.loads((limited.run.folder / "results.json").read_text())
    assert (results["num_steps"], results["ended_by"]) == (3, f"schedule.max_tokens={budget}")
    assert results["compute"]["learning_tokens"] >= budget
    assert (limited.run.folder / "checkpoints" / "latest").read_text() == "step-000003"
    assert ending_of(limited).endswith(f"; to train on: raise schedule.max_tokens={budget}")
    more = config_of(tmp_path, model, *every_step, f"schedule.max_tokens={results['compute']['learning_tokens'] + 1}")
    assert ending_of(more) == "", "there is something left to spend"


def lost_after_the_first_step(stop_token_ids: Sequence[int]) -> Engines:
    def reply(prompt: Prompt, index: int) -> FakeReply:
        if len(engines.samplings) == 2:
            raise LostEngine("generate")
        return varied(prompt, index)

    engines = Engines(reply=reply)
    return engines


def test_a_budget_in_hours_ends_a_run_after_the_step_that_reaches_it(tmp_path: Path, model: Path) -> None:
    config = config_of(tmp_path, model, "schedule.max_hours=1e-9", "schedule.epochs=9")
    run(config, lambda stop_token_ids: Engines())
    results = json.loads((config.run.folder / "results.json").read_text())
    assert (results["num_steps"], results["ended_by"]) == (0, "schedule.max_hours=1e-09")


def sampled_tokens_of_step(folder: Path, step: int) -> int:
    lines = (folder / "rollouts" / f"step-{step:06d}.jsonl").read_text().splitlines()
    return sum(json.loads(line)["num_response_tokens"] for line in lines)


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("start", ()),
        ("reflection", ("evolution.enabled=true", "evolution.reflection.backend=self", "hard.min_problems=2")),
        ("refresh", ()),
        ("files", ()),
        ("generate", ()),
    ],
)
def test_what_was_started_is_closed_wherever_a_run_fails(stage: str, settings: Sequence[str], config: Config) -> None:
    engines = Engines(fails=stage)
    started: list[Engines] = []
    if stage == "files":
        (config.run.folder / "hard_samples.jsonl").mkdir(parents=True)

    def start(stop_token_ids: Sequence[int]) -> Engines:
        assert children() > before, "the grader is at work"
        if stage == "start":
            raise LostEngine(stage)
        started.append(engines)
        return engines

    before = children()
    with pytest.raises((LostEngine, OSError)):
        run(config_of(config.run.folder.parent, Path(config.model.path), *settings), start)
    assert children() <= before, "no grader is left"
    assert all(each.is_closed for each in started) and bool(started) == (stage != "start")
