"""What a run of some settings needs, and what of it is not here: found before anything is started.

`p2o train --dry-run` and `p2o doctor CONFIG` print the same findings, each in its way. What does not depend on
something that cannot be used is looked at all the same.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_p2o.config.read import missing_paths, with_template_date
from megatron_p2o.config.tree import Config
from megatron_p2o.data.tasks import absent_files, num_asked, num_epoch_problems
from megatron_p2o.evolve.reflection.probe import has_checkpoint, needs_endpoint, probe
from megatron_p2o.machine.findings import Finding, Findings
from megatron_p2o.machine.layout import layout_line, num_gpus_here, with_layout
from megatron_p2o.machine.memory.engine import Gpus
from megatron_p2o.machine.memory.here import num_nodes_for, planned_memory, run_gpus
from megatron_p2o.machine.nodes import Nodes, nodes_of_slurm
from megatron_p2o.machine.preflight import Pace, preflight
from megatron_p2o.metrics.sinks.registry import missing_sink_packages, own_sink_problems
from megatron_p2o.policy.model.architecture import Architecture, read_architecture
from megatron_p2o.policy.model.layer_choice import choose_layers, machine_capabilities
from megatron_p2o.policy.training.settings import (
    check_values,
    check_weights,
    machine_problems,
    megatron_summary,
    policy_settings,
)
from megatron_p2o.rollout.refresh.outlet import uses_devices
from megatron_p2o.rollout.servers.server import EngineStartFailed
from megatron_p2o.rollout.servers.server_arguments import check_arguments, does_release_memory
from megatron_p2o.run.before.pace import measured_hours, num_steps_done, pace_of, unknown_hours
from megatron_p2o.run.inputs import (
    Inputs,
    batches_of,
    load_inputs,
    missing_readers,
    planned_steps,
    summary_of,
)
from megatron_p2o.run.resume.resumption import check_resume, finished
from megatron_p2o.run_folder.place import place_problems
from megatron_p2o.simulation.plan import simulated_hours
from megatron_p2o.simulation.virtual_time import SimulationStalled

INPUTS, HOURS, SO_FAR = "inputs", "hours", "the run so far"
"""Subjects of what the run reads, how long it takes, and where it stands."""


def examine_run(config: Config, environment: Mapping[str, str]) -> list[Finding]:
    """Return everything that can be known of a run before it starts. Starts nothing, but sends one request to the
    reflection endpoint, if the run needs one.

    On the other nodes of a job the first node's work is left out: to read all weights, the endpoint, the hours.

    Args:
        environment: that of the job; it holds the endpoint's key.
    """
    found = Findings()
    is_first_node = environment.get("SLURM_NODEID", "0") == "0"
    lacking = missing_paths(config)
    found.refuse("files", [*place_problems(config.run), *lacking, *own_sink_problems(config.logging)])
    found.miss("packages", [*missing_readers(config), *missing_sink_packages(config.logging)])
    nodes = _nodes(environment, found)
    is_laid_out = False
    with found.looking_at("layout", is_of_machine=True):
        config, is_laid_out = _with_layout(config, nodes, found), True
    inputs, num_steps, architecture = None, None, None
    if Path(config.model.path).is_dir():
        architecture = _look_at_policy(config, found)
    if architecture is not None:
        _look_at_weights(config, architecture, found, reads_values=is_first_node)
        if not lacking and not missing_readers(config):  # the tokenizer reads config.json, too
            inputs, num_steps = _look_at_inputs(config, found)
    _look_at_engines(config, found)
    _look_at_transfer(config, found)
    if architecture is not None and is_laid_out:
        _look_at_memory(config, None, found)
    pace = None
    if not place_problems(config.run):
        with found.looking_at(SO_FAR):
            pace = pace_of(config.run.folder)
        needs = preflight(config, architecture, num_steps, nodes, environment, pace=pace)
        found.tell("machine", needs.lines)
        found.miss("machine", needs.problems)
    if inputs is not None:
        with found.looking_at(SO_FAR):
            found.tell(SO_FAR, _resume_lines(config))
    if inputs is not None and num_steps is not None and is_first_node:
        found.tell(HOURS, _hours(config, inputs, num_steps, pace))
    if is_first_node:
        with found.looking_at("reflection"):
            found.found += examine_endpoint(config, environment)
    return found.found


def examine_plan(config: Config, gpus: Gpus) -> list[Finding]:
    """Return whether the settings fit GPUs of other machines, and how long the run will take there. Reads the model's
    config.json and, where they are here, the training problems."""
    found = Findings()
    architecture = _look_at_policy(config, found)
    _look_at_transfer(config, found)
    if architecture is not None:
        _look_at_memory(config, gpus, found)
    absent = absent_files(config.data)
    if absent:
        hours = f"hours: unknown, {absent[0]} is not here: p2o plan simulates them with --problems N"
        found.tell(HOURS, [hours])
    elif architecture is not None:
        with found.looking_at(INPUTS):
            found.tell(HOURS, _simulated(config, gpus, num_epoch_problems(config.data)))
    return found.found


def examine_endpoint(config: Config, environment: Mapping[str, str]) -> list[Finding]:
    """Return whether the reflection endpoint answers one request; nothing when the run needs none.

    It is missing where `p2o train` would not start without it. `environment` holds its key.
    """
    if not needs_endpoint(config.evolution):
        return []
    trouble = probe(config.evolution.reflection, environment)
    if trouble is None:
        return [Finding(subject="reflection", finding=f"{config.evolution.reflection.base_url} answers")]
    is_missing = not trouble.is_passing and not has_checkpoint(config.run)
    return [Finding(subject="reflection", finding=f"evolution.reflection: {trouble.reason}", is_missing=is_missing)]


def _nodes(environment: Mapping[str, str], found: Findings) -> Nodes | None:
    with found.looking_at("nodes"):
        return nodes_of_slurm(environment)
    return None


def _with_layout(config: Config, nodes: Nodes | None, found: Findings) -> Config:
    """Return the settings with their layout: on the nodes of the launch; outside one, on as many as the run takes."""
    num_gpus = num_gpus_here()
    num_nodes = nodes.count if nodes else num_nodes_for(config, num_gpus) if num_gpus else 1
    laid_out = with_layout(config, num_nodes)
    found.tell("machine", [layout_line(config.parallel, laid_out.parallel, num_nodes, num_gpus)])
    if nodes is None and num_nodes > 1:
        command = "p2o train on each, under srun or with --num-nodes, --node-rank and --head"
        found.tell("machine", [f"nodes: the run takes {num_nodes} like this one: {command}"])
    return laid_out


def _look_at_inputs(config: Config, found: Findings) -> tuple[Inputs | None, int | None]:
    """Return the problems of the run and the number of its steps; None where they cannot be used."""
    with found.looking_at(INPUTS):
        inputs = load_inputs(config)
        with found.looking_at(INPUTS):
            found.tell(INPUTS, summary_of(config, inputs))
            return inputs, planned_steps(config.schedule, len(batches_of(config, inputs.train, epoch=0)))
        return inputs, None
    return None, None


def _look_at_policy(config: Config, found: Findings) -> Architecture | None:
    """Return the sizes of the model, where its config.json has them."""
    with found.looking_at("settings"):
        settings = policy_settings(config)
        problems = machine_problems(config, settings, machine_capabilities())
        found.miss("settings", problems)
        found.tell("megatron", [megatron_summary(config)])
        if not problems:
            choice = choose_layers(config.model.layer_backend, machine_capabilities())
            found.tell("layers, as set", [choice.layers_reason])
            found.tell("attention, as set", [choice.attention_reason])
        return settings.architecture
    try:
        return read_architecture(Path(config.model.path))
    except (ValueError, OSError):
        return None  # which is what was told


def _look_at_weights(config: Config, architecture: Architecture, found: Findings, *, reads_values: bool) -> None:
    with found.looking_at("weights"):
        check_weights(config, architecture)
        if reads_values:
            check_values(config)
        finite = ", all finite" if reads_values else ""
        found.tell("weights", [f"{config.model.path} holds those of its config.json{finite}"])


def _look_at_engines(config: Config, found: Findings) -> None:
    subject = "engines, as set"
    with found.looking_at(subject):
        try:
            check_arguments(config)
        except EngineStartFailed as error:
            found.miss(subject, [str(error)])
        else:
            found.tell(subject, [f"SGLang takes {', '.join(config.sglang) or 'no settings of its own'}"])
    with found.looking_at(subject, is_of_machine=True):
        does_release_memory(config, num_gpus_here())


def _look_at_transfer(config: Config, found: Findings) -> None:
    """Tell how the engines would get weights here, as far as one process can tell."""
    subject = "weights to engines"
    with found.looking_at(subject, is_of_machine=True):
        on_devices = "CUDA IPC" if torch.cuda.is_available() else "memory files, without CUDA"
        way = f"on the engines' own devices: {on_devices}" if uses_devices(config) else "through host memory"
        found.tell(subject, [way])


def _look_at_memory(config: Config, gpus: Gpus | None, found: Findings) -> None:
    with found.looking_at("plan", is_of_machine=True):
        found.tell("plan", planned_memory(config, gpus))


def _resume_lines(config: Config) -> list[str]:
    """Return what has changed since the run's checkpoint, and whether it is finished; empty for a fresh run."""
    dated = with_template_date(config, config.run.folder / "config.yaml")
    resumed = check_resume(dated, config.run.folder)
    changes = [f"changed since the checkpoint: {change}" for change in resumed.changes] if resumed else []
    ending = finished(dated, config.run.folder, resumed)
    return [*changes, *([ending] if ending else [])]


def _hours(config: Config, inputs: Inputs, num_steps: int, pace: Pace | None) -> list[str]:
    """Return how long the run, or the rest of it, will take: measured by itself, else simulated, else unknown."""
    if pace is not None:
        num_left = max(0, num_steps - num_steps_done(config.run.folder))
        return [measured_hours(pace, num_left)] if num_left else []
    gpus = run_gpus(config)
    if gpus is None:
        return [unknown_hours(config.schedule)]
    return _simulated(config, gpus, sum(num_asked(config.data, inputs.train).values()))


def _simulated(config: Config, gpus: Gpus, num_problems: int) -> list[str]:
    try:
        return simulated_hours(config, gpus, num_problems)
    except (ValueError, SimulationStalled) as error:
        return [f"hours: unknown, they cannot be simulated: {error}"]
