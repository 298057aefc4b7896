"""Runs an answer, or the tests of one, in a process of the sandbox. Run as a file, with the standard library alone.

Its standard input begins with eight digits, the length of a JSON request, and the request. It sets its limits, writes
"ready" to the descriptor that its argument names, and closes it: from then on nothing it says is to be trusted. Then:

- "program": the answer is the main program, with the rest of standard input as its own;
- "functions": the answer is a module, whose functions are called as lines of JSON ask for;
- "tests": Python tests run, and their calls of the answer's functions are lines of JSON.

The expected values of tests are never in the process of an answer.
"""

import ast
import json
import os
import resource
import sys
import types

NAME_OF_ANSWER = "answer.py"
MAX_DETAIL_CHARACTERS = 500
SECONDS_TO_SPARE = 10


def main() -> None:
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    request = json.loads(received(0, int(received(0, 8))))
    import system_calls

    modules = {"functions": serve_functions, "program": run_program, "tests": run_tests}
    channel = open_channel() if request["mode"] != "program" else None
    set_limits(request["limits"])
    ready = int(sys.argv[1])
    if not request["has_namespaces"]:
        system_calls.end_with_parent(request["parent"])
    system_calls.restrict(may_write=request["has_namespaces"])
    os.write(ready, b"ready")
    os.close(ready)
    modules[request["mode"]](request, channel)


def received(descriptor: int, length: int) -> bytes:
    """Return exactly `length` bytes: what follows is not for us."""
    parts = []
    while length:
        part = os.read(descriptor, min(length, 1 << 16))
        if not part:
            sys.exit("the request is not complete")
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def set_limits(limits: dict) -> None:
    for name in ("AS", "FSIZE", "NOFILE", "CORE", "MEMLOCK", "MSGQUEUE"):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limits[name], limits[name]))
    # At the first a signal ends the process. Whoever ignores it is ended from outside, or by the second.
    resource.setrlimit(resource.RLIMIT_CPU, (limits["CPU"], limits["CPU"] + SECONDS_TO_SPARE))


class Channel:
    """Lines of JSON to and from the process that judges."""

    def __init__(self, reading: int, writing: int) -> None:
        from values import decoded, encoded

        self.encoded, self.decoded = encoded, decoded
        self._reading, self._writing = os.fdopen(reading, "rb"), writing

    def receive(self) -> dict:
        line = self._reading.readline()
        if not line:
            os._exit(0)
        return json.loads(line)

    def send(self, message: dict) -> None:
        line = memoryview(json.dumps(message).encode() + b"\n")
        while line:
            line = line[os.write(self._writing, line) :]


def open_channel() -> Channel:
    """Return the channel on what was standard input and output. The answer gets others, which lead nowhere."""
    channel = Channel(os.dup(0), os.dup(1))
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    return channel


def run_program(request: dict, channel: None) -> None:
    sys.argv = [NAME_OF_ANSWER]
    execute(request["code"], "__main__")


def execute(code: str, name: str) -> dict:
    """Run `code` as the module `name`; return its globals."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(code, NAME_OF_ANSWER, "exec"), module.__dict__)
    return module.__dict__


def serve_functions(request: dict, channel: Channel) -> None:
    try:
        names = execute(request["code"], "answer")
    except BaseException as error:
        channel.send({"error": told(error)})
        return
    channel.send({"functions": [name for name, value in names.items() if callable(value)]})
    while True:
        channel.send(reply_to(channel.receive(), names, channel))


def reply_to(call: dict, names: dict, channel: Channel) -> dict:
    try:
        arguments, keywords = channel.decoded(call["args"]), channel.decoded(call["kwargs"])
        return {"value": channel.encoded(function_named(call["call"], names)(*arguments, **keywords))}
    except BaseException as error:
        return {"error": told(error)}


def function_named(name: str, names: dict):
    """Return the answer's function, or the method of its class `Solution`."""
    if callable(names.get(name)):
        return names[name]
    if callable(names.get("Solution")) and hasattr(names["Solution"], name):
        return getattr(names["Solution"](), name)
    raise NameError(f"the answer has no function {name!r}")


def told(error: BaseException) -> str:
    try:
        text = f"{type(error).__name__}: {error}"
    except BaseException:
        text = type(error).__name__
    return text[:MAX_DETAIL_CHARACTERS]


class CallFailed(Exception):
    """A function of the answer raised, or gave what cannot be passed."""


def run_tests(request: dict, channel: Channel) -> None:
    """Run each test as Python; send one outcome a test, "" where it passed."""

    def caller(name: str):
        def call(*arguments, **keywords):
            request = {"call": name, "args": channel.encoded(list(arguments)), "kwargs": channel.encoded(keywords)}
            channel.send(request)
            reply = channel.receive()
            if "error" in reply:
                raise CallFailed(f"{name} failed: {reply['error']}")
            return channel.decoded(reply["value"])

        return call

    names: dict = {name: caller(name) for name in request["functions"]}
    names["__name__"] = "tests"
    for test, entry_point in request["tests"]:
        names.pop("check", None)
        outcome = outcome_of(test, names)
        if not outcome and "check" in names and entry_point:
            outcome = outcome_of(f"check({entry_point})", names, test)
        channel.send({"outcome": outcome})
    os._exit(0)


def outcome_of(test: str, names: dict, source: str | None = None) -> str:
    """Return "" for a test that passes, else what is wrong."""
    try:
        statements = ast.parse(test, "test").body
        for statement in statements:
            compared = equality_in(statement)
            if compared is not None:
                got, expected = (evaluate(side, names) for side in compared)
                if not got == expected:  # noqa: SIM201 (what a test's own classes define may differ)
                    call = ast.unparse(compared[0])
                    return f"{call}: got {shortened(got)}, expected {shortened(expected)}"[: 3 * MAX_DETAIL_CHARACTERS]
            else:
                module = ast.Module(body=[statement], type_ignores=[])
                exec(compile(module, "test", "exec"), names)
    except CallFailed as error:
        return str(error)
    except AssertionError as error:
        line = line_of(error, source or test)
        return f"{line}: {error}"[:MAX_DETAIL_CHARACTERS] if str(error) else line
    except BaseException as error:
        return f"{line_of(error, source or test)}: {told(error)}"[: 2 * MAX_DETAIL_CHARACTERS]
    return ""


def equality_in(statement: ast.stmt) -> tuple[ast.expr, ast.expr] | None:
    """Return the two sides of `assert a == b`."""
    compare = statement.test if isinstance(statement, ast.Assert) else None
    if isinstance(compare, ast.Compare) and len(compare.ops) == 1 and isinstance(compare.ops[0], ast.Eq):
        return compare.left, compare.comparators[0]
    return None


def evaluate(expression: ast.expr, names: dict):
    return eval(compile(ast.Expression(expression), "test", "eval"), names)


def line_of(error: BaseException, source: str) -> str:
    """Return the line of the test that failed."""
    number, step = None, error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == "test":
            number = step.tb_lineno
        step = step.tb_next
    lines = source.splitlines()
    return lines[number - 1].strip() if number is not None and number <= len(lines) else "the test"


def shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_DETAIL_CHARACTERS else f"{text[:MAX_DETAIL_CHARACTERS]}…"


if __name__ == "__main__":
    main()
