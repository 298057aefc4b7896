"""The rules between settings, their ranges, and the reference preset."""

import ast
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from megatron_p2o.config.ranges import LONGEST_WAIT_S, UNBOUNDED, Range, range_of, range_problems
from megatron_p2o.config.rules import problems_of
from megatron_p2o.config.sections.rollout import WeightedFunctionConfig
from megatron_p2o.config.shape import record_of, section_of
from megatron_p2o.config.tree import REFERENCE_PRESET, Config, EvaluationSetConfig, GradingConfig, RunConfig, TaskConfig
from megatron_p2o.testing.fakes import fake_config, with_setting


def dotted_types(section: type, prefix: str = "", *, has_ranges: bool = False) -> dict[str, Any]:
    """Return the type of every setting under its dotted name."""
    hints, found = get_type_hints(section, include_extras=has_ranges), {}
    for field in fields(section):
        kind = hints[field.name]
        if is_dataclass(kind):
            assert isinstance(kind, type)
            found |= dotted_types(kind, f"{prefix}{field.name}.", has_ranges=has_ranges)
        else:
            found[prefix + field.name] = kind
        record = record_of(get_type_hints(section)[field.name])
        if record is not None:
            found |= dotted_types(record, f"{prefix}{field.name}.NAME.", has_ranges=has_ranges)
    return found


def is_numeric(annotation: Any) -> bool:
    """Return whether a value of the type, or of a mapping to it, may be a number."""
    return annotation in (int, float) or any(is_numeric(option) for option in get_args(annotation))


def with_sets(*names: str) -> Config:
    """Return settings with records of these names in every mapping of records."""
    sets = {name: EvaluationSetConfig(file="a.jsonl") for name in names}
    functions = {name: WeightedFunctionConfig(weight=1.0) for name in names}
    return fake_config({"data.evaluation": sets, "grading.functions": functions})


SETTINGS = dotted_types(Config)
RANGES = {name: range_of(kind) for name, kind in dotted_types(Config, has_ranges=True).items() if is_numeric(kind)}


def section_of_setting(name: str) -> type:
    """Return the class whose field a dotted name is."""
    section: type = Config
    for part in name.split(".")[:-1]:
        kind = get_type_hints(section)[part] if part != "NAME" else section
        section = record_of(kind) or section_of(kind) or section
    return section


def named_settings(sources: Iterable[str]) -> set[tuple[str | None, str]]:
    """Return (None, name) of each word and dotted path, and (class, keyword) of each call, in the texts of tests."""
    found: set[tuple[str | None, str]] = set()
    for source in sources:
        for path in re.findall(r"\w+(?:\.\w+)*", source):
            parts = path.split(".")
            found |= {(None, ".".join(parts[start:])) for start in range(len(parts))}
        calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
        found |= {(ast.unparse(call.func), word.arg) for call in calls for word in call.keywords if word.arg}
    return found


def is_named(name: str, named: set[tuple[str | None, str]]) -> bool:
    """Whether tests name a setting by its path, whatever its record is called, or by its section and field."""
    if (section_of_setting(name).__name__, name.rpartition(".")[2]) in named:
        return True
    path = re.compile(re.escape(name).replace("NAME", r"\w+"))
    return any(path.fullmatch(found) for kind, found in named if kind is None)


def test_a_word_alone_names_no_setting() -> None:
    def dotted(*parts: str) -> str:
        return ".".join(parts)  # written out, this test would name them

    named = named_settings(["timeout_s = temperature(deterministic=1)", "OptimizerConfig(lr=1)", "x.rollout.top_p"])
    for section, field in (("grading", "timeout_s"), ("rollout", "temperature"), ("rollout", "deterministic")):
        assert not is_named(dotted(section, field), named)
    assert is_named(dotted("optimizer", "lr"), named) and is_named(dotted("rollout", "top_p"), named)
    weight = dotted("data", "train", "NAME", "weight")
    assert is_named(weight, named_settings([f"'{dotted('data', 'train', 'code', 'weight')}'"]))
    assert is_named(weight, named_settings(["TaskConfig(weight=2.0)"])) and not is_named(weight, named)


def test_every_setting_is_named_in_a_test() -> None:
    tests = Path(__file__).parents[2]
    named = named_settings(source.read_text("utf-8") for source in tests.rglob("test_*.py"))
    assert [name for name in SETTINGS if not is_named(name, named)] == []


def test_a_sensible_run_breaks_no_rule() -> None:
    assert problems_of(fake_config()) == []


def test_the_reference_preset_names_settings_and_breaks_no_rule() -> None:
    assert set(REFERENCE_PRESET) <= set(SETTINGS)
    for name, value in REFERENCE_PRESET.items():
        choices = get_args(SETTINGS[name]) if get_origin(SETTINGS[name]) is not None else None
        assert value in choices if choices else isinstance(value, SETTINGS[name]), name
    assert problems_of(fake_config(REFERENCE_PRESET)) == []


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"schedule.problems_per_step": 128, "schedule.problems_per_update": 48}, "schedule.problems_per_update=48"),
        ({"schedule.problems_per_step": 4, "schedule.problems_per_update": 8}, "schedule.problems_per_update=8"),
        ({"assignment.num_plain": -1}, "assignment.num_plain=-1"),
        ({"assignment.num_plain": 5, "rollout.group_size": 4}, "assignment.num_plain=5"),
        ({"assignment.num_plain": 0, "rollout.group_size": 1}, "rollout.group_size=1"),
        (
            {"evolution.beside_training": False, "evolution.round_timeout_s": 60.0, "parallel.command_timeout_s": 60.0},
            "evolution.round_timeout_s=60 must be less than parallel.command_timeout_s=60",
        ),
        (
            {"evolution.plain_rollouts": 9, "evolution.templates_file": "t.txt"},
            "evolution.plain_rollouts=9 and evolution.templates_file=t.txt both take the place of a search",
        ),
        (
            {"data.train": {"sums": TaskConfig(file="a.jsonl", hints_field="hints")}},
            "data.train.sums has hints_field=hints, and evolution.enabled=true gives its problems templates, too",
        ),
        *(
            (
                {
                    "data.train": {"sums": TaskConfig(file="a.jsonl", demonstrations_field="shown", hints_field=hints)},
                    "rollout.temperature": 1.0,
                    "evolution.enabled": evolution,
                    "objective.context": context,
                },
                "data.train.sums has demonstrations_field=shown: set evolution.enabled to false, leave hints out",
            )
            for hints, evolution, context in (
                (None, True, "replace"),
                ("hints", False, "replace"),
                (None, False, "distill"),
            )
        ),
        (
            {
                "data.train": {"sums": TaskConfig(file="a.jsonl", demonstrations_field="shown")},
                "rollout.temperature": 0.6,
                "evolution.enabled": False,
            },
            "rollout.temperature=0.6 must be 1 with data.demonstrations_field",
        ),
        *(
            (
                {
                    "data.train": {"sums": TaskConfig(file="a.jsonl", demonstrations_field="shown")},
                    "rollout.temperature": 1.0,
                    "evolution.enabled": False,
                    "rollout.group_size": 2,
                    "assignment.num_plain": 0,
                    **wrong,
                },
                said,
            )
            for wrong, said in (
                ({"assignment.num_plain": 2}, "assignment.num_plain=2 must be less than rollout.group_size=2"),
                ({"schedule.max_tokens": 1000}, "schedule.max_tokens=1000 counts sampled tokens"),
                ({"data.curriculum": "learnable"}, "data.curriculum=learnable goes by what the policy solves"),
            )
        ),
        (
            {"assignment.weight": "transfer", "evolution.templates_file": "t.txt"},
            "assignment.weight=transfer needs trials",
        ),
        (
            {"assignment.weight": "transfer", "evolution.rules": "single_turn"},
            "assignment.weight=transfer needs trials",
        ),
        ({"objective.ratio_low": 0.0}, "objective.ratio_low=0.0"),
        ({"objective.ratio_low": 1.5}, "objective.ratio_low=1.5"),
        ({"objective.ratio_high": 0.5}, "objective.ratio_high=0.5"),
        (
            {"objective.ratio_widening": 0.001, "objective.ratio_anneal_steps": 9},
            "objective.ratio_widening=0.001 must leave 1 in the band of the first step",
        ),
        (
            {"objective.surrogate": "clone"},
            "objective.context=ratio_mask means nothing with objective.surrogate=clone, which has no credit: set it to "
            "replace",
        ),
        (
            {"objective.surrogate": "clone", "objective.context": "replace", "schedule.max_batches_per_step": 2},
            "schedule.max_batches_per_step=2 means nothing with objective.surrogate=clone",
        ),
        (
            {"objective.surrogate": "clone", "objective.context": "replace", "advantage.overlong_tokens": 4},
            "advantage.overlong_tokens=4 means nothing with objective.surrogate=clone",
        ),
        (
            {"objective.surrogate": "clone", "objective.context": "replace", "logprobs.importance_cap": 2.0},
            "logprobs.importance_cap=2.0 means nothing with objective.surrogate=clone",
        ),
        (
            {
                **{"objective.surrogate": "clone", "objective.context": "replace"},
                **{"objective.kl_coefficient": 0.1, "objective.kl_as": "reward"},
            },
            "objective.kl_as=reward means nothing with objective.surrogate=clone",
        ),
        ({"objective.clip_low": 1.1}, "objective.clip_low=1.1"),
        ({"optimizer.warmup_steps": 3, "optimizer.warmup_share": 0.1}, "optimizer.warmup_share=0.1"),
        ({"optimizer.min_lr": 1e-7}, "optimizer.min_lr=1e-07 is where a decay ends"),
        ({"optimizer.lr_decay": "cosine", "optimizer.min_lr": 1e-3}, "optimizer.min_lr=0.001 must be at most"),
        (
            {"optimizer.lr_decay": "linear", "schedule.max_tokens": 9},
            "schedule.max_tokens=9 leaves the number of steps",
        ),
        ({"optimizer.warmup_share": 0.1, "schedule.max_hours": 2.0}, "schedule.max_hours=2.0 leaves the number of"),
        ({"objective.kl_coefficient": 0.1, "objective.kl_estimator": "k1"}, "objective.kl_estimator=k1 in the loss"),
        (
            {"advantage.overlong_tokens": 20000},
            "advantage.overlong_tokens=20000 must be at most rollout.max_new_tokens",
        ),
        ({"objective.clip_low": -0.1}, "objective.clip_low=-0.1"),
        ({"objective.clip_high": -0.1}, "objective.clip_high=-0.1"),
        ({"objective.dual_clip": 1.0}, "objective.dual_clip=1.0"),
        ({"rollout.temperature": 0.0}, "rollout.temperature=0.0"),
        ({"parallel.sequence": True}, "parallel.sequence"),
        ({"parallel.tensor": 0}, "parallel.tensor"),
        ({"parallel.pipeline": 0}, "parallel.pipeline"),
        ({"parallel.data": -1}, "parallel.data"),
        ({"evolution.reflection.backend": "openai"}, "evolution.reflection.base_url"),
        (
            {"evolution.reflection.backend": "openai", "evolution.reflection.base_url": "https://host/v1"},
            "evolution.reflection.base_url and .model",
        ),
        ({"evolution.reflection.backend": "phrasebook"}, "evolution.reflection.phrases"),
        ({"data.question_format": "Answer."}, "data.question_format"),
        *(({"run.name": name}, f"run.name={name} must name a folder below") for name in (".", "..", "/tmp", "a/../..")),
    ],
)
def test_each_broken_rule_is_named_and_alone(settings: dict[str, Any], named: str) -> None:
    problems = problems_of(fake_config(settings))
    assert len(problems) == 1
    assert named in problems[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule.problems_per_step": 128, "schedule.problems_per_update": 128},
        {"assignment.num_plain": 0},
        {"evolution.beside_training": True, "evolution.round_timeout_s": 9e4},
        {"evolution.beside_training": False, "evolution.round_timeout_s": 59.0, "parallel.command_timeout_s": 60.0},
        {"assignment.num_plain": 4},
        {"assignment.weight": "transfer"},
        {"assignment.weight": "transfer", "evolution.enabled": False},
        {"objective.ratio_low": 1.0, "objective.ratio_high": 1.0},
        {"objective.clip_low": 0.0, "objective.clip_high": 0.0},
        {"objective.surrogate": "cispo", "objective.clip_low": 1.0},
        {"objective.kl_coefficient": 0.1, "objective.kl_estimator": "k1", "objective.kl_as": "reward"},
        {"advantage.overlong_tokens": 8, "objective.drop_truncated": True},
        {"parallel.sequence": True, "parallel.tensor": 2},
        {"objective.normalization": "kept_token_mean"},
        {"evolution.reflection.backend": "openai", "evolution.enabled": False},
        {"evolution.reflection.backend": "phrasebook", "evolution.enabled": False},
        {"evolution.reflection.backend": "phrasebook", "evolution.reflection.phrases": "phrases.txt"},
        {
            "evolution.reflection.backend": "openai",
            "evolution.reflection.base_url": "https://host/v1",
            "evolution.reflection.model": "teacher",
        },
    ],
)
def test_the_edge_of_a_rule_is_allowed(settings: dict[str, Any]) -> None:
    assert problems_of(fake_config(settings)) == []


def test_every_numeric_setting_has_a_range() -> None:
    """A number without bounds says so: `Annotated[int, UNBOUNDED]`."""
    assert {"rollout.max_total_tokens", "data.evaluation.NAME.temperature", "run.seed"} <= set(RANGES)
    assert [name for name, bounds in RANGES.items() if bounds is None] == []


def numbers_outside(bounds: Range, *, is_float: bool) -> list[float]:
    """Return the nearest numbers beyond each end of a range and, for floats, those that are not finite."""
    step = 1e-7 if is_float else 1
    ends = [(bounds.above, 0), (bounds.at_least, -step), (bounds.below, 0), (bounds.at_most, step)]
    outside = [end + beyond for end, beyond in ends if end is not None]
    return [float(number) for number in outside] + [math.inf, -math.inf, math.nan] if is_float else outside


@pytest.mark.parametrize("name", RANGES)
def test_a_number_beyond_its_range_is_refused_by_name(name: str) -> None:
    bounds = RANGES[name]
    assert bounds is not None
    is_mapping, config = get_origin(SETTINGS[name]) is Mapping, with_sets("NAME")
    config = with_setting(config, ["data", "train"], {"NAME": TaskConfig(file="a.jsonl")})
    is_float = float in (SETTINGS[name], *get_args(SETTINGS[name]))
    for number in numbers_outside(bounds, is_float=is_float):
        value, shown = ({"math": number}, f"{name}.math") if is_mapping else (number, name)
        assert any(
            text.startswith(f"{shown}={number} must be ")
            for text in range_problems(with_setting(config, name.split("."), value))
        )


@pytest.mark.parametrize(
    ("bounds", "inside", "outside"),
    [
        (Range(above=0), [1e-300, 1e300, 10**400], [0.0, -0.0, -1]),
        (Range(at_least=0, below=1), [0, 0.0, 0.999], [-1e-300, 1, 1.0]),
        (Range(above=0, at_most=LONGEST_WAIT_S), [0.1, LONGEST_WAIT_S], [0, LONGEST_WAIT_S + 1]),
        (UNBOUNDED, [-1e300, 0], [math.inf, -math.inf, math.nan]),
    ],
)
def test_a_range_includes_and_excludes_its_ends_as_written(
    bounds: Range, inside: list[float], outside: list[float]
) -> None:
    assert [bounds.broken_rule(number) for number in inside] == [None] * len(inside)
    assert all(bounds.broken_rule(number) is not None for number in outside)


def test_a_broken_range_is_told_in_words() -> None:
    assert range_problems(fake_config({"optimizer.beta1": 2.0, "optimizer.lr": math.inf, "rollout.group_size": 1})) == [
        "rollout.group_size=1 must be at least 2 and at most 4096: one rollout has no baseline",
        "optimizer.lr=inf must be a finite number",
        "optimizer.beta1=2.0 must be at least 0 and less than 1",
    ]


def test_all_problems_are_listed_at_once() -> None:
    problems = problems_of(fake_config({"rollout.temperature": 0.0, "objective.dual_clip": 0.5, "schedule.epochs": 0}))
    assert len(problems) == 3


def test_the_world_is_the_product_of_the_parallel_sizes() -> None:
    config = fake_config({"parallel.tensor": 2, "parallel.pipeline": 3, "parallel.data": 5})
    assert config.parallel.world_size == 30


def test_the_defaults_are_the_papers() -> None:
    defaults = Config(run=fake_config().run, model=fake_config().model, data=fake_config().data)
    published = {
        "rollout.group_size": 6,
        "rollout.temperature": 0.6,
        "rollout.max_new_tokens": 12288,
        "data.max_prompt_tokens": 4096,
        "schedule.problems_per_step": 128,
        "schedule.problems_per_update": 64,
        "schedule.epochs": 10,
        "optimizer.lr": 1e-6,
        "optimizer.weight_decay": 0.01,
        "optimizer.clip_grad": 1.0,
        "objective.clip_low": 0.2,
        "objective.clip_high": 0.2,
        "objective.dual_clip": 3.0,
        "objective.ratio_low": 0.01,
        "objective.ratio_high": 10.0,
        "hard.max_solved": 1,
        "hard.min_problems": 100,
        "evolution.budget": 72,
        "evolution.dev_size": 300,
        "evolution.num_lineages": 16,
        "evolution.minibatch_size": 3,
    }
    assert {name: attrgetter(name)(defaults) for name in published} == published


@pytest.mark.parametrize(
    ("name", "seed", "arm"),
    [
        ("grpo_n6-seed2", 2, "grpo_n6"),
        ("grpo_seed2", 2, "grpo"),
        ("grpo-seed-02", 2, "grpo"),
        ("grpo_seed2", 1, "grpo_seed2"),
        ("p2o_qwen3_4b", 4, "p2o_qwen3_4b"),
        ("-seed2", 2, "-seed2"),
    ],
)
def test_an_arm_is_the_name_without_a_mark_of_the_run_s_own_seed(name: str, seed: int, arm: str) -> None:
    assert RunConfig(name=name, seed=seed).arm == arm


def test_a_set_is_not_called_like_the_templated_measure_of_another() -> None:
    (sentence,) = problems_of(with_sets("templated_hard", "hard"))
    assert sentence.startswith("data.evaluation.templated_hard must not begin with templated_")


@pytest.mark.parametrize("name", ["", ".", "..", "x/avg", "aime.2024", "a b", "\n", "é", "n" * 65])
def test_a_set_has_a_name_that_metrics_and_files_take(name: str) -> None:
    (sentence,) = problems_of(with_sets(name, "hard"))
    assert sentence.startswith(f"data.evaluation.{name} must have a name of at most 64 letters, digits, _ and -")


@pytest.mark.parametrize("name", ["avg", "7", "AIME_2024", "-", "n" * 64])
def test_other_names_of_sets_are_taken(name: str) -> None:
    assert problems_of(with_sets(name)) == []


def test_several_reward_functions_take_the_place_of_the_one() -> None:
    several = {"grading.functions": {"math": WeightedFunctionConfig(weight=1.0)}}
    assert problems_of(fake_config(several)) == []
    for name, value in (("grading.function", "exact"), ("grading.arguments", {"extract": "text"})):
        (sentence,) = problems_of(fake_config({**several, name: value}))
        assert sentence.startswith("grading.functions takes the place of grading.function and grading.arguments")


def test_mathematics_takes_no_arguments() -> None:
    arguments = {"extract": "answer_tag"}
    (sentence,) = problems_of(fake_config({"grading.arguments": arguments}))
    assert sentence.startswith("grading.arguments={'extract': 'answer_tag'} must be empty with grading.function=math")
    assert problems_of(fake_config({"grading.arguments": arguments, "grading.function": "exact"})) == []
    task = TaskConfig(file="a", grading=GradingConfig(arguments=arguments))
    (sentence,) = problems_of(fake_config({"data.train": {"a": task}}))
    assert sentence.startswith("data.train.a.grading.arguments=")


@pytest.mark.parametrize("grading", [{}, {"grading.functions": {"math": WeightedFunctionConfig(weight=1.0)}}])
def test_mathematics_needs_gold_answers(grading: dict[str, Any]) -> None:
    (sentence,) = problems_of(fake_config({"data.answer_field": None, **grading}))
    assert sentence.startswith("data.train.train has no column of gold answers")
    assert problems_of(fake_config({"data.answer_field": None, "grading.function": "judge"})) == []
