"""What a rank does once its settings are read: rank 0 conducts, the others serve its policy's calls."""

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from megatron_p2o.config.tree import Config
from megatron_p2o.data.chat import chat_renderer
from megatron_p2o.evaluation.benchmark import (
    checkpoint_subject,
    discard_responses,
    open_benchmarks,
    sample_missing,
    write_results,
)
from megatron_p2o.evaluation.protocol import template_with_text
from megatron_p2o.policy.training.ranks import MegatronPolicy, build_policy
from megatron_p2o.rewards.tasks import TaskGrader
from megatron_p2o.rl.sampling import SamplingParts
from megatron_p2o.rollout.refresh.outlet import open_outlet
from megatron_p2o.rollout.servers.remote import meet_daemons
from megatron_p2o.rollout.servers.server import EngineServer
from megatron_p2o.rollout.start import start_engines
from megatron_p2o.run.conductor import conduct
from megatron_p2o.run.inputs import Inputs
from megatron_p2o.run.parts import StartEngines
from megatron_p2o.run_folder.checkpoints import POLICY_FOLDER, undamaged
from megatron_p2o.run_folder.state import STATE_FILE, read_state
from megatron_p2o.types import Template


def run_rank(
    config: Config,
    config_path: Path,
    inputs: Inputs | None,
    servers: Mapping[str, EngineServer],
    evaluated: Path | None,
    template: str,
    *,
    restart: bool,
) -> None:
    """Train, or evaluate a checkpoint, to the end.

    Args:
        config_path: the settings' file, in the run's folder.
        inputs: of a training, on rank 0.
        servers: of `start_servers`, on rank 0; the caller stops them.
        evaluated: the checkpoint to measure; None trains.
        template: text that the evaluation asks through.
        restart: throw earlier responses of the evaluation away.
    """
    run_dir = config_path.parent
    with ExitStack() as stack:
        policy = build_policy(config)
        daemons = meet_daemons(config, config_path)
        outlet = open_outlet(config, policy.largest_weight_bytes, policy.meeting)
        if outlet is not None:
            policy.deliver_to(outlet.take)
        policy.wait_for_ranks()
        start = partial(start_engines, config, run_dir, daemons=daemons, outlet=outlet, started=servers)
        if not policy.is_conductor:
            policy.serve()
            return
        stack.callback(policy.close)
        if evaluated:
            if restart:
                discard_responses(run_dir)
            evaluate_checkpoint(config, run_dir, policy, evaluated, template_with_text(template), start, stack)
        else:
            assert inputs is not None, "the conductor is rank 0"
            conduct(config, run_dir, policy, inputs, start)


def evaluate_checkpoint(
    config: Config,
    output: Path,
    policy: MegatronPolicy,
    checkpoint: Path,
    template: Template,
    start: StartEngines,
    stack: ExitStack,
) -> None:
    """Evaluate a checkpoint of a run on every set of `data.evaluation`, asked through `template`; see `benchmark`.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ValueError: a problem file or earlier responses in `output` are not usable.
    """
    undamaged(checkpoint)
    step = read_state(checkpoint / STATE_FILE).step
    subject = checkpoint_subject(checkpoint, step, template)
    renderer = chat_renderer(config)
    benchmarks = open_benchmarks(subject, renderer, config, output, stack)
    if any(benchmark.missing for benchmark in benchmarks):
        grader = TaskGrader(config)
        stack.callback(grader.close)
        grader.check()
        engines = stack.enter_context(start(renderer.eos_token_ids))
        engines.release_memory()  # what the trainer has lent, it takes back to load and to hand over
        policy.load(checkpoint / POLICY_FOLDER)
        engines.refresh(policy.weights(), version=step)
        parts = SamplingParts(engines=engines, grader=grader, renderer=renderer, solved_at=config.hard.solved_at)
        sample_missing(benchmarks, parts, config)
    write_results(benchmarks, subject, config, output)
