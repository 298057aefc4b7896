"""One rank of a run, started by torchrun as `-m megatron_p2o.run.train CONFIG`.

Rank 0 conducts: a run (`conductor`), or an evaluation. The other ranks serve its policy's calls until it is done.
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from megatron_p2o.config.read import load_config
from megatron_p2o.config.tree import Config
from megatron_p2o.data.chat import chat_renderer
from megatron_p2o.data.tasks import column_lines
from megatron_p2o.evaluation.benchmark import (
    checkpoint_subject,
    discard_responses,
    open_benchmarks,
    sample_missing,
    write_results,
)
from megatron_p2o.evaluation.protocol import template_with_text
from megatron_p2o.machine.memory.here import with_planned_cache
from megatron_p2o.policy.training.ranks import MegatronPolicy, build_policy
from megatron_p2o.processes import end_with_parent, exit_on_signal
from megatron_p2o.rewards.tasks import TaskGrader
from megatron_p2o.rl.sampling import SamplingParts
from megatron_p2o.rollout.refresh.outlet import open_outlet
from megatron_p2o.rollout.servers.remote import meet_daemons
from megatron_p2o.rollout.start import start_engines
from megatron_p2o.run.conductor import conduct
from megatron_p2o.run.inputs import hint_lines, load_inputs, unknown_tokens
from megatron_p2o.run.parts import StartEngines
from megatron_p2o.run.ranks.rank_errors import report_error
from megatron_p2o.run_folder.checkpoints import POLICY_FOLDER, undamaged
from megatron_p2o.run_folder.state import STATE_FILE, read_state
from megatron_p2o.terminal import say, set_up_logging
from megatron_p2o.types import Template

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run this rank and return its exit status."""
    parser = argparse.ArgumentParser(prog="megatron_p2o.run.train")
    parser.add_argument("config", type=Path, help="resolved settings: runs/<name>/config.yaml")
    parser.add_argument("--evaluate", type=Path, metavar="CHECKPOINT", help="measure this checkpoint, train nothing")
    parser.add_argument("--template", default="", metavar="TEXT", help="template that the evaluation asks through")
    parser.add_argument("--restart", action="store_true", help="throw earlier responses of the evaluation away")
    parser.add_argument("--parent", type=int, metavar="PID", default=os.getppid(), help="ends with this process")
    options = parser.parse_args(arguments)
    end_with_parent(options.parent)
    signal.signal(signal.SIGTERM, exit_on_signal)
    set_up_logging()
    logging.getLogger("megatron_p2o.evolve.process.session").setLevel(logging.INFO)  # one line a round
    run_dir = options.config.parent
    sys.excepthook = partial(report_error, run_dir)
    config = load_config(options.config)
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    config = with_planned_cache(replace(config, parallel=config.parallel.for_processes(num_processes)))
    # Before the weights, which take minutes: whatever is wrong with the problems is said in the first seconds.
    inputs = load_inputs(config) if os.environ.get("RANK", "0") == "0" and not options.evaluate else None
    if inputs is not None:
        for line in [*column_lines(config.data), *hint_lines(config.data, inputs.train)]:
            say(line)
        for notice in unknown_tokens(inputs):
            logger.warning(notice)
    policy = build_policy(config)
    daemons = meet_daemons(config, options.config)
    outlet = open_outlet(config, policy.largest_weight_bytes, policy.meeting)
    if outlet is not None:
        policy.deliver_to(outlet.take)
    policy.wait_for_ranks()
    start = partial(start_engines, config, run_dir, daemons=daemons, outlet=outlet)
    if not policy.is_conductor:
        policy.serve()
        return 0
    with ExitStack() as stack:
        stack.callback(policy.close)
        if options.evaluate:
            if options.restart:
                discard_responses(run_dir)
            template = template_with_text(options.template)
            evaluate_checkpoint(config, run_dir, policy, options.evaluate, template, start, stack)
        else:
            assert inputs is not None, "the conductor is rank 0"
            conduct(config, run_dir, policy, inputs, start)
    return 0


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


if __name__ == "__main__":
    sys.exit(main())
