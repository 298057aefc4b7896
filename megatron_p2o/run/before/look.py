"""Looks at a model folder and a file of problems, and says what a run would find there."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from megatron_p2o.config.suggestions import model_command
from megatron_p2o.config.tree import DataConfig, ModelConfig, one_task
from megatron_p2o.data.chat import ChatRenderer, PromptLimit
from megatron_p2o.data.columns import ANSWER_FIELDS, QUESTION_FIELDS, field_at
from megatron_p2o.data.problems import load_problems
from megatron_p2o.data.raw_rows import BadRowError, parsed, raw_rows
from megatron_p2o.data.tokenizer import load_tokenizer
from megatron_p2o.files import read_json_object
from megatron_p2o.policy.model.architecture import read_architecture
from megatron_p2o.types import PLAIN, Problem

OTHER_QUESTION_FIELDS = ("instruction", "query", "input", "text")
OTHER_ANSWER_FIELDS = ("ground_truth", "gold", "target", "label", "expected", "output", "solution")
"""Further names of columns that are taken where none of those is there that every run takes by itself."""

NUM_MEASURED = 64
"""Longest questions, by characters, whose prompts are measured in tokens: the longest prompt is one of them but for
unusual text, and the dry run measures all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """What is known of a model folder."""

    path: str
    model_type: str
    num_parameters: int
    num_layers: int
    num_positions: int
    """Tokens of a prompt and its response, at most."""
    switches_thinking: bool
    """Whether its chat template has Qwen3's switch `enable_thinking`."""

    def __str__(self) -> str:
        size = self.num_parameters
        parameters = (
            f"{size / 1e9:.1f} billion" if size >= 1e9 else f"{size / 1e6:.1f} million" if size >= 1e6 else size
        )
        return (
            f"{self.model_type}, {parameters} parameters, {self.num_layers} layers, {self.num_positions} positions, "
            f"chat template {'with' if self.switches_thinking else 'without'} a switch for thinking"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class FileFacts:
    """What is known of a file of problems."""

    path: str
    columns: Sequence[str]
    """Columns of its first good row."""
    listed: Sequence[str]
    """Those that hold lists."""
    question: str
    """Column of the question; "" where none looks like one."""
    answer: str
    """Column of the gold answer; "" where none looks like one."""


def look_at_model(path: str) -> ModelFacts:
    """Return what is known of a model folder.

    Raises:
        ValueError: it is none that can be trained: architecture, tokenizer or chat template; the message says what
            would help.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"model.path={path} is no folder: give a Hugging Face directory, or {model_command(path)}")
    architecture = read_architecture(folder)
    template = load_tokenizer(path).chat_template
    return ModelFacts(
        path=path,
        model_type=str(read_json_object(folder / "config.json")["model_type"]),
        num_parameters=sum(map(math.prod, architecture.weight_shapes().values())),
        num_layers=architecture.num_layers,
        num_positions=architecture.max_positions,
        switches_thinking="enable_thinking" in str(template),
    )


def look_at_file(path: str) -> FileFacts:
    """Return what is known of a file of problems by its first good row.

    Raises:
        ValueError: it cannot be read, or holds no good row.
    """
    first = None
    for _, raw_row in raw_rows(Path(path)):
        try:
            first = parsed(raw_row)
            break
        except BadRowError:
            continue
    if first is None:
        raise ValueError(f"{path} holds no problem: give a file with one JSON object, table or parquet row per problem")

    def found(names: Sequence[str], others: Sequence[str], *kinds: type) -> str:
        known = (name for name in names if field_at(first, name) is not None)
        guessed = (name for name in others if isinstance(field_at(first, name), kinds))
        return next(chain(known, guessed), "")

    return FileFacts(
        path=path,
        columns=tuple(map(str, first)),
        listed=tuple(str(name) for name, value in first.items() if isinstance(value, list)),
        question=found(QUESTION_FIELDS, OTHER_QUESTION_FIELDS, str),
        answer=found(ANSWER_FIELDS, OTHER_ANSWER_FIELDS, str, int),
    )


def problems_in(path: str, data: DataConfig) -> list[Problem]:
    """Return the problems of a file. Raises `ValueError` for bad rows, which it names."""
    return load_problems(path, replace(data, train=one_task(path)), "train")


def longest_prompt(problems: Sequence[Problem], model: ModelConfig, data: DataConfig) -> int:
    """Return the tokens of the longest plain prompt, as far as the longest questions show it.

    Raises:
        ValueError: the model's chat template cannot ask them.
    """
    no_limit = PromptLimit(num_tokens=2**31, source="", remedy="")
    renderer = ChatRenderer(model, replace(data, train=one_task("")), no_limit)
    longest = sorted(problems, key=lambda problem: len(problem.question), reverse=True)[:NUM_MEASURED]
    return max(len(renderer.render(problem, PLAIN).training_ids) for problem in longest)
