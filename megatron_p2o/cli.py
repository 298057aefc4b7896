"""The `p2o` command."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_p2o import __version__
from megatron_p2o.config.names import all_settings
from megatron_p2o.config.read import ConfigError, dump_config, load_config
from megatron_p2o.config.tree import Config
from megatron_p2o.errors import expected_message
from megatron_p2o.files import limit_readers, limit_readers_as, write_whole
from megatron_p2o.processes import see_children_end
from megatron_p2o.terminal import say, set_up_logging, was_told

BAD_INPUT = 2
"""Exit status when the settings, or the files and folders they name, cannot be used."""

RUNS = Path("runs")
"""Where runs are unless `run.directory` says otherwise."""

MAX_FOUND_RUNS = 12
"""Runs that `p2o view` shows when none is named."""

INTERRUPTED = 128 + signal.SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    set_up_logging()
    see_children_end()
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what could follow on its command line
        import argcomplete

        argcomplete.autocomplete(parser)
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt as interruption:
        if not was_told(interruption):
            say("p2o: SIGINT: ended before it was done; the same command begins again", sys.stderr)
        return INTERRUPTED
    except Exception as error:
        message = expected_message(error)
        if message is None:
            raise
        say(f"p2o: {message}", sys.stderr)
        return BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="p2o", description="Joint policy and prompt optimization (arXiv:2603.21877).")
    parser.add_argument("--version", action="version", version=f"p2o {__version__}")
    parser.set_defaults(run=_next_step)
    commands = parser.add_subparsers(metavar="COMMAND")

    _add_init(commands.add_parser("init", help="write the settings of a first run"))
    _add_train(commands.add_parser("train", help="train, or go on with a run that was interrupted"))
    _add_evaluation(commands.add_parser("eval", help="measure a policy on sets of problems, without templates"))

    compare = commands.add_parser("compare", help="run arms and seeds at one budget, and compare them")
    compare.add_argument("experiment", type=Path, help="experiment file (YAML): arms, seeds, budget")
    compare.add_argument("--arm", action="append", default=[], dest="arms", help="only this arm; repeatable")
    compare.add_argument("--no-run", action="store_true", help="compare what is finished, start nothing")
    compare.add_argument("--sbatch", type=Path, metavar="SCRIPT", help="print a Slurm job for each missing run instead")
    compare.add_argument("--submit", action="store_true", help="give these jobs to Slurm")
    compare.add_argument("--allow-mixed", action="store_true", help="also runs of different programs or data")
    compare.set_defaults(run=_compare_arms)

    report = commands.add_parser("report", help="compare runs: print a table, write report.html and summary.json")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder")
    report.add_argument("--output", type=Path, metavar="FOLDER", help="default: the first run folder")
    report.set_defaults(run=_report)

    view = commands.add_parser("view", help="show runs on a local page, while they train and afterwards")
    view.add_argument(
        "runs", type=Path, nargs="*", metavar="RUN", help="run folder; default: the newest ones below runs/"
    )
    view.add_argument("--port", type=int, default=0, help="port of the loopback address; default: a free one")
    view.set_defaults(run=_view)

    _add_plan(commands.add_parser("plan", help="say what a run takes of memory and time, by simulation"))

    doctor = commands.add_parser("doctor", help="say what this machine offers and what is missing")
    doctor.add_argument("--strict", action="store_true", help="exit with 1 when the run cannot start on this machine")
    doctor.add_argument("--gpus", type=int, default=0, metavar="N", help="require N GPUs that nobody else uses")
    doctor.add_argument(
        "--require", action="append", default=[], metavar="NAME[==VERSION]", help="require a package; repeatable"
    )
    doctor.add_argument(
        "config", type=Path, nargs="?", help="settings file (YAML) of a run: what it needs is checked as well"
    )
    doctor.add_argument(
        "--plan",
        metavar="GPUSxGIB",
        help="plan memory and hours for nodes with N GPUs of M GiB (NxM, such as 8x80) instead of this machine",
    )
    _add_overrides(doctor)
    doctor.set_defaults(run=_doctor)
    return parser


def _add_init(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="", metavar="FOLDER", help="Hugging Face directory (asked for)")
    parser.add_argument("--problems", default="", metavar="FILE", help="problems to train on (asked for)")
    parser.add_argument("--heldout", default="", metavar="FILE", help="problems to measure the policy on")
    parser.add_argument(
        "--task",
        default="",
        metavar="NAME",
        help="what rewards an answer: math (default), exact, regex, json_schema, python, judge, reasoning_gym, or "
        "file.py:function",
    )
    parser.add_argument("--output", type=Path, default=Path("config.yaml"), metavar="FILE", help="default: config.yaml")
    _add_overrides(parser)
    parser.set_defaults(run=_init)


def _add_train(parser: argparse.ArgumentParser) -> None:
    _add_config_arguments(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check settings and files and print the plan, start nothing; exits with 2 when something is wrong with "
        "them, with 0 when only this machine lacks something (p2o doctor CONFIG --strict exits with 1 then)",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings and end")
    parser.add_argument("--num-nodes", type=int, help="nodes of the run, each with this command; srun tells by itself")
    parser.add_argument("--node-rank", type=int, default=0, help="this node's place, from 0")
    parser.add_argument("--head", default="", metavar="HOST:PORT", help="where node 0 can be reached by the others")
    parser.set_defaults(run=_train)


def _add_evaluation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        type=Path,
        nargs="?",
        help="settings file (its initial policy), checkpoint of a run, checkpoints/best, or Hugging Face directory",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings for a target that is a folder")
    _add_overrides(parser)
    parser.add_argument(
        "--benchmark",
        action="append",
        default=[],
        metavar="NAME[=FILE]",
        dest="benchmarks",
        help="a set of problems, or one of data.evaluation; repeatable; default: all of data.evaluation",
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: evaluations/ of the run")
    parser.add_argument(
        "--template",
        metavar="best|FILE|TEXT",
        help="ask all problems through a template: the run's best, that of a .txt or .md file, or this text",
    )
    parser.add_argument("--restart", action="store_true", help="throw away the responses in the output folder")
    parser.add_argument(
        "--compare", type=Path, nargs=2, metavar=("FIRST", "SECOND"), help="compare two output folders instead"
    )
    parser.set_defaults(run=_evaluate)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    _add_config_arguments(parser)
    parser.add_argument(
        "--gpus", required=True, metavar="GPUSxGIB", help="nodes with N GPUs of M GiB (NxM, such as 8x80)"
    )
    parser.add_argument("--problems", type=int, metavar="N", help="of an epoch; default: those of data.train")
    parser.add_argument("--prompt-tokens", type=int, metavar="N", help="length of a prompt")
    parser.add_argument("--response-tokens", type=float, metavar="N", help="median length of a response")
    parser.add_argument("--hard-share", type=float, metavar="X", help="share of an epoch's problems that are hard")
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="steps to simulate of each kind (default 4)")
    parser.add_argument(
        "--hardware", type=Path, metavar="FILE", help="speeds of GPUs, in the form of the built-in file"
    )
    parser.set_defaults(run=_plan)


def _add_config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="settings file (YAML)")
    _add_overrides(parser)


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    override: Any = parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=c", dest="overrides", help="change one setting; repeatable"
    )
    override.completer = _completed_settings


def _completed_settings(prefix: str, **context: object) -> list[str]:
    """Return the settings that begin so, for a shell."""
    return [f"{name}=" for name in all_settings() if name.startswith(prefix)]


def _next_step(options: argparse.Namespace) -> int:
    """Tell what there is to do where `p2o` is called alone."""
    say(_parser().format_help())
    drafted = Path("config.yaml")
    step = f"p2o train {drafted} --dry-run    (checks it; starts nothing)" if drafted.exists() else "p2o init"
    say(f"next: {step}")
    return 0


def _init(options: argparse.Namespace) -> int:
    # Imported here: it loads Megatron, which takes seconds.
    from megatron_p2o.run.before.first_settings import Wanted, write_first_settings

    wanted = Wanted(model=options.model, problems=options.problems, heldout=options.heldout, task=options.task)
    write_first_settings(wanted, options.overrides, options.output, input if sys.stdin.isatty() else None)
    return 0


def _checked_config(path: Path, overrides: Sequence[str]) -> Config:
    """Return the settings, or raise `ConfigError` with everything that is wrong with them and the files they name."""
    from megatron_p2o.run.inputs import lacking_files

    config = load_config(path, overrides)
    if missing := lacking_files(config):
        raise ConfigError(missing)
    return config


def _train(options: argparse.Namespace) -> int:
    if options.print_config:
        say(dump_config(load_config(options.config, options.overrides)).removesuffix("\n"))
        return 0
    if options.dry_run:
        # Imported here: it loads Megatron, which takes seconds that no other command needs.
        from megatron_p2o.run.dry_run import dry_run

        dry_run(load_config(options.config, options.overrides), options.config)
        return 0
    config = _checked_config(options.config, options.overrides)
    from megatron_p2o.evolve.reflection.probe import check_endpoint
    from megatron_p2o.machine.nodes import nodes_from_options, nodes_of_slurm

    explicit = options.num_nodes is not None
    nodes = (
        nodes_from_options(options.num_nodes, options.node_rank, options.head)
        if explicit
        else nodes_of_slurm(os.environ)
    )
    if nodes is None or nodes.is_head:
        check_endpoint(config, os.environ)
    # Imported after the probe: it loads torch, which takes seconds.
    from megatron_p2o.run.launch import launch

    return launch(config, nodes=nodes)


def _evaluate(options: argparse.Namespace) -> int:
    if (options.target is None) == (options.compare is None):
        raise ValueError("p2o eval needs either what to evaluate or --compare FIRST SECOND")
    if options.compare is not None:
        first, second = options.compare
        return _compare(first, second, options.output)
    from megatron_p2o.run.evaluation import evaluation_request, run_evaluation

    request = evaluation_request(
        options.target, options.config, options.overrides, options.benchmarks, options.output, options.template
    )
    return run_evaluation(request, options.restart)


def _compare(first: Path, second: Path, output: Path | None) -> int:
    from megatron_p2o.evaluation.comparison import compare
    from megatron_p2o.evaluation.tables import print_comparison

    comparison = compare(first, second)
    print_comparison(comparison)
    if output is not None:
        limit_readers_as(first)
        write_whole(output / "comparison.json", json.dumps(comparison, indent=1, allow_nan=False) + "\n")
    return 0


def _compare_arms(options: argparse.Namespace) -> int:
    from megatron_p2o.experiment.conduct import job_lines, run_missing, submit, write_settings
    from megatron_p2o.experiment.outcome import compare_arms
    from megatron_p2o.experiment.plan import read_experiment
    from megatron_p2o.experiment.tables import print_arms

    if options.submit and options.sbatch is None:
        raise ValueError("p2o compare --submit needs --sbatch SCRIPT, the job script of a run")
    experiment = read_experiment(options.experiment, options.arms)
    for run in experiment.runs:
        limit_readers(run.folder.parent, run.config.run.readable_by)
    write_settings(experiment)
    failed = []
    if options.sbatch is not None:
        submit(job_lines(experiment, options.sbatch), is_printed_only=not options.submit)
    elif not options.no_run:
        failed = run_missing(experiment)
    print_arms(compare_arms(experiment, allows_mixed=options.allow_mixed))
    say(f"{experiment.folder}: report.html, summary.json and comparison.json written")
    return 1 if failed else 0


def _report(options: argparse.Namespace) -> int:
    # Imported here: a run does not need the charts, and a report does not need torch.
    from megatron_p2o.report.summary import print_table, write_summary
    from megatron_p2o.view.frozen import write_report

    missing = [str(run) for run in options.runs if not run.is_dir()]
    if missing:
        raise ValueError(
            f"{', '.join(missing)}: no such run folder: the runs are below run.directory, runs/ by default"
        )
    folder = options.output or options.runs[0]
    limit_readers_as(options.runs[0])
    for sentence in write_report(options.runs, folder / "report.html"):
        say(f"p2o: {sentence}", sys.stderr)
    print_table(write_summary(options.runs, folder / "summary.json"))
    say(f"{folder}/report.html and summary.json written")
    return 0


def _view(options: argparse.Namespace) -> int:
    # Imported here: no other command needs a web server.
    from megatron_p2o.view.runs import newest_runs
    from megatron_p2o.view.server import serve_runs

    runs = options.runs
    if not runs:
        found = newest_runs(RUNS)
        runs = found[:MAX_FOUND_RUNS]
        which = f"the newest {len(runs)} of {len(found)}" if len(found) > len(runs) else "newest first"
        say(f"p2o view: {', '.join(map(str, runs))} ({which})")
    serve_runs(runs, options.port)
    return 0


def _plan(options: argparse.Namespace) -> int:
    # Imported here: it loads torch and Megatron, which take seconds.
    from megatron_p2o.data.tasks import absent_files, num_epoch_problems
    from megatron_p2o.machine.memory.here import gpus_of
    from megatron_p2o.simulation.hardware import HARDWARE_FILE
    from megatron_p2o.simulation.plan import plan_lines, planned_run

    if options.steps < 1:
        raise ValueError(f"--steps={options.steps} must be at least 1")
    config = load_config(options.config, options.overrides)
    if options.problems is None:
        absent = absent_files(config.data)
        if absent:
            raise ValueError(f"{absent[0]} is not here: say how many problems an epoch has with --problems")
        options.problems = num_epoch_problems(config.data)
    named = {"prompt_tokens", "response_tokens", "hard_share"}
    changes = {name: value for name in named if (value := getattr(options, name)) is not None}
    gpus = gpus_of(config, options.gpus, "--gpus")
    run = planned_run(config, gpus, options.problems, hardware_file=options.hardware or HARDWARE_FILE, changes=changes)
    for line in plan_lines(config, gpus, run, options.steps):
        say(line)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from megatron_p2o.machine.doctor import examine
    from megatron_p2o.machine.findings import print_findings
    from megatron_p2o.machine.memory.here import gpus_of
    from megatron_p2o.run.before.examination import examine_plan, examine_run

    if options.plan and options.config is None:
        raise ValueError("p2o doctor --plan needs a settings file, whose memory to plan")
    findings = examine(options.gpus, options.require)
    if options.config is not None:
        config = load_config(options.config, options.overrides)
        if options.plan:  # for other machines, where the files are
            findings += examine_plan(config, gpus_of(config, options.plan, "--plan"))
        else:
            findings += examine_run(config, os.environ)
    print_findings(findings)
    return 1 if options.strict and any(finding.is_missing for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
