"""Text of others is shown on a terminal and never obeyed by it."""

import ast
import io
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from rich.table import Table

from megatron_p2o.metrics.console import ConsoleSink
from megatron_p2o.terminal import Countdown, SafeConsole, WaitLine, listed, printable, say, size_text

ROOT = Path(__file__).parents[2]

CLIPBOARD = "\x1b]52;c;aGVsbG8=\x07"
"""OSC 52: a terminal puts "hello" into the clipboard."""

HOSTILE = f"before\x1b[2J\x1b[31m{CLIPBOARD}\x9b31m\x08\r\u202eright\u2066\ud800 after"

ESCAPED = r"before\x1b[2J\x1b[31m\x1b]52;c;aGVsbG8=\x07\x9b31m\x08\r\u202eright\u2066\ud800 after"

PRINTS_A_PROTOCOL = ("rollout/inside_sglang/launcher.py", "rollout/servers/daemon.py", "rollout/servers/relay.py")
"""Files whose prints a parent process reads, or that run among SGLang's own output in an engine's log."""


def test_every_control_character_but_tab_and_newline_is_escaped() -> None:
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        is_control = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        turns_text = unicodedata.bidirectional(character) in (
            "LRE",
            "RLE",
            "LRO",
            "RLO",
            "PDF",
            "LRI",
            "RLI",
            "FSI",
            "PDI",
        )
        is_unsafe = (is_control or turns_text) and character not in "\t\n"
        # The marks of direction are invisible letters that turn what stands beside them.
        is_unsafe |= character in "\u061c\u200e\u200f"
        assert printable(character).isascii() if is_unsafe else printable(character) == character, hex(code)


def test_what_is_shown_tells_which_characters_they_were() -> None:
    assert printable(HOSTILE) == ESCAPED
    assert printable("déjà\tvu\n日本 👩‍🔬") == "déjà\tvu\n日本 👩‍🔬"
    assert printable(printable(HOSTILE)) == ESCAPED


def test_say_prints_one_safe_line(capsys: pytest.CaptureFixture[str]) -> None:
    say(HOSTILE, sys.stderr)
    assert capsys.readouterr().err == ESCAPED + "\n"


def test_a_console_colours_its_own_text_and_shows_that_of_others() -> None:
    stream = io.StringIO()
    console = SafeConsole(file=stream, force_terminal=True, width=200, highlight=False, markup=False)
    table = Table("name")
    table.add_row(HOSTILE)
    console.print(HOSTILE, style="bold")
    console.print(table)
    written = stream.getvalue()
    assert written.count(ESCAPED) == 2
    assert "\x1b[1m" in written, "its own"
    assert not any(sequence in written for sequence in ("\x1b]", "\x1b[2J", "\x1b[31m", "\x9b", "\x07", "\u202e"))


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_progress_of_a_run_shows_what_evolution_quotes(is_terminal: bool) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal  # type: ignore[method-assign]
    sink = ConsoleSink(num_steps=2, stream=stream)
    sink.announce(f"the endpoint says {CLIPBOARD}")
    sink.close()
    assert "\x1b]" not in stream.getvalue() and "]52;c;" in stream.getvalue()


LOGGER = """
import logging, sys, threading
from megatron_p2o.terminal import set_up_logging
set_up_logging()
hostile = sys.stdin.buffer.read().decode("utf-8", "surrogatepass")
own = logging.getLogger("library")
own.addHandler(logging.StreamHandler())
own.propagate = False
own.warning("of %s", hostile)
logging.getLogger("ours").warning("of %s", hostile)
try:
    raise RuntimeError(hostile)
except RuntimeError:
    logging.getLogger("ours").exception("caught")
def fail():
    raise RuntimeError(hostile)
thread = threading.Thread(target=fail)
thread.start()
thread.join()
raise RuntimeError(hostile)
"""


def test_logs_of_every_library_and_tracebacks_are_safe() -> None:
    found = subprocess.run(
        [sys.executable, "-c", LOGGER],
        input=HOSTILE.encode("utf-8", "surrogatepass"),
        capture_output=True,
        cwd=ROOT,
        timeout=300,
        check=False,
    )
    lines = found.stderr.decode()
    assert found.returncode == 1
    assert f"of {ESCAPED}\n" in lines and f"WARNING ours: of {ESCAPED}\n" in lines
    assert lines.count(f"RuntimeError: {ESCAPED}") == 3
    assert printable(lines) == lines


def prints_in(source: str) -> list[int]:
    """Return the lines that print, or that set logging up, without `megatron_p2o.terminal`."""
    found: list[int] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            if function in ("print", "logging.basicConfig", "sys.stderr.write", "sys.stdout.write", "Console"):
                found.append(node.lineno)
    return found


def test_nothing_is_printed_past_the_terminal_module() -> None:
    assert prints_in("print(1)\nlogging.basicConfig()\nConsole(file=x)\nself.print(2)") == [1, 2, 3]
    package = ROOT / "megatron_p2o"
    allowed = {package / "terminal.py", *(package / name for name in PRINTS_A_PROTOCOL)}
    checked = [*package.rglob("*.py"), ROOT / "tools" / "prepare_data.py", ROOT / "tools" / "convert_checkpoint.py"]
    assert allowed < set(checked)
    assert {
        str(path): prints_in(path.read_text())
        for path in checked
        if path not in allowed and prints_in(path.read_text())
    } == {}


@pytest.mark.parametrize(
    ("names", "expected"), [([], "none"), (["a", "b"], "a, b"), (["a", "b", "c", "d"], "a, b and 2 more")]
)
def test_a_message_lists_the_first_names_and_counts_the_others(names: list[str], expected: str) -> None:
    assert listed(names, 2) == expected


def test_a_long_activity_tells_how_far_it_is_and_a_short_one_nothing() -> None:
    said, now = list[str](), [100.0]
    countdown = Countdown("evaluation", 96, said.append, lambda: now[0])
    for seconds, num_done in ((1, 1), (14, 5), (16, 24), (20, 30), (200, 48), (7000, 96)):
        now[0] = 100.0 + seconds
        countdown.note(num_done)
    assert said == [
        "evaluation: 24 of 96 done after 16 s, about 48 s left",
        "evaluation: 48 of 96 done after 3 min 20 s, about 3 min 20 s left",
        "evaluation: 96 of 96 done after 1 h 56 min",
    ]
    unlimited = Countdown("a round", None, said.append, lambda: now[0])
    now[0] += 11_100
    unlimited.note(7)
    assert said[-1] == "a round: 7 done after 3 h 05 min"


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_wait_is_one_line_that_changes_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    screen = Screen()
    line = WaitLine(screen)
    line.show("one of two")
    line.show("\x1b]0;title\x07 and what is longer than the screen")
    line.close()
    first, second, erased = screen.getvalue().split("\r\x1b[K")[1:]
    assert (first, second, erased) == ("one of two", "\\x1b]0;title\\x07 an", "")
    assert len(second) == 19 and "\n" not in screen.getvalue()


def test_a_wait_is_a_line_now_and_then_in_a_log() -> None:
    log, now = io.StringIO(), [0.0]
    line = WaitLine(log, lambda: now[0])
    for seconds in (1, 9, 10, 15, 19, 20, 45):
        now[0] = float(seconds)
        line.show(f"after {seconds}")
    line.close()
    assert log.getvalue() == "after 10\nafter 20\nafter 45\n"


def test_sizes_are_said_in_the_unit_that_suits_them() -> None:
    assert [size_text(size) for size in (0, 5 << 19, 1 << 30, 80 << 30)] == [
        "0.0 MiB",
        "2.5 MiB",
        "1.0 GiB",
        "80.0 GiB",
    ]
