"""Grades the problems of several tasks, each by the reward of its own."""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future

from megatron_p2o.config.tree import Config, GradingConfig
from megatron_p2o.processes import keys_named_in
from megatron_p2o.rewards.function_grader import specs_of
from megatron_p2o.rewards.functions import BUILT_IN, RewardSpec, function_secrets
from megatron_p2o.rewards.registry import MATH, RunGrader, make_grader
from megatron_p2o.types import FinishReason, Grade, Problem


class TaskGrader:
    """The `Grader` of a run: hands each problem to the grader of its task. Tasks that are graded alike share one."""

    def __init__(self, config: Config, make: Callable[[GradingConfig], RunGrader] = make_grader) -> None:
        """Start the graders, each by `make`; the caller closes them. Raises as `make_grader`."""
        self._config = config
        gradings = {task: config.grading_of(task) for task in ("", *config.data.train)}
        used = [gradings[task] for task in _tasks_in_use(config)]
        distinct = [grading for index, grading in enumerate(used) if grading not in used[:index]]
        self._graders = [make(grading) for grading in distinct]
        self._of_task: Mapping[str, int] = {
            task: distinct.index(grading) for task, grading in gradings.items() if grading in distinct
        }

    def submit(self, problem: Problem, text: str, finish_reason: FinishReason) -> "Future[Grade]":
        return self._graders[self._of_task[problem.task]].submit(problem, text, finish_reason)

    def check(self) -> None:
        """Have every grader decide a known answer. Raises when one cannot grade anything."""
        for grader in self._graders:
            grader.check()

    def undecided_by_own(self, problems: Iterable[Problem]) -> list[str]:
        """Try each reward of the user's own on an empty response to its first problem; return what it leaves undecided.

        One sentence each. A column that a row does not have shows here.
        """
        first = {problem.task: problem for problem in reversed([*problems])}
        own = {task: problem for task, problem in first.items() if _is_own(self._config.grading_of(task))}
        tried = {task: self.submit(problem, "", "stop") for task, problem in own.items()}
        return [
            f"{_names_of(self._config.grading_of(task))} leaves an empty response to problem {own[task].id} undecided: "
            f"{grade.reason}"
            for task, grade in ((task, future.result()) for task, future in tried.items())
            if grade.reward is None
        ]

    @property
    def worker_pids(self) -> list[int]:
        return [process_id for grader in self._graders for process_id in grader.worker_pids]

    def close(self) -> None:
        """End all workers; what they have not answered is undecided."""
        for grader in self._graders:
            grader.close()


def rewards_line(config: Config) -> str:
    """Return the reward functions of a run: "math", or "math: exact, code: 2 python + 1 regex" of several tasks."""
    named = {task: _names_of(config.grading_of(task)) for task in _tasks_in_use(config)}
    if len(set(named.values())) == 1:
        return next(iter(named.values()))
    return ", ".join(f"{task or 'other evaluation sets'}: {names}" for task, names in named.items())


def reward_functions(config: Config) -> list[RewardSpec]:
    """Return the reward functions of all tasks of a run, `math` aside: they run in workers of their own."""
    specs = [spec for task in _tasks_in_use(config) for spec in specs_of(config.grading_of(task))]
    return [spec for spec in specs if spec.function != MATH]


def reward_secrets(config: Config) -> tuple[str, ...]:
    """Return the environment variables that may hold secrets and that the reward functions of a run need."""
    return function_secrets(reward_functions(config))


def reward_keys(config: Config) -> set[str]:
    """Return the environment variables that arguments called `api_key_env` say hold a key, whatever their names."""
    return {name for spec in reward_functions(config) for name in keys_named_in(spec.arguments)}


def _is_own(grading: GradingConfig) -> bool:
    return any(name not in BUILT_IN for name in grading.function_names)


def _names_of(grading: GradingConfig) -> str:
    return " + ".join(f"{each.weight:g} {name}" for name, each in grading.functions.items()) or grading.function


def _tasks_in_use(config: Config) -> list[str]:
    """Return the tasks of all problems that may be graded; "" for evaluation sets of none."""
    of_sets = [config.data.task_of_set(name) or "" for name in config.data.evaluation]
    return list(dict.fromkeys([*config.data.train, *of_sets]))
