"""Rules between settings. Returns every rule that a tree of settings violates."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

from megatron_p2o.config.ranges import range_problems
from megatron_p2o.config.shape import ONLY_TASK
from megatron_p2o.config.tree import Config, DataConfig, GradingConfig, ObjectiveConfig, OptimizerConfig

MAX_NAME_CHARS = 64

SET_NAME = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_NAME_CHARS}}}")

IN_USE: Mapping[str, tuple[str, Callable[[Config], bool]]] = {
    "objective.ratio_low": ("objective.context=ratio_mask", lambda config: config.objective.context == "ratio_mask"),
    "objective.ratio_high": ("objective.context=ratio_mask", lambda config: config.objective.context == "ratio_mask"),
    "objective.ratio_form": ("objective.context=ratio_mask", lambda config: config.objective.context == "ratio_mask"),
    "objective.ratio_widening": (
        "objective.context=ratio_mask and objective.ratio_anneal_steps above 0",
        lambda config: config.objective.context == "ratio_mask" and config.objective.ratio_anneal_steps > 0,
    ),
    "objective.ratio_anneal_steps": (
        "objective.context=ratio_mask and objective.ratio_widening other than 1",
        lambda config: config.objective.context == "ratio_mask" and config.objective.ratio_widening != 1,
    ),
    "objective.distill_beta": ("objective.context=distill", lambda config: config.objective.context == "distill"),
    "objective.dual_clip": ("objective.surrogate=ppo", lambda config: config.objective.surrogate == "ppo"),
    "objective.kl_estimator": ("objective.kl_coefficient above 0", lambda config: config.objective.kl_coefficient > 0),
    "objective.kl_as": ("objective.kl_coefficient above 0", lambda config: config.objective.kl_coefficient > 0),
    "data.curriculum_min_weight": ("data.curriculum other than none", lambda config: config.data.curriculum != "none"),
}
"""Settings that act only beside another: what they need, and whether it is so."""

Rule = tuple[bool, str]
"""Whether a rule holds, and the sentence that says so when it does not."""


def problems_of(config: Config) -> list[str]:
    """Return every rule the settings break, one sentence each with the remedy; empty when the run can start."""
    rules = [
        *_run_rules(config),
        *_grading_rules(config),
        *_sampling_rules(config),
        *_objective_rules(config),
        *_optimizer_rules(config.optimizer),
        *_process_rules(config),
        *_task_rules(config),
        *_evaluation_rules(config),
    ]
    return range_problems(config) + [text for holds, text in rules if not holds]


def idle_settings(config: Config) -> list[str]:
    """Return one sentence for each setting that differs from its default and has no effect beside the others."""
    default = replace(config, objective=ObjectiveConfig(), data=DataConfig(train=config.data.train))
    return [
        f"{name}={attrgetter(name)(config)} has no effect: it acts only with {needed}"
        for name, (needed, is_in_use) in IN_USE.items()
        if attrgetter(name)(config) != attrgetter(name)(default) and not is_in_use(config)
    ]


def _sampling_rules(config: Config) -> list[Rule]:
    return [
        (
            config.schedule.problems_per_step % max(1, config.schedule.problems_per_update) == 0,
            f"schedule.problems_per_update={config.schedule.problems_per_update} must divide "
            f"schedule.problems_per_step={config.schedule.problems_per_step}",
        ),
        (
            config.assignment.num_plain <= config.rollout.group_size,
            f"assignment.num_plain={config.assignment.num_plain} must be at most rollout.group_size="
            f"{config.rollout.group_size}",
        ),
    ]


def _grading_rules(config: Config) -> list[Rule]:
    data = config.data
    own = {f"data.train.{name}.grading": task.grading for name, task in data.train.items() if task.grading}
    return [
        *(
            rule
            for name, grading in {"grading": config.grading, **own}.items()
            for rule in _function_rules(name, grading)
        ),
        *(
            (
                data.of_task(name).answer_field not in (None, "")
                or "math" not in config.grading_of(name).function_names,
                f"data.train.{name} has no column of gold answers (answer_field), which the reward math compares with: "
                "name the column, or a reward function that needs none (grading.function)",
            )
            for name in data.train
        ),
    ]


def _function_rules(name: str, grading: GradingConfig) -> list[Rule]:
    return [
        (
            not grading.functions or (grading.function == "math" and not grading.arguments),
            f"{name}.functions takes the place of {name}.function and {name}.arguments: set it alone, with the "
            "arguments of each function below its name",
        ),
        (
            not grading.arguments or grading.function != "math" or bool(grading.functions),
            f"{name}.arguments={dict(grading.arguments)} must be empty with {name}.function=math, which takes none: "
            "name another function, or take the arguments out",
        ),
    ]


def _objective_rules(config: Config) -> list[Rule]:
    overlong_tokens, max_new_tokens = config.advantage.overlong_tokens, config.rollout.max_new_tokens
    return [
        (
            config.objective.kl_coefficient == 0
            or config.objective.kl_as == "reward"
            or config.objective.kl_estimator != "k1",
            "objective.kl_estimator=k1 in the loss has the gradient of the log-prob alone, whatever the initial policy "
            "is: set objective.kl_estimator to k2 or k3, or objective.kl_as to reward",
        ),
        (
            overlong_tokens is None or overlong_tokens <= max_new_tokens,
            f"advantage.overlong_tokens={overlong_tokens} must be at most rollout.max_new_tokens={max_new_tokens}",
        ),
        *_clone_rules(config),
        (
            config.objective.ratio_widening >= 1
            or config.objective.band_at(0)[0] <= 1 <= config.objective.band_at(0)[1],
            f"objective.ratio_widening={config.objective.ratio_widening:g} must leave 1 in the band of the first step, "
            f"objective.ratio_low={config.objective.ratio_low:g} / it to objective.ratio_high="
            f"{config.objective.ratio_high:g} times it: raise it",
        ),
        (
            config.logprobs.importance_cap is None
            or config.logprobs.recompute
            or config.objective.context != "importance",
            f"logprobs.importance_cap={config.logprobs.importance_cap} needs logprobs.recompute=true with "
            "objective.context=importance: no pass finds the log-probs of before the update on the prompt of sampling",
        ),
    ]


def _clone_rules(config: Config) -> list[Rule]:
    """Cloning is the log-likelihood on the bare prompt and nothing else: what would weigh or credit it is refused."""
    if config.objective.surrogate != "clone":
        return []
    kl_reward = config.objective.kl_coefficient > 0 and config.objective.kl_as == "reward"
    needed = {
        f"objective.context={config.objective.context}": (config.objective.context == "replace", "replace"),
        f"objective.kl_as={config.objective.kl_as}": (not kl_reward, "loss, or objective.kl_coefficient to 0"),
        f"advantage.overlong_tokens={config.advantage.overlong_tokens}": (
            config.advantage.overlong_tokens is None,
            "null",
        ),
        f"logprobs.importance_cap={config.logprobs.importance_cap}": (config.logprobs.importance_cap is None, "null"),
        f"schedule.max_batches_per_step={config.schedule.max_batches_per_step}": (
            config.schedule.max_batches_per_step == 1,
            "1",
        ),
    }
    return [
        (holds, f"{setting} means nothing with objective.surrogate=clone, which has no credit: set it to {value}")
        for setting, (holds, value) in needed.items()
    ]


def _optimizer_rules(optimizer: OptimizerConfig) -> list[Rule]:
    return [
        (
            optimizer.warmup_steps == 0 or optimizer.warmup_share == 0,
            f"optimizer.warmup_share={optimizer.warmup_share:g} and optimizer.warmup_steps={optimizer.warmup_steps} "
            "both say how long warm-up is: set one of them to 0",
        ),
        (
            optimizer.lr_decay != "constant" or optimizer.min_lr == 0,
            f"optimizer.min_lr={optimizer.min_lr:g} is where a decay ends: set optimizer.lr_decay to linear or cosine",
        ),
        (
            optimizer.lr_decay == "constant" or optimizer.min_lr <= optimizer.lr,
            f"optimizer.min_lr={optimizer.min_lr:g} must be at most optimizer.lr={optimizer.lr:g}",
        ),
    ]


def _demonstration_rules(config: Config) -> list[Rule]:
    num_plain, group_size = config.assignment.num_plain, config.rollout.group_size
    return [
        (
            config.rollout.temperature == 1,
            f"rollout.temperature={config.rollout.temperature:g} must be 1 with data.demonstrations_field, because "
            "engines give the log-probs of a given text at temperature 1 alone",
        ),
        (
            num_plain < group_size,
            f"assignment.num_plain={num_plain} must be less than rollout.group_size={group_size}, or no demonstration "
            "is ever used: set it to 0 where nothing is to be sampled",
        ),
        (
            config.schedule.max_tokens is None,
            f"schedule.max_tokens={config.schedule.max_tokens} counts sampled tokens, and demonstrations are not "
            "sampled: end the run by schedule.max_steps or max_hours",
        ),
        (
            config.data.curriculum == "none",
            f"data.curriculum={config.data.curriculum} goes by what the policy solves, and demonstrations are not its "
            "own: set it to none",
        ),
    ]


def _task_rules(config: Config) -> list[Rule]:
    data = config.data
    hinted = {name: data.of_task(name).hints_field for name in data.train}
    shown = {name: data.of_task(name).demonstrations_field for name in data.train}
    formats = {f"data.train.{name}": task.question_format for name, task in data.train.items() if task.question_format}
    return [
        *(
            (
                SET_NAME.fullmatch(name) is not None and (name != ONLY_TASK or len(data.train) == 1),
                f"data.train.{name} must have a name of at most {MAX_NAME_CHARS} letters, digits, _ and -, other than "
                f"{ONLY_TASK}, which a single path has: it names metrics",
            )
            for name in data.train
        ),
        *(
            (
                column is None or not config.evolution.enabled,
                f"data.train.{name} has hints_field={column}, and evolution.enabled=true gives its problems templates, "
                "too: set evolution.enabled to false, or leave the hints out",
            )
            for name, column in hinted.items()
        ),
        *(
            (
                column is None
                or (not config.evolution.enabled and hinted[name] is None and config.objective.context != "distill"),
                f"data.train.{name} has demonstrations_field={column}: set evolution.enabled to false, leave hints "
                "out, and take another objective.context than distill",
            )
            for name, column in shown.items()
        ),
        *(_demonstration_rules(config) if any(shown.values()) else []),
        *(
            ("{question}" in form, f"{name}.question_format must contain {{question}}")
            for name, form in {"data": data.question_format, **formats}.items()
        ),
        *(
            (
                given.task is None or given.task in data.train,
                f"data.evaluation.{name}.task={given.task} must name a task of data.train ({', '.join(data.train)})",
            )
            for name, given in data.evaluation.items()
        ),
    ]


def _evaluation_rules(config: Config) -> list[Rule]:
    evaluation, sets = config.evaluation, config.data.evaluation
    known = ", ".join(sets) or "none"
    return [
        *(
            (
                not name.startswith("templated_"),
                f"data.evaluation.{name} must not begin with templated_: the metrics of a set asked through a template "
                "are called so, rename it",
            )
            for name in sets
        ),
        *(
            (
                SET_NAME.fullmatch(name) is not None,
                f"data.evaluation.{name} must have a name of at most {MAX_NAME_CHARS} letters, digits, _ and -: it "
                "names metrics and files",
            )
            for name in sets
        ),
        (
            evaluation.best_set is None or evaluation.best_set in sets,
            f"evaluation.best_set={evaluation.best_set} must name a set of data.evaluation ({known})",
        ),
    ]


def _run_rules(config: Config) -> list[Rule]:
    name = Path(config.run.name)
    is_below = bool(name.parts) and not name.is_absolute() and ".." not in name.parts
    schedule, optimizer = config.schedule, config.optimizer
    needs_end = optimizer.lr_decay != "constant" or optimizer.warmup_share > 0
    return [
        (is_below, f"run.name={config.run.name} must name a folder below run.directory: write it like first"),
        *(
            (
                limit is None or not needs_end,
                f"schedule.{name}={limit} leaves the number of steps open, of which optimizer.lr_decay="
                f"{optimizer.lr_decay} and optimizer.warmup_share={optimizer.warmup_share:g} are shares: set them to "
                "constant and 0, and optimizer.warmup_steps for a warm-up",
            )
            for name, limit in {"max_tokens": schedule.max_tokens, "max_hours": schedule.max_hours}.items()
        ),
    ]


def _process_rules(config: Config) -> list[Rule]:
    return [
        (
            config.evolution.templates_file is None or config.evolution.plain_rollouts is None,
            f"evolution.plain_rollouts={config.evolution.plain_rollouts} and evolution.templates_file="
            f"{config.evolution.templates_file} both take the place of a search: leave one of them out",
        ),
        (
            not config.evolution.enabled
            or config.assignment.weight == "score"
            or (config.evolution.searches and config.evolution.rules != "single_turn"),
            "assignment.weight=transfer needs trials, of which there are none without a search: leave it out",
        ),
        (
            not config.parallel.sequence or config.parallel.tensor > 1,
            "parallel.sequence=true needs parallel.tensor > 1: leave it out",
        ),
        (
            config.parallel.virtual_pipeline <= 1 or config.parallel.pipeline > 1,
            f"parallel.virtual_pipeline={config.parallel.virtual_pipeline} must be 1, or larger with "
            "parallel.pipeline > 1",
        ),
        (
            not config.evolution.searches
            or config.evolution.beside_training
            or config.evolution.round_timeout_s < config.parallel.command_timeout_s,
            f"evolution.round_timeout_s={config.evolution.round_timeout_s:g} must be less than "
            f"parallel.command_timeout_s={config.parallel.command_timeout_s:g} with evolution.beside_training=false: "
            "the other ranks wait while a round runs",
        ),
        (
            not config.evolution.searches
            or config.evolution.reflection.backend != "openai"
            or bool(config.evolution.reflection.base_url and config.evolution.reflection.model),
            "evolution.reflection.backend=openai needs evolution.reflection.base_url and .model",
        ),
        (
            not {"messages", "stream", "n"} & config.evolution.reflection.extra_body.keys(),
            "evolution.reflection.extra_body must hold none of messages, stream and n: one whole reply is read",
        ),
        (
            not config.evolution.searches
            or config.evolution.reflection.backend != "phrasebook"
            or bool(config.evolution.reflection.phrases),
            "evolution.reflection.backend=phrasebook needs evolution.reflection.phrases: a file of phrases",
        ),
    ]
