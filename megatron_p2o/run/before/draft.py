"""Drafts the settings of a first run from what was found of model and problems."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_p2o.config.read import load_config
from megatron_p2o.config.source import ConfigError, ConfigProblem, NamePath, read_overrides
from megatron_p2o.config.tree import Config, EvolutionConfig, HardConfig, RolloutConfig, ScheduleConfig
from megatron_p2o.config.yaml_reader import dump_yaml
from megatron_p2o.data.columns import ANSWER_FIELDS, QUESTION_FIELDS
from megatron_p2o.rewards.functions import BUILT_IN
from megatron_p2o.run.before.look import FileFacts, ModelFacts

MATH = "math"

FORMATS: Mapping[str, str] = {
    "exact": "{question}\n\nGive the final answer alone on the last line.",
    "json_schema": "{question}\n\nAnswer with one JSON document and nothing else.",
    "python": "{question}\n\nWrite the code into one ```python block.",
    "reasoning_gym": "{question}\n\nGive the final answer within <answer> and </answer>.",
}
"""How questions are asked for a reward function, where the paper's wording asks for another form of answer."""

ARGUMENTS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "exact": {"answers_column": ("answers", "accepted")},
    "regex": {"pattern_column": ("pattern", "regex")},
    "json_schema": {"schema_column": ("schema", "json_schema"), "equal_to_column": ("expected",)},
    "python": {"tests_column": ("tests", "test_cases", "test", "unit_tests"), "entry_point_column": ("entry_point",)},
}
"""Argument of a reward function to the names of columns that it may be."""

NEEDED: Mapping[str, Sequence[Sequence[str]]] = {
    "regex": (("pattern", "pattern_column"),),
    "json_schema": (("schema", "schema_column"),),
    "python": (("tests_column",),),
    "judge": (("base_url",), ("model",), ("rubric", "rubric_file")),
}
"""Arguments without which a reward function judges nothing: one of each row."""

TASKS = tuple(BUILT_IN)
"""What `--task` names, besides a function of one's own."""

NEEDS_ANSWER = (MATH, "exact")

CPU_NEW_TOKENS = 512
"""Longest response without a GPU, where a token of a small model takes milliseconds."""

LEAST_NEW_TOKENS = 16

STEPS_PER_EPOCH = 8
"""Fewest steps of an epoch that the size of a step leaves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftLine:
    """One setting of the draft."""

    name: NamePath
    value: Any
    comment: str = ""
    """Why it is there; "" where its name says it."""


def reward_lines(task: str, file: FileFacts, given: Mapping[NamePath, Any]) -> list[DraftLine]:
    """Return the settings of columns, prompt and reward.

    Args:
        given: what the user has set.

    Raises:
        ValueError: a column or an argument that the task needs is not known.
    """
    columns = ", ".join(file.columns) or "none"
    question, answer = given.get(("data", "question_field"), file.question), file.answer
    if not question:
        raise ValueError(
            f"{file.path} has no column that looks like a question (its columns: {columns}): name it, --set "
            "data.question_field=COLUMN"
        )
    lines: list[DraftLine] = []
    if question not in QUESTION_FIELDS:
        lines.append(DraftLine(name=("data", "question_field"), value=question, comment="Column of the question."))
    if ("data", "answer_field") not in given:
        if task in NEEDS_ANSWER and not answer and not (task == "exact" and _found("exact", file)):
            raise ValueError(
                f"{file.path} has no column that looks like a gold answer (its columns: {columns}), which {task} "
                "compares with: name it, --set data.answer_field=COLUMN, or choose another --task"
            )
        if answer not in ANSWER_FIELDS:
            comment = "Column of the gold answer." if answer else "The problems have no gold answer."
            lines.append(DraftLine(name=("data", "answer_field"), value=answer or None, comment=comment))
    if task == MATH:
        return lines
    form = FORMATS.get(task, "{question}")
    asked = DraftLine(name=("data", "question_format"), value=form, comment="What the user's message says.")
    function = DraftLine(
        name=("grading", "function"), value=task, comment="What rewards a response; docs/rewards.md has its arguments."
    )
    return [*lines, asked, function, *_arguments(task, file, given)]


def _arguments(task: str, file: FileFacts, given: Mapping[NamePath, Any]) -> list[DraftLine]:
    """Return the arguments of the reward function. Raises `ValueError` where one is missing."""
    own = {name[2] for name in given if name[:2] == ("grading", "arguments")}
    found = _found(task, file)
    if task == "exact":
        found = {"extract": "last_line", **found}
    for choice in NEEDED.get(task, ()):
        if not {*own, *found} & set(choice):
            shown = " or ".join(f"--set grading.arguments.{name}=..." for name in choice)
            raise ValueError(f"--task {task} needs {shown} (docs/rewards.md)")
    return [
        DraftLine(name=("grading", "arguments", name), value=value) for name, value in found.items() if name not in own
    ]


def _found(task: str, file: FileFacts) -> dict[str, str]:
    """Return the arguments that columns of the file are."""
    known = {
        argument: next((name for name in names if name in file.columns), "")
        for argument, names in ARGUMENTS.get(task, {}).items()
    }
    if task == "exact" and known["answers_column"] not in file.listed:
        return {}
    return {argument: name for argument, name in known.items() if name}


def size_lines(
    model: ModelFacts, num_problems: int, longest_prompt: int, given: Mapping[NamePath, Any], *, has_gpu: bool
) -> list[DraftLine]:
    """Return the settings that follow from the sizes of model and problems, where the defaults do not fit them.

    Raises:
        ValueError: the model's positions leave no room for a response.
    """
    schedule, hard = ScheduleConfig(), HardConfig()
    per_step = given.get(("schedule", "problems_per_step")) or _step_size(num_problems, schedule.problems_per_step)
    lines = _token_lines(model, longest_prompt, has_gpu=has_gpu)
    if per_step != schedule.problems_per_step:
        comment = f"Problems of a rollout step: {num_problems // per_step} steps make an epoch."
        update = min(schedule.problems_per_update, per_step)
        lines += [
            DraftLine(name=("schedule", "problems_per_step"), value=per_step, comment=comment),
            DraftLine(name=("schedule", "problems_per_update"), value=update, comment="Problems of an optimizer step."),
        ]
    asked = num_problems // per_step * per_step
    if asked // 4 < hard.min_problems:
        comment = "Fewest hard problems of an epoch for which prompts evolve."
        lines.append(DraftLine(name=("hard", "min_problems"), value=max(2, min(asked, asked // 4)), comment=comment))
    return lines


def _step_size(num_problems: int, default: int) -> int:
    """Return the largest power of two, up to the default, that gives `STEPS_PER_EPOCH` steps."""
    size = default
    while size > 1 and num_problems // size < STEPS_PER_EPOCH:
        size //= 2
    return size


def _token_lines(model: ModelFacts, longest_prompt: int, *, has_gpu: bool) -> list[DraftLine]:
    template_default, response_default = EvolutionConfig().max_template_tokens, RolloutConfig().max_new_tokens
    template = min(template_default, model.num_positions // 8)
    left = model.num_positions - longest_prompt - template
    response = min(response_default, left) if has_gpu else min(CPU_NEW_TOKENS, left, max(1, model.num_positions // 2))
    if response < LEAST_NEW_TOKENS:
        raise ValueError(
            f"the longest prompt has about {longest_prompt} tokens, and the {model.num_positions} positions of "
            f"model.path={model.path} leave too few for a response: shorten the questions, or take another model"
        )
    lines: list[DraftLine] = []
    if response != response_default:
        fit = f"The longest prompt has {longest_prompt} of the model's {model.num_positions} positions."
        slow = "" if has_gpu else " Without a GPU, tokens are slow."
        lines.append(
            DraftLine(name=("rollout", "max_new_tokens"), value=response, comment=f"Longest response. {fit}{slow}")
        )
    if template != template_default:
        comment = "Longest template, in tokens."
        lines.append(DraftLine(name=("evolution", "max_template_tokens"), value=template, comment=comment))
    return lines


def given_settings(overrides: Sequence[str]) -> dict[NamePath, Any]:
    """Return what `--set` says, by name.

    Raises:
        ConfigError: it cannot be read, or sets what an option of `p2o init` is for.
    """
    problems: list[ConfigProblem] = []
    settings = read_overrides(overrides, problems)
    for name, option in ((("data", "train"), "--problems"), (("model", "path"), "--model")):
        if any(each[: len(name)] == name for each in settings):
            sentence = f"{'.'.join(name)} is what {option} gives: leave it out"
            problems.append(ConfigProblem(name=".".join(name), where="--set", sentence=sentence))
    if problems:
        raise ConfigError(problems)
    return {name: setting.value for name, setting in settings.items() if not setting.is_clearing}


def with_given(lines: Sequence[DraftLine], given: Mapping[NamePath, Any]) -> list[DraftLine]:
    """Return the draft with the user's settings in the place of its own."""
    own = [DraftLine(name=name, value=value) for name, value in given.items()]
    return [*(line for line in lines if line.name not in given), *own]


def drafted_config(lines: Sequence[DraftLine]) -> Config:
    """Return the tree of settings that the lines make. Raises `ConfigError` with all that is wrong with them."""
    return load_config(None, [f"{'.'.join(line.name)}={json.dumps(line.value)}" for line in lines])


def settings_text(head: Sequence[str], lines: Sequence[DraftLine]) -> str:
    """Return the settings as YAML with comments, in the order of the tree's sections; `head` begins it."""
    order = list(Config.__dataclass_fields__)
    sections = sorted({line.name[0] for line in lines}, key=order.index)
    text = "".join(f"# {each}\n" for each in head)
    for section in sections:
        text += f"\n{_block((section,), [line for line in lines if line.name[0] == section])}"
    return text


def _block(prefix: NamePath, lines: Sequence[DraftLine]) -> str:
    """Return the lines below a name, nested."""
    indent, depth = "  " * len(prefix), len(prefix)
    text = f"{'  ' * (depth - 1)}{prefix[-1]}:\n"
    for key in dict.fromkeys(line.name[depth] for line in lines):
        below = [line for line in lines if line.name[depth] == key]
        if len(below[0].name) > depth + 1:
            text += _block((*prefix, key), below)
            continue
        comment = f"{indent}# {below[0].comment}\n" if below[0].comment else ""
        text += comment + "".join(f"{indent}{row}\n" for row in _pair(key, below[0].value))
    return text


def _pair(key: str, value: Any) -> list[str]:
    if isinstance(value, str) and "\n" in value:
        return [f"{key}: {json.dumps(value, ensure_ascii=False)}"]
    return dump_yaml({key: value}).splitlines()
