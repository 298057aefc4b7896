"""What `p2o train --dry-run` reads and prints: everything a run would read, with nothing started."""

import os

from megatron_p2o.config.read import with_template_date
from megatron_p2o.config.tree import Config
from megatron_p2o.machine.layout import layout_line, num_gpus_here, with_layout
from megatron_p2o.machine.memory.here import planned_memory
from megatron_p2o.machine.nodes import nodes_of_slurm
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
from megatron_p2o.run.inputs import load_inputs, summary_of
from megatron_p2o.run.resume.resumption import check_resume, finished
from megatron_p2o.terminal import say


def dry_run(config: Config) -> None:
    """Read everything a run would read and print what was found. Starts nothing.

    Raises:
        ValueError: a file, a row, a prompt or a setting of policy or engines is bad; the message names it.
    """
    given, nodes, problems = config.parallel, nodes_of_slurm(os.environ), list[str]()
    num_nodes = nodes.count if nodes else 1
    try:
        config = with_layout(config, num_nodes)
        say(layout_line(given, config.parallel, num_nodes, num_gpus_here()))
    except ValueError as error:
        problems.append(str(error))
    settings = policy_settings(config)
    check_weights(config, settings)
    check_values(config)
    for line in summary_of(config, load_inputs(config)):
        say(line)
    say(f"megatron: {megatron_summary(config)}")
    dated = with_template_date(config, config.run.folder / "config.yaml")
    resumed = check_resume(dated, config.run.folder)
    for change in resumed.changes if resumed else ():
        say(f"changed since the checkpoint: {change}")
    if ending := finished(dated, config.run.folder, resumed):
        say(ending)
    problems += machine_problems(config, settings, machine_capabilities())
    try:
        check_arguments(config)
    except EngineStartFailed as error:
        problems.append(str(error))
    try:
        for line in planned_memory(config):
            say(line)
    except ValueError as error:
        problems.append(str(error))
    for problem in problems:
        say(f"not on this machine: {problem}")
