"""The engine process: one SGLang server. `rollout.servers.server` starts this module.

Its settings come as one line of JSON on standard input, so that the keys of the server show up neither in the process
list nor in the environment of its children:

    {"parent_pid": 1234, "scratch": "/tmp/...", "arguments": {"model_path": ..., "api_key": ..., ...}}

`scratch` is the private temporary directory of the server; `arguments` are fields of SGLang's ServerArgs. It imports
SGLang, which takes seconds, and waits for a second line before it serves. With `--check` only `arguments` are read;
what is wrong with them is printed as a JSON list, and nothing is started. Of this package only `config.suggestions`,
`files`, `records`, `rollout.buckets.weight_message` and this folder run in that process, and sglang is imported nowhere
else.
"""

import argparse
import contextlib
import importlib
import json
import logging
import multiprocessing
import os
import pkgutil
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from megatron_p2o.config.suggestions import did_you_mean

EXIT_BAD_ARGUMENT = 78
"""sysexits.h EX_CONFIG: the last line of the log names the setting."""

PRIORITY_FIELDS = (
    "enable_priority_scheduling",
    "priority_scheduling_preemption_threshold",
    "default_priority_value",
    "retraction_policy",
)
"""What an engine is given when training goes before evolution."""

NO_PRIORITIES = (
    "the installed SGLang cannot put training before evolution: install the version of requirements/, unset "
    "SGLANG_PLUGINS, or set evolution.enabled to false"
)

PARENT_POLL_S = 1.0

MAPPED_SHARED_MEMORY = re.compile(r" (\d+) +/dev/shm/")
"""Inode of a line of /proc/PID/maps. Its path may be a temporary one: semaphores are renamed once they exist."""

SHARED_MEMORY = Path("/dev/shm")

LEFT_IN_SHARED_MEMORY = re.compile(r"sglang_loads_|sgl_shm_mq_|sem\.mp-")
"""SGLang's load snapshots and message queues, and the semaphores of Python's multiprocessing."""


def main() -> None:
    settings = json.loads(sys.stdin.readline())
    if sys.argv[1:] == ["--check"]:
        print(json.dumps(argument_problems(settings["arguments"], server_fields())))
        return
    die_with_parent(settings["parent_pid"], scratch=settings["scratch"])
    arguments: Mapping[str, Any] = settings["arguments"]
    hide_in_logs([arguments["api_key"], arguments["admin_api_key"]])

    from sglang.launch_server import run_server
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.utils import kill_process_tree

    problems = argument_problems(arguments, server_fields())
    if problems:
        print("; ".join(problems), file=sys.stderr, flush=True)
        sys.exit(EXIT_BAD_ARGUMENT)
    if arguments.get("enable_priority_scheduling") and not preempts():
        print(NO_PRIORITIES, file=sys.stderr, flush=True)
        sys.exit(EXIT_BAD_ARGUMENT)
    leave_out_models(Path(arguments["model_path"]))
    if arguments.get("device") == "cpu":
        fork_children()
    importlib.import_module("sglang.srt.entrypoints.http_server")  # `run_server` would, for seconds
    if not sys.stdin.readline():  # whoever wanted the server has ended
        shutil.rmtree(settings["scratch"], ignore_errors=True)
        return
    try:
        run_server(ServerArgs(**arguments))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def preempts() -> bool:
    """Return whether SGLang has taken the plugin by which training preempts evolution; after `server_fields`."""
    try:
        from megatron_p2o.rollout.inside_sglang.preemption import is_in_place
    except (ImportError, AttributeError):  # an SGLang whose scheduler is another
        return False
    return is_in_place()


def leave_out_models(model: Path) -> None:
    """Have SGLang's processes import no model code but that of `model`: they would import all, over 240 files."""
    import sglang.srt.models

    needed = model_modules(model, [Path(folder) for folder in sglang.srt.models.__path__])
    if needed:
        names = [module.name for module in pkgutil.iter_modules(sglang.srt.models.__path__)]
        os.environ["SGLANG_DISABLED_MODEL_ARCHS"] = ",".join(name for name in names if name not in needed)


def model_modules(model: Path, folders: Collection[Path]) -> set[str]:
    """Return the modules in `folders` that define the architecture of `model`; none if it cannot be told."""
    try:
        architectures = json.loads((model / "config.json").read_text(encoding="utf-8"))["architectures"]
        classes = "|".join(re.escape(name) for name in architectures)
    except (OSError, ValueError, KeyError, TypeError):  # SGLang says what is wrong with it
        return set()
    if not classes:
        return set()
    defines = re.compile(rf"^class ({classes})\b", re.MULTILINE)
    files = (path for folder in folders for path in folder.glob("*.py"))
    return {path.stem for path in files if defines.search(path.read_text(encoding="utf-8"))}


def fork_children() -> None:
    """Have SGLang's processes forked from this one, which has imported everything, instead of spawned.

    Each spends five seconds of processor time on imports otherwise. CUDA does not survive a fork; the CPU path does.
    """
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda *args, **kwargs: None  # SGLang sets "spawn"


@dataclass(frozen=True, slots=True)
class ServerField:
    """What an argument of the server may be."""

    type: object
    choices: Collection[object] = ()
    """Empty: every value of the type."""


def server_fields() -> dict[str, ServerField]:
    """Return the arguments of the installed SGLang server by name."""
    from sglang.srt.arg_groups.arg_utils import record_fields
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    # Only the command line knows the choices that plugins and other modules have registered.
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    choices = {action.dest: list(action.choices) for action in parser._actions if action.choices}
    return {field.name: ServerField(field.type, choices.get(field.name, ())) for field in record_fields(ServerArgs)}


def argument_problems(arguments: Mapping[str, Any], fields: Mapping[str, ServerField]) -> list[str]:
    """Return a sentence for each argument that the server does not have, or whose value it does not take."""
    problems: list[str] = []
    if missing := [name for name in PRIORITY_FIELDS if name in arguments and name not in fields]:
        problems.append(f"{NO_PRIORITIES} (it has no {', '.join(missing)})")
        arguments = {name: value for name, value in arguments.items() if name not in PRIORITY_FIELDS}
    for name, value in arguments.items():
        if name in fields:
            rule = _broken_rule(value, fields[name])
            problems += [f"sglang.{name}={value} {rule}"] if rule else []
            continue
        hint = did_you_mean(name, list(fields), "sglang.")
        problems.append(f"sglang.{name} is not an argument of the installed SGLang server{hint}")
    return problems


def _broken_rule(value: object, field: ServerField) -> str | None:
    import msgspec  # SGLang's own, by which its arguments are declared

    chosen = value if isinstance(value, list) else [] if value is None else [value]
    if field.choices and not all(item in field.choices for item in chosen):
        return f"must be one of {', '.join(sorted(map(str, field.choices)))}"
    try:
        msgspec.convert(value, field.type)
    except msgspec.ValidationError as error:
        return f"has the wrong type: {error}"
    except TypeError:
        return None  # a type that msgspec does not know
    return None


def die_with_parent(parent_pid: int, scratch: str) -> None:
    """Kill this process group once `parent_pid` is no longer the parent, even if that was ended by SIGKILL.

    PR_SET_PDEATHSIG would fire when the *thread* that started this process ends: the parent could then not start
    engines from a thread that does not live as long as they do.
    """

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(PARENT_POLL_S)
        for path in shared_memory_of(os.getpid()):
            path.unlink(missing_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=watch, name="die-with-parent", daemon=True).start()


def shared_memory_of(pid: int) -> set[Path]:
    """Return the files in /dev/shm that a server and its children map and leave behind when they are killed."""
    try:
        server = psutil.Process(pid)
        processes = [server, *server.children(recursive=True)]
    except psutil.NoSuchProcess:
        return set()
    inodes: set[int] = set()
    for process in processes:
        with contextlib.suppress(OSError):  # it ended meanwhile
            maps = Path(f"/proc/{process.pid}/maps").read_text()
            inodes |= {int(inode) for inode in MAPPED_SHARED_MEMORY.findall(maps)}
    candidates = [entry for entry in os.scandir(SHARED_MEMORY) if LEFT_IN_SHARED_MEMORY.match(entry.name)]
    return {Path(entry.path) for entry in candidates if entry.inode() in inodes}


def hide_in_logs(secrets: list[str]) -> None:
    """Replace the secrets in every log message of this process: SGLang logs all of its arguments."""
    make_record = logging.getLogRecordFactory()

    def make_clean_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        for secret in secrets:
            if isinstance(record.msg, str):
                record.msg = record.msg.replace(secret, "***")
        return record

    logging.setLogRecordFactory(make_clean_record)


if __name__ == "__main__":
    main()
