"""Settings of the problems, and of how the policy is measured on them."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from megatron_p2o.config.ranges import NonNegativeFloat, NonNegativeInt, NumSamples, PositiveFloat, PositiveInt, Range
from megatron_p2o.config.sections.rollout import GradingConfig
from megatron_p2o.config.shape import IS_LISTED, IS_SHORTHAND, ONLY_TASK

OF_TASK = (
    *("id_field", "question_field", "answer_field", "hints_field", "demonstrations_field"),
    *("question_format", "system_prompt"),
)
"""What a task may have of its own, instead of what `data` says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSetConfig:
    """One evaluation set. A file may write the path alone, `aime: data/aime.jsonl`, for `aime: {file: ...}`."""

    file: str = field(metadata=IS_SHORTHAND)
    """File of the set's problems: JSONL, JSON, CSV, parquet or Arrow. Or code that yields
    them: `package.module:callable` or `path/to/file.py:callable`, called without arguments."""
    num_samples: NumSamples | None = None
    """Responses to each problem of this set. None: `evaluation.num_samples`."""
    temperature: NonNegativeFloat | None = None
    """Sampling temperature of responses to this set. None: `evaluation.temperature`."""
    task: str | None = None
    """Task of `data.train` whose columns, prompt and grading are used. None: the only task; where there are several,
    what `data` and `grading` say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig:
    """One task: a file of problems, and how they are asked and graded. A file may write the path alone for the record,
    or list tasks as records with a `name`; a path in a list is called after its file."""

    file: str = field(metadata=IS_SHORTHAND | IS_LISTED)
    """File of the task's problems: JSONL, JSON, CSV, parquet or Arrow. Or code that yields
    them: `package.module:callable` or `path/to/file.py:callable`, called without arguments."""
    weight: PositiveFloat = 1.0
    """How often a problem of the task is asked, beside those of other tasks. An epoch asks every problem of the tasks
    with the largest weight, and of the others the share weight / largest weight, another part each epoch."""
    grading: GradingConfig | None = None
    """Reward of the task. None: `grading`. What a task's `grading` leaves out has its default."""
    id_field: str | None = None
    """Column of a problem's identifier. None: `data.id_field`."""
    question_field: str | None = None
    """Column of a problem's question. None: `data.question_field`."""
    answer_field: str | None = None
    """Column of a problem's gold answer; "" for problems that have none. None: `data.answer_field`."""
    hints_field: str | None = None
    """Column of a problem's hints. None: `data.hints_field`."""
    demonstrations_field: str | None = None
    """Column of a teacher's responses to a problem. None: `data.demonstrations_field`."""
    question_format: str | None = None
    """Text of the user message. None: `data.question_format`."""
    system_prompt: str | None = None
    """System message. None: `data.system_prompt`."""
    description: str | None = None
    """What the task is and how responses are judged, for reflection: text, or a file of text (.txt, .md). None:
    `evolution.reflection.task_description`."""


def one_task(file: str) -> dict[str, TaskConfig]:
    """Return the tasks that `data.train: FILE` stands for."""
    return {ONLY_TASK: TaskConfig(file=file)}


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Problems and how they are asked."""

    train: Mapping[str, TaskConfig]
    """Tasks to train on, by name. A file of settings may write one path, a list of paths, or a list of records with
    `name`. The batches of an epoch mix tasks in their proportions."""
    evaluation: Mapping[str, EvaluationSetConfig] = field(default_factory=dict)
    """Evaluation sets by name. All are evaluated plainly every `evaluation.every_steps` steps and at the end."""
    id_field: str = "id"
    """Column of a problem's identifier; a dot leads into a nested one. Rows without it are known by a hash of the
    question."""
    question_field: str = "auto"
    """Column of a problem's question: text, or a conversation of one user message and perhaps a system message. A dot
    leads into a nested column. `auto`: the first of `question`, `problem`, `prompt` and `messages` that a file has."""
    answer_field: str | None = "auto"
    """Column of a problem's gold answer. `auto`: the first of `answer`, `final_answer` and `reward_model.ground_truth`
    that a file has. None: the problems have none; a reward function that needs none then grades
    them, from the other columns of the row or from the response alone."""
    hints_field: str | None = None
    """Column of a problem's hints: a text, or a list of texts from the weakest to the strongest. A problem that failed
    plainly (`hard`) is asked through its first hint the next time, and through the next one where that fails too, until
    it is solved plainly. A hint stands where a template stands: `objective.context` and `assignment.num_plain` apply. A
    problem without hints is asked plainly. Needs `evolution.enabled: false`. None: no hints."""
    demonstrations_field: str | None = None
    """Column of a teacher's responses to a problem: a text, or a list of texts. They are graded and trained on in the
    place of sampled rollouts, `rollout.group_size` less `assignment.num_plain` of them at a time; with
    `objective.surrogate: clone` those that solve their problem are cloned. A problem without any is asked plainly.
    Needs `evolution.enabled: false`, no hints, and `rollout.temperature: 1`. None: no demonstrations."""
    curriculum: Literal["none", "unsolved", "learnable"] = "none"
    """Which problems an epoch asks, by their success rate s over the epochs before. `none`: all. Else a problem of
    weight w is asked in that share of the epochs. `unsolved`: w = 1 - s of plain tries, so that what the policy masters
    is asked less and what is hard always. `learnable`: w = 4 s (1 - s) of all tries; what is hard is asked less, too,
    unless templates solve it. A problem that was never tried is asked."""
    curriculum_min_weight: Annotated[float, Range(above=0, at_most=1)] = 0.1
    """Least weight of a problem under `data.curriculum`: 0.1 asks it in every tenth epoch."""
    skip_bad_rows: bool = False
    """Whether to use the good rows and report the bad ones. False: a bad row ends the run."""
    question_format: str = (
        "Let's think step by step and output the final answer within \\boxed{{}}.\nQuestion: {question}"
    )
    """Text of the user message, in the syntax of `str.format`: `{question}` is the question, literal braces are
    doubled. The default is the paper's wording."""
    system_prompt: str = ""
    """System message of every problem whose row brings none of its own. Empty: none."""
    max_prompt_tokens: PositiveInt = 4096
    """Longest prompt in tokens (the paper's). A plain prompt that is longer is a bad row; a template that makes one
    longer is disqualified."""

    @property
    def training_files(self) -> dict[str, str]:
        """The file of each task by the setting that names it."""
        return {
            "data.train" if name == ONLY_TASK else f"data.train.{name}": task.file for name, task in self.train.items()
        }

    @property
    def evaluation_files(self) -> dict[str, str]:
        """The file of each evaluation set by the setting that names it."""
        return {f"data.evaluation.{name}": given.file for name, given in self.evaluation.items()}

    def of_task(self, name: str | None) -> "DataConfig":
        """Return these settings with those of a task in them; None for a problem of no task."""
        if name is None:
            return self
        task = self.train[name]
        own = {each: getattr(task, each) for each in OF_TASK if getattr(task, each) is not None}
        return replace(self, **own)

    def mix(self, tasks: Iterable[str]) -> list[tuple[int, float]]:
        """Return number of problems, and weight beside the largest, of each task: all that decides how tasks are mixed.

        `tasks`: that of each problem.
        """
        sizes = Counter(tasks)
        if len(self.train) == 1:
            return [(sizes.total(), 1.0)]
        largest = max(task.weight for task in self.train.values())
        return [(sizes[name], task.weight / largest) for name, task in self.train.items()]

    def task_of_set(self, name: str) -> str | None:
        """Return the task of an evaluation set; None where it has none."""
        only = next(iter(self.train)) if len(self.train) == 1 else None
        return self.evaluation[name].task or only


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Measuring the policy on plain prompts."""

    every_steps: NonNegativeInt = 30
    """Rollout steps between two evaluations. 0 evaluates at the end, and at the start if `evaluation.at_start`."""
    num_samples: NumSamples | None = None
    """Responses to each problem of a set that has no number of its own. None: 16 in sets of fewer than 100 problems, 1
    in larger ones (the paper's protocol)."""
    temperature: NonNegativeFloat | None = None
    """Sampling temperature of responses to a set that has none of its own. None: greedy where a problem is asked once,
    0.6 where more often (the paper's protocol)."""
    at_start: bool = True
    """Whether the initial policy is evaluated before the first step."""
    with_best_template: bool = False
    """Whether every set is also evaluated under the best template whenever a round has published one."""
    best_set: str | None = None
    """Evaluation set by which the best checkpoint is kept as `checkpoints/best`. The best checkpoint is saved right
    after the evaluation that found it and is never pruned. None: no best checkpoint."""
    best_metric: Literal["avg", "pass_at_k"] = "avg"
    """Measure by which the best checkpoint is chosen. `avg`: mean share of correct responses. `pass_at_k`: share of
    problems with a correct response, k being the number of responses to each."""
