"""The process of `rollout.servers.daemon`: `python -m megatron_p2o.run.node_daemon CONFIG ADDRESS`, its key on stdin.

Prints the URL it listens at as its only line.
"""

import argparse
import asyncio
import sys
from pathlib import Path

from megatron_p2o.config.read import load_config
from megatron_p2o.machine.memory.here import with_planned_cache
from megatron_p2o.processes import allow_many_files, end_with_parent
from megatron_p2o.rollout.servers.daemon import serve_node
from megatron_p2o.terminal import set_up_logging


def main() -> None:
    parser = argparse.ArgumentParser(prog="megatron_p2o.run.node_daemon")
    parser.add_argument("config", type=Path, help="resolved settings: runs/<name>/config.yaml")
    parser.add_argument("address", help="this node's own, to listen at")
    parser.add_argument("--port", type=int, default=0, help="to listen at; 0: a free one")
    parser.add_argument("--parent", type=int, metavar="PID", required=True, help="ends with this process")
    options = parser.parse_args()
    end_with_parent(options.parent)
    allow_many_files()
    set_up_logging()
    key = sys.stdin.readline().strip()
    if not key:
        sys.exit("no key on standard input")
    config = with_planned_cache(load_config(options.config))
    asyncio.run(serve_node(config, options.config.parent, key, options.address, options.port))


if __name__ == "__main__":
    main()
