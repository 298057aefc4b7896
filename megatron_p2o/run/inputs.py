"""Reads the inputs of a run before anything is started, and describes them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_p2o.config.read import missing_paths
from megatron_p2o.config.rules import idle_settings
from megatron_p2o.config.tree import Config, DataConfig, ScheduleConfig
from megatron_p2o.data.batches import epoch_batches
from megatron_p2o.data.chat import ChatRenderer, chat_renderer, fitting_problems, with_fitting_demonstrations
from megatron_p2o.data.curriculum import weight_of
from megatron_p2o.data.tables import missing_package
from megatron_p2o.data.tasks import column_lines, mix_lines, num_asked, set_problems, task_problems, task_weights
from megatron_p2o.errors import Troubles
from megatron_p2o.evolve.process.given import check_templates
from megatron_p2o.evolve.reflection.leaks import leaked_answer
from megatron_p2o.evolve.reflection.reflectors import check_settings
from megatron_p2o.evolve.reflection.task_description import task_description_of
from megatron_p2o.evolve.search.rules import rules_named
from megatron_p2o.files import read_json_object
from megatron_p2o.metrics.sinks.registry import sink_problems
from megatron_p2o.rewards.tasks import TaskGrader, rewards_line
from megatron_p2o.rl.hard_samples import HardSampleLedger
from megatron_p2o.rl.objective import loss_rule
from megatron_p2o.rl.sampling import uses_hints
from megatron_p2o.rl.surrogate import check_surrogate
from megatron_p2o.rl.teachers.demonstrations import uses_demonstrations
from megatron_p2o.run_folder.place import place_problems
from megatron_p2o.terminal import listed
from megatron_p2o.types import PLAIN, Problem, TokenIds

MAX_REPORTED = 20
"""Problems that a message names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """The problems of a run and how they become tokens."""

    renderer: ChatRenderer
    train: Sequence[Problem]
    """Training problems of all tasks, one task after another."""
    evaluation: Mapping[str, Sequence[Problem]]


def lacking_files(config: Config) -> list[str]:
    """Return one sentence for each file, folder and package of a training that is not there or cannot be used."""
    return [*place_problems(config.run), *missing_paths(config), *missing_packages(config)]


def missing_packages(config: Config, *, for_training: bool = True) -> list[str]:
    """Return one sentence for each package that the settings need and this machine lacks: readers of files, sinks."""
    readers = missing_readers(config, for_training=for_training)
    return [*readers, *(sink_problems(config.logging) if for_training else ())]


def missing_readers(config: Config, *, for_training: bool = True) -> list[str]:
    """Return one sentence for each package that the files of problems need and this machine lacks."""
    data = config.data
    files = [*(data.training_files.values() if for_training else ()), *data.evaluation_files.values()]
    return [sentence for file in dict.fromkeys(files) if (sentence := missing_package(Path(file)))]


def load_inputs(config: Config) -> Inputs:
    """Read problems and tokenizer, and check what the run does with them.

    Raises:
        ValueError: files, rows, prompts or code of the user's are bad, or prompt evolution could never begin; the
            message names everything that is.
    """
    troubles = Troubles()
    with troubles.noted():
        check_surrogate(config.objective, loss_rule(config.objective))
    with troubles.noted():
        check_search(config)
    inputs = None
    with troubles.noted():
        inputs = read_problems(config)
        check_problems(config, inputs)
    troubles.tell()
    assert inputs is not None, "what has kept it from being read was told"
    return inputs


def read_problems(config: Config) -> Inputs:
    """Read problems and tokenizer. Raises `ValueError` for the files, rows and prompts that are bad."""
    renderer: ChatRenderer | None = None
    train: Sequence[Problem] = []
    evaluation: dict[str, Sequence[Problem]] = {}
    troubles = Troubles()

    def fitting(problems: Sequence[Problem]) -> Sequence[Problem]:
        return problems if renderer is None else fitting_problems(problems, renderer, config.data.skip_bad_rows)

    with troubles.noted():
        renderer = chat_renderer(config)
    with troubles.noted():
        tasks = [fitting(problems) for problems in task_problems(config.data).values()]
        train = [each for task in tasks for each in task]
        check_columns_of_help(config.data, train)
        if renderer is not None:
            train = with_fitting_demonstrations(train, renderer, config.rollout.max_new_tokens)
    for name in config.data.evaluation:
        with troubles.noted():
            evaluation[name] = fitting(set_problems(config.data, name))
    troubles.tell()
    assert renderer is not None, "what has kept it from being made was told"
    return Inputs(renderer=renderer, train=train, evaluation=evaluation)


def check_problems(config: Config, inputs: Inputs) -> None:
    """Raise `ValueError` where a run cannot use its problems: as the checks do that follow, for all of them at once."""
    troubles = Troubles()
    with troubles.noted():
        check_vocabulary(config, inputs)
    with troubles.noted():
        check_hard_set(config, num_asked(config.data, inputs.train))
    with troubles.noted():
        check_given_templates(config, inputs.train)
    with troubles.noted():
        check_hints(inputs.train)
    troubles.tell()


def batches_of(
    config: Config, train: Sequence[Problem], epoch: int, ledger: HardSampleLedger | None = None
) -> Sequence[Sequence[Problem]]:
    """Return the problems of each step of an epoch; the same whenever asked. Raises as `epoch_batches`.

    `ledger`: of the run, for the curriculum; None: nothing is known of the problems, and all are asked.
    """
    size, weights = config.schedule.problems_per_step, task_weights(config.data)
    weighs = None
    if ledger is not None and config.data.curriculum != "none":
        weighs = partial(weight_of, data=config.data, ledger=ledger, epoch=epoch)
    return epoch_batches(train, size, config.run.seed, epoch, weights=weights, weight_of=weighs)


def summary_of(config: Config, inputs: Inputs) -> list[str]:
    """Return a description of the inputs, one line each.

    Raises:
        ValueError: there are fewer problems than a step takes, or a reward function cannot be used.
    """
    schedule, num_steps = config.schedule, 0
    rewards, undecided = "", list[str]()
    troubles = Troubles()
    with troubles.noted():
        num_steps = len(batches_of(config, inputs.train, epoch=0))
    with troubles.noted():
        rewards, undecided = checked_rewards(config, inputs.train)
    troubles.tell()
    at_most = "at most " if may_be_fewer(config) else ""
    longest = max(len(token_ids) for token_ids in _plain_prompts(inputs))
    return [
        *column_lines(config.data),
        f"train: {len(inputs.train)} problems, {at_most}{num_steps} steps in each of {schedule.epochs} epochs",
        planned_work(config, num_steps),
        *mix_lines(config.data, inputs.train),
        *lines_of_help(config.data, inputs.train),
        *(f"evaluation.{name}: {len(problems)} problems" for name, problems in inputs.evaluation.items()),
        f"first prompt: {len(inputs.renderer.render(inputs.train[0], PLAIN).training_ids)} tokens",
        f"longest prompt: {longest} tokens, no more than {inputs.renderer.limit.source}",
        f"rewards: {rewards}",
        *undecided,
        *unknown_tokens(inputs),
        *notices(config, num_steps),
        *task_notice(config, num_asked(config.data, inputs.train)),
    ]


def unknown_tokens(inputs: Inputs) -> list[str]:
    """Return that prompts hold characters or words which the tokenizer does not know, and the first of them.

    The policy sees the same token for each. Byte-level tokenizers know every text.
    """
    unknown = inputs.renderer.tokenizer.unk_token_id
    if unknown is None:
        return []
    prompts = list(_plain_prompts(inputs))
    num_with = sum(bool((token_ids == unknown).any()) for token_ids in prompts)
    if not num_with:
        return []
    return [
        f"unknown words: {num_with} of {len(prompts)} prompts hold what the model's tokenizer does not know and the "
        "policy cannot read: change data.question_format or the problems, or take another model"
    ]


def checked_rewards(config: Config, train: Sequence[Problem]) -> tuple[str, list[str]]:
    """Return the reward functions, once a worker has loaded them, and what those of the user's own cannot decide.

    Raises:
        ValueError: one cannot be used.
    """
    grader = TaskGrader(config)
    try:
        grader.check()
        return rewards_line(config), grader.undecided_by_own(train)
    finally:
        grader.close()


def check_vocabulary(config: Config, inputs: Inputs) -> None:
    """Raise `ValueError` when a prompt holds a token that the model has no embedding of."""
    path = Path(config.model.path) / "config.json"
    size = read_json_object(path).get("vocab_size")
    largest = max(int(token_ids.max()) for token_ids in _plain_prompts(inputs))
    if isinstance(size, int) and largest >= size:
        raise ValueError(
            f"model.path={config.model.path} has a tokenizer of another model: prompts hold token {largest}, and "
            f"{path.name} says vocab_size={size}"
        )


def _plain_prompts(inputs: Inputs) -> Iterator[TokenIds]:
    for problems in (inputs.train, *inputs.evaluation.values()):
        for problem in problems:
            yield inputs.renderer.render(problem, PLAIN).training_ids


def check_hard_set(config: Config, num_asked: Mapping[str, int]) -> None:
    """Raise `ValueError` when no task of an epoch ever has enough hard problems for a round of evolution.

    `num_asked`: problems that an epoch asks, by task.
    """
    size = config.schedule.problems_per_step
    num_whole = sum(num_asked.values()) // size * size  # none: `epoch_batches` says so
    most = min(num_whole, max(num_asked.values()))
    if config.evolution.enabled and 0 < most < config.hard.min_problems:
        what = "an epoch asks" if len(num_asked) == 1 else "an epoch asks of the largest task"
        raise ValueError(
            f"hard.min_problems={config.hard.min_problems} must be at most the {most} problems of data.train that "
            f"{what}, or prompts never evolve: lower it, or set evolution.enabled to false"
        )


def check_given_templates(config: Config, train: Sequence[Problem]) -> None:
    """Raise `ValueError` or `OSError` where templates are given and cannot be used."""
    evolution = config.evolution
    if evolution.enabled and evolution.templates_file is not None:
        check_templates(Path(evolution.templates_file), evolution.max_template_tokens, train, list(config.data.train))


def check_search(config: Config) -> None:
    """Raise `ValueError` or `OSError` when the rules, the writer of templates, or what it is told cannot be had."""
    if not config.evolution.searches:
        return
    troubles = Troubles()
    for task in config.data.train:
        with troubles.noted():
            task_description_of(config, task)
    with troubles.noted():
        rules_named(config.evolution.rules)
    if config.evolution.reflection.backend != "self":  # whose server has no address yet
        with troubles.noted():
            check_settings(config.evolution.reflection)
    troubles.tell()


def check_hints(train: Sequence[Problem]) -> None:
    """Raise `ValueError` for hints that tell the gold answer of their problem, naming each."""
    leaks = [
        f"problem {problem.id} ({problem.question:.40}): its hint {level} holds {problem.answer!r}, its gold answer"
        for problem in train
        for level, hint in enumerate(problem.hints, start=1)
        if problem.answer is not None and leaked_answer(hint, [problem.answer]) is not None
    ]
    if leaks:
        raise ValueError(f"hints must not tell the answer, take it out of {len(leaks)}: {listed(leaks, MAX_REPORTED)}")


def check_columns_of_help(data: DataConfig, train: Sequence[Problem]) -> None:
    """Raise `ValueError` where a task that is to have hints or demonstrations has none."""
    hinted = {problem.task for problem in train if problem.hints}
    shown = {problem.task for problem in train if problem.demonstrations}
    for name in data.train:
        task = data.of_task(name)
        for what, column, have in (
            ("hints", task.hints_field, hinted),
            ("demonstrations", task.demonstrations_field, shown),
        ):
            if column is not None and name not in have:
                raise ValueError(
                    f"{what}_field={column} names no column of {data.train[name].file} with {what}: correct it, or "
                    "leave it out"
                )


def lines_of_help(data: DataConfig, train: Sequence[Problem]) -> list[str]:
    """Return how many problems have hints or demonstrations, a line each; none where they are not used."""
    used = {
        "hints": [len(problem.hints) for problem in train] if uses_hints(data) else [],
        "demonstrations": [len(problem.demonstrations) for problem in train] if uses_demonstrations(data) else [],
    }
    return [
        f"{what}: {sum(map(bool, counts))} of {len(train)} problems have them, at most {max(counts)} each; the other "
        f"{counts.count(0)} are always asked plainly"
        for what, counts in used.items()
        if counts
    ]


def task_notice(config: Config, num_asked: Mapping[str, int]) -> list[str]:
    """Return one sentence for each of several tasks that never has enough hard problems for templates of its own."""
    if not config.evolution.enabled or len(num_asked) == 1:
        return []
    return [
        f"prompts of data.train.{task} do not evolve: an epoch asks {number} of its problems, fewer than "
        f"hard.min_problems={config.hard.min_problems}"
        for task, number in num_asked.items()
        if number < config.hard.min_problems
    ]


def planned_steps(schedule: ScheduleConfig, num_steps_per_epoch: int) -> int:
    """Return how many steps the whole run has: at most, where `may_be_fewer`."""
    num_steps = num_steps_per_epoch * schedule.epochs
    return num_steps if schedule.max_steps is None else min(num_steps, schedule.max_steps)


def may_be_fewer(config: Config) -> bool:
    """Return whether an epoch may have fewer steps than it has batches of problems."""
    return config.schedule.max_batches_per_step > 1 or config.data.curriculum != "none"


def planned_work(config: Config, num_steps_per_epoch: int) -> str:
    """Return how many steps and training rollouts the whole run has, as a line."""
    schedule = config.schedule
    num_steps = planned_steps(schedule, num_steps_per_epoch)
    # Dynamic sampling asks further batches of the epoch for a step, a curriculum leaves some out.
    num_batches = min(num_steps * schedule.max_batches_per_step, num_steps_per_epoch * schedule.epochs)
    num_rollouts = num_batches * schedule.problems_per_step * config.rollout.group_size
    at_most = "at most " if may_be_fewer(config) else ""
    is_cut = num_steps < num_steps_per_epoch * schedule.epochs
    limit = f", where schedule.max_steps={schedule.max_steps} ends it" if is_cut else ""
    num_tokens = num_rollouts * config.rollout.max_new_tokens
    further = config.evolution.plain_rollouts if config.evolution.enabled else None
    on_hard = f", and {further} further rollouts of hard problems an epoch" if further else ""
    return (
        f"whole run: {at_most}{num_steps} steps{limit}, {at_most}{num_rollouts} training rollouts of at most "
        f"{num_tokens:,} tokens in all{on_hard}"
    )


def notices(config: Config, num_steps_per_epoch: int) -> list[str]:
    """Return what the settings ask for and will not have, one sentence each."""
    found = [evolution_notice(config, num_steps_per_epoch), warmup_notice(config, num_steps_per_epoch)]
    return [*(notice for notice in found if notice is not None), *idle_settings(config)]


def warmup_notice(config: Config, num_steps_per_epoch: int) -> str | None:
    """Return that warm-up outlasts the run, so that no step is taken at `optimizer.lr`; None when it does not."""
    rates = config.optimizer
    num_updates = planned_steps(config.schedule, num_steps_per_epoch) * config.schedule.updates_per_step
    num_warmup = max(rates.warmup_steps, math.ceil(rates.warmup_share * num_updates))
    if num_warmup < num_updates:
        return None
    setting = "warmup_steps" if rates.warmup_steps else "warmup_share"
    highest = rates.lr * num_updates / (num_warmup + 1)
    return (
        f"the learning rate never reaches optimizer.lr={rates.lr:g}, it ends at {highest:.2g}: optimizer.{setting}="
        f"{getattr(rates, setting):g} makes warm-up last for all {num_updates} optimizer steps of the run"
    )


def evolution_notice(config: Config, num_steps_per_epoch: int) -> str | None:
    """Return why no round of evolution can begin on the schedule; None when one can, or none is wanted."""
    schedule = config.schedule
    if not config.evolution.enabled:
        return None
    if schedule.epochs == 1:
        return "prompts do not evolve: rounds run between epochs, and schedule.epochs=1"
    if schedule.max_steps is not None and schedule.max_steps <= num_steps_per_epoch:
        return (
            f"prompts do not evolve: rounds run between epochs, and schedule.max_steps={schedule.max_steps} ends the "
            f"run in the first, of {num_steps_per_epoch} steps"
        )
    return None
