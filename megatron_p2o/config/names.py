"""Suggests a setting for a name that is not one."""

from collections.abc import Iterator, Mapping
from typing import get_type_hints

from megatron_p2o.config.shape import is_section, section_of
from megatron_p2o.config.source import NamePath, annotation_at
from megatron_p2o.config.suggestions import nearest
from megatron_p2o.config.tree import Config

MAX_SHOWN = 3
"""Settings of one name that are offered."""

SYNONYMS: Mapping[str, str] = {
    **{"reward": "grading", "rewards": "grading", "grader": "grading", "algorithm": "advantage", "loss": "objective"},
    **{"engine": "rollout", "trainer": "schedule", "gepa": "evolution", "dataset": "data"},
    **{"learning_rate": "optimizer.lr", "max_grad_norm": "optimizer.clip_grad", "adam_eps": "optimizer.eps"},
    **{"num_generations": "rollout.group_size", "n_samples_per_prompt": "rollout.group_size"},
    **{"max_tokens": "rollout.max_new_tokens", "max_response_length": "rollout.max_new_tokens"},
    **{"max_prompt_length": "data.max_prompt_tokens", "train_batch_size": "schedule.problems_per_step"},
    **{"batch_size": "schedule.problems_per_step", "mini_batch_size": "schedule.problems_per_update"},
    **{"total_epochs": "schedule.epochs", "num_epochs": "schedule.epochs"},
    **{
        "save_interval": "schedule.save_every_steps",
        "eval_interval": "evaluation.every_steps",
        "tensor_model_parallel_size": "parallel.tensor",
    },
    **{"cliprange": "objective.clip_low and objective.clip_high"},
}
"""What other trainers call a setting, or its section."""

RENAMED: Mapping[str, str] = {
    "scoring.mismatch_alarm": "alarms.mismatch",
    "scoring.mismatch_rise_alarm": "alarms.mismatch_rise",
    "scoring.mismatch_alarm_action": "alarms.mismatch_action",
    "hard.forgotten_alarm": "alarms.forgotten",
    "grading.undecided_alarm": "alarms.undecided",
    "scoring.recompute": "logprobs.recompute",
    "scoring.importance_cap": "logprobs.importance_cap",
    "scoring": "logprobs (its alarms: alarms)",
    "evolution.evaluation_temperature": "evolution.trial_temperature",
    "evolution.reflection.task": "evolution.reflection.task_description",
    "evaluation.num_samples_of": "data.evaluation.NAME.num_samples",
    "evaluation.temperature_of": "data.evaluation.NAME.temperature",
}
"""Name in an earlier version to what to write instead."""


def suggestion(name: NamePath) -> str:
    """Return the end of "... is not a setting:".

    Looked for are names of earlier versions, settings with the like name in the same section, of the same name
    elsewhere, what others call so, and settings with a like name elsewhere; else the section's settings are listed.
    """
    renamed = [RENAMED[old] for depth in range(len(name), 0, -1) if (old := ".".join(name[:depth])) in RENAMED]
    if renamed:
        return f"write {renamed[0]}"
    known = list(all_settings())
    if ".".join(name) in known:
        section, _, leaf = ".".join(name).rpartition(".")
        return f"nest it: write `{leaf}:` indented below `{section}:`"
    *parents, leaf = next(name[:depth] for depth in range(1, len(name) + 1) if annotation_at(name[:depth]) is None)
    by_leaf: dict[str, list[str]] = {}
    for other in known:
        by_leaf.setdefault(other.rpartition(".")[2], []).append(other)
    siblings = {key: ".".join((*parents, key)) for key in _keys_of(annotation_at(tuple(parents)))}
    near = nearest(leaf, siblings)
    if near is not None:
        return f"did you mean {siblings[near]}?"
    if leaf in by_leaf or leaf in SYNONYMS:
        return f"did you mean {' or '.join(by_leaf.get(leaf, [SYNONYMS.get(leaf, '')])[:MAX_SHOWN])}?"
    near = nearest(leaf, by_leaf)
    if near is not None:
        return f"did you mean {' or '.join(by_leaf[near][:MAX_SHOWN])}?"
    return f"known here are {', '.join(siblings.values()) or 'none'}"


def _keys_of(section: object) -> list[str]:
    known = section_of(section)
    return [] if known is None else list(get_type_hints(known))


def all_settings() -> Iterator[str]:
    """Yield the dotted name of every setting and section."""
    return (".".join(path) for path in _paths(Config, ()))


def _paths(cls: type, name: NamePath) -> Iterator[NamePath]:
    for key, annotation in get_type_hints(cls).items():
        yield (*name, key)
        if is_section(annotation):
            yield from _paths(annotation, (*name, key))
