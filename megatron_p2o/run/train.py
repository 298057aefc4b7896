"""One rank of a run, started by torchrun as `-m megatron_p2o.run.train CONFIG`.

It imports little, so that rank 0 starts the engines' processes first: they import SGLang while this one reads the
problems, imports Megatron-core and builds the policy (`rank`).
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
from megatron_p2o.data.tasks import column_lines
from megatron_p2o.machine.memory.here import with_planned_cache
from megatron_p2o.policy.model.cpu_compat import without_compiler
from megatron_p2o.processes import end_with_parent, exit_on_signal
from megatron_p2o.rollout.servers.start import start_servers
from megatron_p2o.run.inputs import Inputs, lines_of_help, load_inputs, unknown_tokens
from megatron_p2o.run.ranks.rank_errors import report_error
from megatron_p2o.terminal import say, set_up_logging

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
    is_first = os.environ.get("RANK", "0") == "0"
    with ExitStack() as stack:
        # Before all that takes long: their imports take the longest.
        servers = start_servers(config, run_dir, int(os.environ.get("GROUP_WORLD_SIZE", "1"))) if is_first else {}
        for server in servers.values():
            stack.callback(server.stop)
        # Next, so that whatever is wrong with the problems is said in the first seconds.
        inputs = announced_inputs(config) if is_first and not options.evaluate else None
        if is_first:
            say(f"loading the policy from {config.model.path}")
        with without_compiler():
            from megatron_p2o.run.rank import run_rank  # Megatron-core: seconds

        run_rank(config, options.config, inputs, servers, options.evaluate, options.template, restart=options.restart)
    return 0


def announced_inputs(config: Config) -> Inputs:
    """Return the problems of a run, after saying how they are read. Raises as `load_inputs`."""
    inputs = load_inputs(config)
    for line in [*column_lines(config.data), *lines_of_help(config.data, inputs.train)]:
        say(line)
    for notice in unknown_tokens(inputs):
        logger.warning(notice)
    return inputs


if __name__ == "__main__":
    sys.exit(main())
