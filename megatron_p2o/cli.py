"""The `p2o` command."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_p2o.config import Config
from megatron_p2o.config_file import ConfigError, dump_config, load_config, missing_paths

BAD_INPUT = 2
"""Exit status when the settings or the files they name are wrong: nothing was started."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except ValueError as error:
        # ConfigError and what the readers of files raise: messages for the user, about the user's input.
        print(f"p2o: {error}", file=sys.stderr)
        return BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="p2o", description="Joint policy and prompt optimization (arXiv:2603.21877).")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train, or go on with a run that was interrupted")
    _add_config_arguments(train)
    train.add_argument("--dry-run", action="store_true", help="check settings and files, start nothing")
    train.add_argument("--print-config", action="store_true", help="print the resolved settings and end")
    train.add_argument("--num-nodes", type=int, help="nodes of the run, each with this command; srun tells by itself")
    train.add_argument("--node-rank", type=int, default=0, help="this node's place, from 0")
    train.add_argument("--head", default="", metavar="HOST:PORT", help="where node 0 can be reached by the others")
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("eval", help="measure a policy on the evaluation sets, without templates")
    evaluate.add_argument("target", type=Path, help="settings file, or a checkpoint folder of a run")
    evaluate.add_argument("--set", action="append", default=[], metavar="a.b=c", dest="overrides")
    evaluate.set_defaults(run=_evaluate)

    report = commands.add_parser("report", help="compare runs: print a table, write report.html and summary.json")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder")
    report.add_argument("--output", type=Path, metavar="FOLDER", help="default: the first run folder")
    report.set_defaults(run=_report)

    doctor = commands.add_parser("doctor", help="say what this machine offers and what is missing")
    doctor.add_argument("--strict", action="store_true", help="exit with 1 when something required is missing")
    doctor.add_argument("--gpus", type=int, default=0, metavar="N", help="require N GPUs that nobody else uses")
    doctor.add_argument(
        "--require", action="append", default=[], metavar="NAME[==VERSION]", help="require a package; repeatable"
    )
    doctor.set_defaults(run=_doctor)
    return parser


def _add_config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="settings file (YAML)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=c", dest="overrides", help="change one setting; repeatable"
    )


def _checked_config(path: Path, overrides: Sequence[str]) -> Config:
    """Return the settings, or raise `ConfigError` with everything that is wrong with them and the files they name."""
    config = load_config(path, overrides)
    missing = missing_paths(config)
    if missing:
        raise ConfigError(missing)
    return config


def _train(options: argparse.Namespace) -> int:
    if options.print_config:
        print(dump_config(load_config(options.config, options.overrides)), end="")
        return 0
    config = _checked_config(options.config, options.overrides)
    if options.dry_run:
        # Imported here: it loads Megatron, which takes seconds that no other command needs.
        from megatron_p2o.train import dry_run

        dry_run(config)
        return 0
    from megatron_p2o.launch import launch
    from megatron_p2o.nodes import nodes_from_options

    explicit = options.num_nodes is not None
    nodes = nodes_from_options(options.num_nodes, options.node_rank, options.head) if explicit else None
    return launch(config, nodes=nodes)


def _evaluate(options: argparse.Namespace) -> int:
    from megatron_p2o.launch import launch

    if options.target.is_dir():
        run_dir = options.target.resolve().parent.parent
        config = _checked_config(run_dir / "config.yaml", options.overrides)
        return launch(config, ["--evaluate", "--checkpoint", str(options.target.resolve())])
    return launch(_checked_config(options.target, options.overrides), ["--evaluate"])


def _report(options: argparse.Namespace) -> int:
    # Imported here: a run does not need the charts, and a report does not need torch.
    from megatron_p2o.metrics.report import write_report
    from megatron_p2o.metrics.summary import print_table, write_summary

    missing = [f"{run}: no such run folder" for run in options.runs if not run.is_dir()]
    if missing:
        raise ConfigError(missing)
    folder = options.output or options.runs[0]
    write_report(options.runs, folder / "report.html")
    print_table(write_summary(options.runs, folder / "summary.json"))
    print(f"{folder}/report.html and summary.json written")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from megatron_p2o.doctor import examine, print_findings

    findings = examine(options.gpus, options.require)
    print_findings(findings)
    return 1 if options.strict and any(finding.is_missing for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
