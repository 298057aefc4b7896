"""What `p2o train --dry-run` reads and prints: everything a run would read, with nothing started."""

import os
from collections.abc import Sequence

from megatron_p2o.config.read import with_template_date
from megatron_p2o.config.tree import Config
from megatron_p2o.machine.layout import layout_line, num_gpus_here, with_layout
from megatron_p2o.machine.memory.here import planned_memory
from megatron_p2o.machine.nodes import nodes_of_slurm
from megatron_p2o.machine.preflight import preflight
from megatron_p2o.policy.model.layer_choice import machine_capabilities
from megatron_p2o.policy.training.settings import (
    check_values,
    check_weights,
    machine_problems,
    megatron_summary,
    policy_settings,
)
from megatron_p2o.rollout.servers.server import EngineStartFailed
from megatron_p2o.rollout.servers.server_arguments import check_arguments
from megatron_p2o.run.inputs import batches_of, load_inputs, planned_steps, summary_of
from megatron_p2o.run.resume.resumption import check_resume, finished
from megatron_p2o.terminal import say


def dry_run(config: Config) -> None:
    """Read everything a run would read and print what was found. Starts nothing.

    Raises:
        ValueError: a file, a row, a prompt or a setting of policy or engines is bad; the message names it.
    """
    given, nodes, problems = config.parallel, nodes_of_slurm(os.environ), list[str]()
    num_nodes = nodes.count if nodes else 1
    machine: list[str] = []
    try:
        config = with_layout(config, num_nodes)
        machine.append(layout_line(given, config.parallel, num_nodes, num_gpus_here()))
    except ValueError as error:
        problems.append(str(error))
    settings = policy_settings(config)
    check_weights(config, settings)
    check_values(config)
    inputs = load_inputs(config)
    summary = summary_of(config, inputs)
    num_steps = planned_steps(config.schedule, len(batches_of(config, inputs.train, epoch=0)))
    machine.append(f"megatron: {megatron_summary(config)}")
    found = preflight(config, settings.architecture, num_steps, nodes, os.environ)
    problems += [*machine_problems(config, settings, machine_capabilities()), *_engine_problems(config)]
    try:
        machine += planned_memory(config)
    except ValueError as error:
        problems.append(str(error))
    problems += found.problems
    say_part("problems and plan", summary)
    say_part("machine", [*machine, *found.lines])
    if resume := _resume_lines(config):
        say_part("the run so far", resume)
    for problem in problems:
        say(f"not on this machine: {problem}")
    if not problems:
        say("nothing is missing: the run can start")


def _engine_problems(config: Config) -> list[str]:
    try:
        check_arguments(config)
    except EngineStartFailed as error:
        return [str(error)]
    return []


def _resume_lines(config: Config) -> list[str]:
    """Return what has changed since the run's checkpoint, and whether it is finished; empty for a fresh run."""
    dated = with_template_date(config, config.run.folder / "config.yaml")
    resumed = check_resume(dated, config.run.folder)
    changes = [f"changed since the checkpoint: {change}" for change in resumed.changes] if resumed else []
    ending = finished(dated, config.run.folder, resumed)
    return [*changes, *([ending] if ending else [])]


MAX_SUBJECT_CHARACTERS = 30
"""Longest beginning of a line that stands in a column of its own."""


def say_part(title: str, lines: Sequence[str]) -> None:
    """Print lines under a title, in two columns: what a line says before its first colon, and the rest."""
    say(f"{title}:")
    pairs = [line.partition(": ") for line in lines]
    subjects = [head for head, colon, _ in pairs if colon and len(head) <= MAX_SUBJECT_CHARACTERS]
    width = max(map(len, subjects), default=0)
    for line, (head, colon, rest) in zip(lines, pairs, strict=True):
        is_pair = colon and len(head) <= MAX_SUBJECT_CHARACTERS
        say(f"  {head:<{width}}  {rest}" if is_pair else f"  {line}")
