"""Settings of the problems, and of how the policy is measured on them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from megatron_p2o.config.ranges import NonNegativeFloat, NonNegativeInt, NumSamples, PositiveInt
from megatron_p2o.config.shape import IS_SHORTHAND


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSetConfig:
    """One evaluation set. A file may write the path alone, `aime: data/aime.jsonl`, for `aime: {file: ...}`."""

    file: str = field(metadata=IS_SHORTHAND)
    """File of the set's problems, JSONL or parquet."""
    num_samples: NumSamples | None = None
    """Answers to each problem of this set. None: `evaluation.num_samples`."""
    temperature: NonNegativeFloat | None = None
    """Sampling temperature of answers to this set. None: `evaluation.temperature`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Problems and how they are asked."""

    train: str
    """JSONL or parquet file of the problems to train on."""
    evaluation: Mapping[str, EvaluationSetConfig] = field(default_factory=dict)
    """Evaluation sets by name. All are evaluated plainly every `evaluation.every_steps` steps and at the end."""
    id_field: str = "id"
    """Column of a problem's identifier. A hash of the question serves where the rows have no such column."""
    question_field: str = "question"
    """Column of a problem's question."""
    answer_field: str | None = "answer"
    """Column of a problem's gold answer. None: the problems have none; a reward function that needs none then grades
    them, from the other columns of the row or from the response alone."""
    skip_bad_rows: bool = False
    """Whether to use the good rows and report the bad ones. False: a bad row ends the run."""
    question_format: str = (
        "Let's think step by step and output the final answer within \\boxed{{}}.\nQuestion: {question}"
    )
    """Text of the user message, in the syntax of `str.format`: `{question}` is the question, literal braces are
    doubled. The default is the paper's wording."""
    max_prompt_tokens: PositiveInt = 4096
    """Longest prompt in tokens (the paper's). A plain prompt that is longer is a bad row; a template that makes one
    longer is disqualified."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Measuring the policy on plain prompts."""

    every_steps: NonNegativeInt = 30
    """Rollout steps between two evaluations. 0 evaluates at the end, and at the start if `evaluation.at_start`."""
    num_samples: NumSamples | None = None
    """Answers to each problem of a set that has no number of its own. None: 16 in sets of fewer than 100 problems, 1 in
    larger ones (the paper's protocol)."""
    temperature: NonNegativeFloat | None = None
    """Sampling temperature of answers to a set that has none of its own. None: greedy where a problem is answered once,
    0.6 where more often (the paper's protocol)."""
    at_start: bool = True
    """Whether the initial policy is evaluated before the first step."""
    with_best_template: bool = False
    """Whether every set is also evaluated under the best template whenever a round has published one."""
    best_set: str | None = None
    """Evaluation set by which the best checkpoint is kept as `checkpoints/best`. The best checkpoint is saved right
    after the evaluation that found it and is never pruned. None: no best checkpoint."""
    best_metric: Literal["avg", "pass_at_k"] = "avg"
    """Measure by which the best checkpoint is chosen. `avg`: mean share of correct answers. `pass_at_k`: share of
    problems with a correct answer, k being the number of answers to each."""
