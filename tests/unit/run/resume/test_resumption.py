"""What a resume changes is harmless, takes effect from a place that is named, or is refused; nothing goes unsaid."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_p2o.config.read import load_config
from megatron_p2o.config.source import annotation_at, is_section
from megatron_p2o.config.tree import Config, DataConfig, ModelConfig, one_task
from megatron_p2o.data.batches import epoch_batches
from megatron_p2o.data.chat import ChatRenderer
from megatron_p2o.evolve.record.library import PublishedLibrary
from megatron_p2o.machine.nodes import Nodes
from megatron_p2o.metrics.compute import ComputeAccount
from megatron_p2o.records import from_text
from megatron_p2o.run.launch import start_ranks
from megatron_p2o.run.resume.resumption import (
    ResumeRefused,
    Resumption,
    check_resume,
    is_measured_otherwise,
    of_ids,
    resumed_library,
    resumption,
)
from megatron_p2o.run_folder.checkpoints import CheckpointSaver
from megatron_p2o.run_folder.made_with import (
    MADE_WITH_FILE,
    MadeWith,
    made_with,
    made_with_text,
    note_start,
    read_made_with,
    redone_in,
    settings_of,
)
from megatron_p2o.run_folder.resume_effects import MAPPINGS, OF_CLASS, effect_of
from megatron_p2o.run_folder.state import CheckpointError, RunState
from megatron_p2o.testing.fakes import FakePolicy
from megatron_p2o.testing.tiny_model import write_tiny_qwen3
from megatron_p2o.types import PLAIN, Problem, Template


def leaves(cls: type = Config, prefix: str = "") -> list[str]:
    """Return the dotted names of all settings, mappings with free keys as one."""
    found: list[str] = []
    for name in cls.__annotations__:
        annotation = annotation_at(tuple(f"{prefix}{name}".split(".")))
        found += leaves(annotation, f"{prefix}{name}.") if is_section(annotation) else [prefix + name]  # pyright: ignore[reportArgumentType]
    return found


def test_every_setting_is_in_exactly_one_class() -> None:
    named = [name for names in OF_CLASS.values() for name in names]
    assert sorted(named) == sorted(leaves())
    assert [effect_of(f"{name}.key") for name in MAPPINGS] == [effect_of(name) for name in MAPPINGS]
    with pytest.raises(KeyError):
        effect_of("optimizer.momentum")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("model"))


def problem(name: str, answer: str = "1") -> Problem:
    return Problem(id=name, question=f"What is {name}?", answer=answer, source="", level="")


PROBLEMS = tuple(problem(f"p{number}") for number in range(24))
"""Three steps of eight an epoch."""


def write_problems(path: Path, problems: Sequence[Problem]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"id": each.id, "question": each.question, "answer": each.answer} for each in problems]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def config_of(tmp_path: Path, model: Path, *overrides: str) -> Config:
    train = tmp_path / "train.jsonl"
    if not train.exists():
        write_problems(train, PROBLEMS)
    return load_config(
        None,
        [
            *("run.name=run", f"run.directory={tmp_path}", f"model.path={model}", f"data.train={train}"),
            *("schedule.problems_per_step=8", "schedule.problems_per_update=8", "evolution.enabled=false"),
            "rollout.max_new_tokens=64",
            *overrides,
        ],
    )


def state(step: int, batch: int, epoch: int = 0, **fields: Any) -> RunState:
    return RunState(
        **{
            **{"step": step, "epoch": epoch, "batch": batch, "hard_problem_ids": ()},
            **{"library_version": 0, "num_ledger_entries": 0},
            **fields,
        }
    )


def resumed_with(
    tmp_path: Path, model: Path, at: RunState, *overrides: str, problems: Sequence[Problem] = PROBLEMS
) -> Resumption:
    before = made_with(config_of(tmp_path, model), PROBLEMS)
    after = made_with(config_of(tmp_path, model, *overrides), problems)
    # As a checkpoint keeps it.
    kept = from_text(MadeWith, made_with_text(before))
    return resumption(kept, after, at, tmp_path / "step")


def test_the_same_settings_and_files_change_nothing(tmp_path: Path, model: Path) -> None:
    assert resumed_with(tmp_path, model, state(2, 2)) == Resumption(batch=2, changes=[])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.lr=1e-7", "optimizer.lr: 1e-06 -> 1e-07: from step 3 on"),
        ("rollout.temperature=0.9", "rollout.temperature: 0.6 -> 0.9: from step 3 on"),
        ("schedule.max_steps=40", "schedule.max_steps: none -> 40: from step 3 on"),
        (
            "evolution.dev_size=12",
            "evolution.dev_size: 300 -> 12: in prompt evolution from now on; a round that",
        ),
        ("evaluation.every_steps=7", "evaluation.every_steps: 30 -> 7: from the next evaluation on"),
        ("logging.console=false", "logging.console: True -> False: no result depends on it"),
        ("parallel.data=2", "parallel.data: none -> 2: no result depends on it"),
        ("sglang.attention_backend=fa3", "sglang.attention_backend: none -> fa3: from step 3 on"),
    ],
)
def test_a_change_is_one_line_with_what_old_new_and_from_when(
    tmp_path: Path, model: Path, override: str, said: str
) -> None:
    (change,) = resumed_with(tmp_path, model, state(2, 2), override).changes
    assert str(change).startswith(said)


@pytest.mark.parametrize("override", ["model.dtype=float32", "parallel.distributed_optimizer=true"])
def test_a_change_under_which_the_checkpoint_means_nothing_is_refused_by_name(
    tmp_path: Path, model: Path, override: str
) -> None:
    with pytest.raises(ResumeRefused, match=rf"{override.partition('=')[0]}: .*put it back, or begin another run"):
        resumed_with(tmp_path, model, state(2, 2), override)


def test_a_model_of_another_size_or_vocabulary_is_refused_and_another_chat_template_counts(
    tmp_path: Path, model: Path
) -> None:
    larger = write_tiny_qwen3(tmp_path / "larger", num_layers=3)
    with pytest.raises(ResumeRefused, match=r"num_layers of model\.path: 2 -> 3"):
        resumed_with(tmp_path, model, state(2, 2), f"model.path={larger}")
    same = write_tiny_qwen3(tmp_path / "same")
    (moved,) = resumed_with(tmp_path, model, state(2, 2), f"model.path={same}").changes
    assert str(moved).endswith("no result depends on it, or rounding alone")
    template = next(path for path in same.iterdir() if "<|im_start|>" in path.read_text(errors="ignore"))
    template = same / "chat_template.jinja" if (same / "chat_template.jinja").exists() else template
    template.write_text(template.read_text().replace("assistant", "helper"))
    _, chat = resumed_with(tmp_path, model, state(2, 2), f"model.path={same}").changes
    assert str(chat).startswith("chat template: content ") and str(chat).endswith("from step 3 on")
    tokenizer = same / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<|endoftext|>", "<|end|>"))
    with pytest.raises(ResumeRefused, match="tokenizer: content"):
        resumed_with(tmp_path, model, state(2, 2), f"model.path={same}")


APPENDED = (*PROBLEMS, problem("new-1"), problem("new-2"))
REMOVED = PROBLEMS[:3] + PROBLEMS[4:]


@pytest.mark.parametrize(
    ("problems", "overrides", "named"),
    [
        (APPENDED, (), r"problems of data\.train: 2 added \(new-1, new-2\)"),
        (REMOVED, (), r"problems of data\.train: 1 gone \(p3\)"),
        ((*REMOVED, problem("new-1")), (), r"1 added \(new-1\), 1 gone \(p3\)"),
        (PROBLEMS[::-1], (), r"problems of data\.train: in another order"),
        (PROBLEMS, ("run.seed=2",), r"run\.seed: 1 -> 2"),
        (PROBLEMS, ("data.curriculum=unsolved",), r"data\.curriculum: none -> unsolved"),
        (
            PROBLEMS,
            ("schedule.problems_per_step=12", "schedule.problems_per_update=12"),
            r"schedule\.problems_per_step: 8 -> 12",
        ),
    ],
)
def test_what_orders_an_epoch_is_refused_in_its_middle_and_counts_between_two(
    tmp_path: Path, model: Path, problems: Sequence[Problem], overrides: Sequence[str], named: str
) -> None:
    with pytest.raises(ResumeRefused, match=named + r".*after 2 of 3 batches.*by schedule\.max_steps=6"):
        resumed_with(tmp_path, model, state(5, 2, epoch=1), *overrides, problems=problems)
    begins = resumed_with(tmp_path, model, state(3, 0, epoch=1), *overrides, problems=problems)
    assert begins.batch == 0
    assert any("from step 4 on, which begins epoch 1" in str(change) for change in begins.changes)
    over = resumed_with(tmp_path, model, state(3, 3, epoch=0), *overrides, problems=problems)
    size = 12 if overrides and "12" in overrides[0] else 8
    assert over.batch == len(epoch_batches(problems, size, seed=1, epoch=0)), "no batch of the epoch is left to ask"
    assert any("from epoch 1 on" in str(change) for change in over.changes)


def test_an_epoch_that_a_curriculum_has_shortened_ends_where_it_does(tmp_path: Path, model: Path) -> None:
    """Two batches of the three that it would have without."""
    with pytest.raises(ResumeRefused, match=r"after 1 of 2 batches.*by schedule\.max_steps=5"):
        resumed_with(tmp_path, model, state(4, 1, epoch=1, num_batches=2), "run.seed=2")
    over = resumed_with(tmp_path, model, state(5, 2, epoch=1, num_batches=2), "run.seed=2")
    assert over.batch == 3 and "from epoch 2 on" in str(over.changes[0])


def test_another_mix_of_tasks_is_refused_in_the_middle_of_an_epoch(tmp_path: Path, model: Path) -> None:
    write_problems(tmp_path / "a.jsonl", PROBLEMS[:16])
    write_problems(tmp_path / "b.jsonl", PROBLEMS[16:])
    problems = [replace(each, task="a" if index < 16 else "b") for index, each in enumerate(PROBLEMS)]
    files = [f"data.train={{a: {tmp_path}/a.jsonl, b: {{file: {tmp_path}/b.jsonl, weight: 0.5}}}}"]
    before = made_with(config_of(tmp_path, model, *files), problems)
    assert before.mix == [(16, 1.0), (8, 0.5)]

    def resumed(at: RunState, *overrides: str) -> Resumption:
        return resumption(before, made_with(config_of(tmp_path, model, *files, *overrides), problems), at, tmp_path)

    assert resumed(state(1, 1)) == Resumption(batch=1, changes=[])
    assert resumed(state(1, 1), "data.train.a.weight=2", "data.train.b.weight=1").batch == 1, "the same mix"
    assert resumed(state(1, 1), "data.train.b.question_format=x{question}").changes[0].when == "from step 2 on"
    with pytest.raises(
        ResumeRefused, match=r"tasks of data\.train .* \(8, 0\.5\).* -> .*\(8, 1\.0\).*after 1 of 2 batches"
    ):
        resumed(state(1, 1), "data.train.b.weight=1")
    assert resumed(state(2, 0, epoch=1), "data.train.b.weight=1").batch == 0
    assert resumed(state(2, 2), "data.train.b.weight=1").batch == 3, "no batch of the epoch is left to ask"


@pytest.mark.parametrize(("size", "batch"), [(4, 4), (16, 1), (2, 8)])
def test_a_step_of_another_size_goes_on_with_the_problems_that_were_not_asked(
    tmp_path: Path, model: Path, size: int, batch: int
) -> None:
    overrides = (f"schedule.problems_per_step={size}", f"schedule.problems_per_update={size}")
    how = resumed_with(tmp_path, model, state(2, 2), *overrides)
    assert how.batch == batch
    asked = {each.id for chosen in epoch_batches(PROBLEMS, 8, 1, epoch=0)[:2] for each in chosen}
    to_come = {each.id for chosen in epoch_batches(PROBLEMS, size, 1, epoch=0)[batch:] for each in chosen}
    assert not asked & to_come
    assert len(asked | to_come) == (24 if size < 16 else 16), "a last step that is not full is not asked, as ever"


def test_an_answer_that_was_corrected_counts_the_next_time_it_is_asked(tmp_path: Path, model: Path) -> None:
    corrected = (*PROBLEMS[:5], problem("p5", "17"), *PROBLEMS[6:])
    how = resumed_with(tmp_path, model, state(2, 2), problems=corrected)
    assert how.batch == 2
    assert [str(change) for change in how.changes] == [
        "question or answer of 1 problems of data.train (p5): before -> now: the next time they are asked"
    ]


def test_other_weights_of_the_initial_policy_are_said_where_a_kl_term_compares_with_them(tmp_path: Path) -> None:
    model = write_tiny_qwen3(tmp_path / "model")
    with_kl, without = (config_of(tmp_path, model, f"objective.kl_coefficient={beta}") for beta in (0.1, 0))
    before = [made_with(config, PROBLEMS) for config in (with_kl, without)]
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    after = [made_with(config, PROBLEMS) for config in (with_kl, without)]
    changes = [
        [str(change) for change in resumption(old, new, state(2, 2), tmp_path / "step").changes]
        for old, new in zip(before, after, strict=True)
    ]
    assert len(changes[0]) == 1 and "weights of model.path" in changes[0][0] and "from step 3 on" in changes[0][0]
    assert changes[1] == []


def test_problems_of_a_checkpoint_that_says_nothing_are_looked_up_or_named(tmp_path: Path, model: Path) -> None:
    record = made_with(config_of(tmp_path, model), PROBLEMS)
    assert of_ids(["p3", "p1", "p3"], PROBLEMS, None, tmp_path) == [PROBLEMS[3], PROBLEMS[1], PROBLEMS[3]]
    assert of_ids(["p3", "p1"], REMOVED, record, tmp_path) == [PROBLEMS[1]]
    with pytest.raises(ResumeRefused, match=r"no longer holds 1 problems \(p3\): restore the file"):
        of_ids(["p3", "p1"], REMOVED, None, tmp_path)


def library_of(group_size: int) -> PublishedLibrary:
    template = Template(id=1, text="Think.", parent=0, lineage_problem_ids=frozenset(), score=0.5)
    return PublishedLibrary(version=2, templates=(template,), assignments={"p1": (template,) * group_size})


def test_a_library_for_groups_of_another_size_is_refused_before_anything_starts(tmp_path: Path) -> None:
    library = library_of(6)
    path = library.save(tmp_path)
    assert resumed_library(tmp_path, 2, group_size=6) == library
    with pytest.raises(
        ResumeRefused, match=r"rollout\.group_size=8 but .*library-2\.json gives 1 problems 6 templates"
    ):
        resumed_library(tmp_path, 2, group_size=8)
    plain = PublishedLibrary(version=3, assignments={"p1": (PLAIN,) * 9})
    plain.save(tmp_path)
    assert resumed_library(tmp_path, 3, group_size=6) == plain
    with pytest.raises(ResumeRefused, match=r"rollout\.group_size=12 but .*gives 1 problems 9 templates"):
        resumed_library(tmp_path, 3, group_size=12)
    path.write_text(path.read_text().replace("Think", "Thunk"))
    with pytest.raises(ResumeRefused, match=r"does not match its checksum.*move it away"):
        resumed_library(tmp_path, 2, group_size=6)


def test_a_library_that_was_moved_away_as_advised_leaves_plain_prompts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert resumed_library(tmp_path, 2, group_size=6) == PublishedLibrary(version=2)
    assert "library-2.json is missing: problems are asked without templates" in caplog.text
    assert resumed_library(tmp_path, 0, group_size=6).version == 0


def save(config: Config, at: RunState, record: MadeWith | None) -> Path:
    saver = CheckpointSaver(config.run.folder, FakePolicy(), keep_last=1, record=record)
    saver.begin(at)
    saver.finish()
    return config.run.folder / "checkpoints" / f"step-{at.step:06d}"


def test_a_run_is_checked_before_it_starts_anything(tmp_path: Path, model: Path) -> None:
    config = config_of(tmp_path, model)
    assert check_resume(config, config.run.folder) is None, "it begins"
    record = made_with(config, PROBLEMS)
    checkpoint = save(config, state(2, 2), record)
    assert read_made_with(checkpoint) == record
    assert check_resume(config, config.run.folder) == Resumption(batch=2, changes=[])
    lower = config_of(tmp_path, model, "optimizer.lr=1e-7")
    how = check_resume(lower, config.run.folder)
    assert how is not None and [change.name for change in how.changes] == ["optimizer.lr"]
    # A copy of the file elsewhere holds the same problems.
    write_problems(tmp_path / "copy.jsonl", PROBLEMS)
    how = check_resume(config_of(tmp_path, model, f"data.train={tmp_path}/copy.jsonl"), config.run.folder)
    assert how is not None and str(how.changes[0]).endswith("through the problems that it leads to")
    write_problems(tmp_path / "train.jsonl", APPENDED)
    with pytest.raises(ResumeRefused, match=r"step-000002 cannot be resumed.*2 added \(new-1, new-2\)"):
        check_resume(config, config.run.folder)


def test_a_refused_resume_is_told_on_a_node_that_awaits_the_settings(tmp_path: Path, model: Path) -> None:
    save(config_of(tmp_path, model), state(2, 2), made_with(config_of(tmp_path, model), PROBLEMS))
    config = config_of(tmp_path, model, "model.dtype=float32", "parallel.timeout_s=1")
    second = Nodes(count=2, rank=1, head_address="127.0.0.1", head_port=0, launch_id="1")
    with pytest.raises(ResumeRefused, match=r"model\.dtype: "):
        start_ranks(config, config.run.folder, 1, second, ())


def test_a_chat_template_under_which_prompts_grow_too_long_is_refused_before_the_start(tmp_path: Path) -> None:
    longer = [problem(f"p{number}" + "+1" * (number % 8)) for number in range(24)]
    write_problems(tmp_path / "train.jsonl", longer)
    model = write_tiny_qwen3(tmp_path / "model")
    renderer = ChatRenderer(ModelConfig(path=str(model)), DataConfig(train=one_task(""), question_format="{question}"))
    limit = max(len(renderer.render(each, PLAIN).training_ids) for each in longer)
    limits = ("data.skip_bad_rows=true", f"data.max_prompt_tokens={limit}", 'data.question_format="{question}"')
    config = config_of(tmp_path, model, *limits)
    save(config, state(2, 2), made_with(config, longer))
    assert check_resume(config, config.run.folder) == Resumption(batch=2, changes=[])
    template = next(path for path in model.iterdir() if "<|im_start|>" in path.read_text(errors="ignore"))
    template = model / "chat_template.jinja" if (model / "chat_template.jinja").exists() else template
    template.write_text(template.read_text().replace("assistant", "a assistant"))
    with pytest.raises(ResumeRefused, match="gone"):
        check_resume(config, config.run.folder)


def test_a_checkpoint_of_an_earlier_version_is_not_compared_and_a_damaged_list_is_damage(
    tmp_path: Path, model: Path
) -> None:
    config = config_of(tmp_path, model)
    checkpoint = save(config, state(2, 2), None)
    assert read_made_with(checkpoint) is None and check_resume(config, config.run.folder) is None
    (checkpoint / MADE_WITH_FILE).write_text('{"settings": ')
    with pytest.raises(CheckpointError, match=r"made_with\.json cannot be read"):
        read_made_with(checkpoint)
    assert check_resume(config, config.run.folder) is None, "the run names the damage and takes the one before"
    (config.run.folder / "checkpoints" / "latest").write_bytes(b"\xff")
    assert check_resume(config, config.run.folder) is None


def test_a_setting_that_only_another_version_knows_is_no_change(tmp_path: Path, model: Path) -> None:
    record = made_with(config_of(tmp_path, model), PROBLEMS)
    older = replace(record, settings={key: value for key, value in record.settings.items() if key != "hard.counted"})
    newer = replace(record, settings={**record.settings, "hard.colour": 1})
    assert resumption(older, record, state(2, 2), tmp_path).changes == []
    assert resumption(newer, record, state(2, 2), tmp_path).changes == []


def test_the_history_of_a_run_tells_what_changed_at_which_step(tmp_path: Path, model: Path) -> None:
    record = made_with(config_of(tmp_path, model), PROBLEMS)
    note_start(tmp_path, record, 0, [], ComputeAccount())
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"torn')
    changes = [{"name": "optimizer.lr", "old": 1e-6, "new": 1e-7, "when": "from step 41 on"}]
    note_start(tmp_path, record, 40, changes, ComputeAccount(trained_tokens=7))
    note_start(tmp_path, record, 41, [], ComputeAccount(trained_tokens=5))
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    first, last = json.loads(lines[0]), json.loads(lines[2])
    assert (first["step"], last["step"], last["changes"][0]["new"]) == (0, 40, 1e-7)
    assert first["made_with"]["settings"] == settings_of(config_of(tmp_path, model))
    assert first["made_with"]["problems"]["count"] == 24
    assert redone_in(tmp_path) == ComputeAccount(trained_tokens=12)


def test_a_best_score_counts_no_more_when_its_set_is_measured_otherwise(tmp_path: Path, model: Path) -> None:
    sets = {name: tmp_path / f"{name}.jsonl" for name in ("hard", "easy", "copy")}
    for path in sets.values():
        write_problems(path, PROBLEMS[:4])
    given = [f"data.evaluation.{name}={sets[name]}" for name in ("hard", "easy")]
    before = made_with(config_of(tmp_path, model, *given), PROBLEMS)

    def is_other(*overrides: str) -> bool:
        after = made_with(config_of(tmp_path, model, *given, *overrides), PROBLEMS)
        return is_measured_otherwise(resumption(before, after, state(2, 2), tmp_path).changes, "hard")

    assert not is_other() and not is_other("data.evaluation.easy.num_samples=3", "evaluation.every_steps=4")
    assert is_other("data.evaluation.hard.num_samples=3") and is_other("data.evaluation.hard.temperature=1")
    assert is_other("evaluation.num_samples=3") and is_other("evaluation.temperature=0.1")
    assert not is_other(f"data.evaluation.hard={sets['copy']}"), "the same problems elsewhere"
    write_problems(sets["easy"], PROBLEMS[:5])
    assert not is_other()
    write_problems(sets["hard"], PROBLEMS[:5])
    assert is_other()


def test_settings_are_compared_as_a_file_gives_them_back(tmp_path: Path, model: Path) -> None:
    config = config_of(tmp_path, model, "data.evaluation={}", "megatron.a=[1, 2]", "sglang.b={c: 1}")
    settings = settings_of(config)
    assert (settings["megatron.a"], settings["sglang.b.c"], settings["rollout.max_total_tokens"]) == ([1, 2], 1, None)
    assert set(leaves()) - set(settings) == set(MAPPINGS)
