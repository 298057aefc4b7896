"""The built-in reward `python`: every form of tests, and answers that try to pass them by other means."""

from typing import Any

import pytest

from megatron_p2o.rewards.built_in.python import PythonReward
from megatron_p2o.rewards.functions import RewardSpec
from megatron_p2o.rewards.sandbox.process import Limits, SandboxFailed
from megatron_p2o.rewards.sandbox.verdict import Sandbox, check_sandbox
from megatron_p2o.testing.answers.graded import load_function
from megatron_p2o.types import Grade, Problem

SMALL = {"processor_s": 2, "memory_mib": 256, "scratch_mib": 4}


def sandbox_here() -> str:
    limits = Limits(processor_s=2, memory_mib=256, scratch_mib=4, output_bytes=1 << 16)
    try:
        check_sandbox(Sandbox(limits=limits, has_namespaces=True))
    except SandboxFailed:
        return "limits"
    return "namespaces"


HERE = sandbox_here()
"""Both are tested against everything in test_sandbox.py; what is tested here does not depend on it."""


def graded(code: str, tests: Any, entry_point: str | None = None, **arguments: Any) -> Grade:
    function = load_function(RewardSpec(function="python", arguments={"sandbox": HERE, **SMALL, **arguments}))
    columns = {"tests": tests} if entry_point is None else {"tests": tests, "entry_point": entry_point}
    problem = Problem(id="p", question="q", answer=None, columns=columns)
    return function(problem, f"I think.\n```python\n{code}\n```\nDone.", "stop")


ADD = "def add(a, b):\n    return a + b"
SUBTRACT = "def add(a, b):\n    return a - b"
ECHO_SUM = "print(sum(map(int, input().split())))"

CHECK = "def check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(0, 0) == 0, 'zero'\n"
FORMS: list[tuple[Any, str | None]] = [
    ([{"args": [2, 3], "expected": 5}, {"args": [], "kwargs": {"a": 1, "b": 1}, "expected": 2}], "add"),
    ({"inputs": [[2, 3], [1, 1]], "outputs": [5, [2]], "fn_name": "add"}, None),
    ('{"inputs": [[2, 3]], "outputs": [[5]], "fn_name": "add"}', None),
    ([{"input": "2\n3", "output": "5", "testtype": "functional"}], "add"),
    (["assert add(2, 3) == 5", "assert add(1, 1) == 2"], None),
    ("assert add(2, 3) == 5\nassert add('a', 'b') == 'ab'", None),
    (CHECK, "add"),
    ("import math\nassert math.isclose(add(0.1, 0.2), 0.3)\nassert add((1,), (2,)) == (1, 2)", None),
]


@pytest.mark.parametrize(("tests", "entry_point"), FORMS)
def test_every_form_of_tests_tells_right_from_wrong(tests: Any, entry_point: str | None) -> None:
    assert graded(ADD, tests, entry_point).reward == 1.0
    assert graded(SUBTRACT, tests, entry_point).reward == 0.0


@pytest.mark.parametrize(
    ("tests", "entry_point"),
    [
        (["assert abs(add(2, 3) - 5) < 1e-6"], None),
        ("def check(candidate):\n    assert abs(candidate(2, 3) - 5) < 1e-6", "add"),
    ],
)
def test_a_built_in_of_the_answers_own_does_not_decide_a_test(tests: Any, entry_point: str | None) -> None:
    assert graded(f"{SUBTRACT}\ndef abs(x):\n    return 0", tests, entry_point).reward == 0.0
    assert graded(f"{ADD}\ndef abs(x):\n    return 9", tests, entry_point).reward == 1.0


def test_an_answer_may_be_called_as_a_built_in() -> None:
    assert graded("def sum(a, b):\n    return a + b", ["assert sum(10, 15) == 25"]).reward == 1.0


def test_a_list_of_one_is_another_value_than_what_it_holds() -> None:
    assert graded("def f():\n    return 5", [{"args": [], "expected": [5]}], "f").reward == 0.0
    assert (
        graded("def f():\n    return 5", {"inputs": [[], []], "outputs": [[5], [5, 6]], "fn_name": "f"}).reward == 0.0
    )


def test_a_method_of_a_class_solution_is_called() -> None:
    code = "class Solution:\n    def add(self, a, b):\n        return a + b"
    assert graded(code, [{"args": [2, 3], "expected": 5}], "add").reward == 1.0


@pytest.mark.parametrize(
    "tests",
    [
        [{"input": "2 3\n", "output": "5\n"}, {"input": "-1 1", "output": "0"}],
        {"inputs": ["2 3\n", "-1 1"], "outputs": ["5\n", "0"]},
    ],
)
def test_programs_are_run_on_each_input(tests: Any) -> None:
    assert graded(ECHO_SUM, tests).reward == 1.0
    assert graded("print(5)", tests).reward == 0.0
    assert graded("print(5)", tests, is_partial=True).reward == 0.5
    assert graded(f"{ECHO_SUM}\nraise SystemExit(1)", tests).reward == 0.0


@pytest.mark.parametrize(
    ("code", "tests", "entry_point", "feedback"),
    [
        (SUBTRACT, [{"args": [2, 3], "expected": 5}], "add", "Test 1 of 1 fails: add(2, 3): got -1, expected 5"),
        (SUBTRACT, ["assert add(0, 0) == 0", "assert add(2, 3) == 5"], None, "Test 2 of 2 fails: add(2, 3): got -1, "),
        (SUBTRACT, CHECK, "add", "Test 1 of 1 fails: assert candidate(2, 3) == 5"),
        ("print(1)", [{"input": "x", "output": "2"}], None, "input 'x': got '1\\n', expected '2'"),
        ("print(1/0)", [{"input": "x", "output": "2"}], None, "status 1 (ZeroDivisionError: division by zero)"),
        ("def add(a, b): return 1 / 0", [{"args": [2, 3], "expected": 5}], "add", "ZeroDivisionError: division by"),
        ("def add(a, b): return a +", [{"args": [2, 3], "expected": 5}], "add", "does not load: SyntaxError"),
        ("x = 1", [{"args": [2, 3], "expected": 5}], "add", "the answer has no function 'add'"),
        ("x = 1", ["assert add(2, 3) == 5"], None, "NameError: name 'add' is not defined"),
        ("while True: pass", [{"input": "x", "output": "2"}], None, "it computes too long and was ended"),
        ("while True: print(1)", [{"input": "x", "output": "2"}], None, "it prints too much and was ended"),
        ("def add(a, b): return object()", [{"args": [2, 3], "expected": 5}], "add", "a object is no plain value"),
        ("\x00", [{"args": [2, 3], "expected": 5}], "add", "does not load"),
    ],
)
def test_feedback_says_what_was_wrong(code: str, tests: Any, entry_point: str | None, feedback: str) -> None:
    grade = graded(code, tests, entry_point)
    assert grade.reward == 0.0
    assert feedback in grade.feedback


CALLS = [{"args": [2, 3], "expected": 5}, {"args": [10, 20], "expected": 30}]
ASSERTS = ["assert add(2, 3) == 5", "assert add(10, 20) == 30"]
PROGRAMS = [{"input": "2 3", "output": "5"}, {"input": "10 20", "output": "30"}]

CHEATS = [
    "import os\nos._exit(0)",
    "raise SystemExit(0)",
    "import sys\nsys.exit = lambda *_: None\nprint('all tests passed')\nprint('OK')",
    # Equal to everything.
    "class Any(int):\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
    "    __hash__ = int.__hash__\ndef add(a, b): return Any()",
    "class Any:\n    def __eq__(self, other): return True\ndef add(a, b): return Any()",
    "class Any(list):\n    def __eq__(self, other): return True\ndef add(a, b): return Any()",
    "class Any(float):\n    def __sub__(self, other): return 0\n    __rsub__ = __sub__\n"
    "def add(a, b): return Any('nan')",
    # Looks for the expected values in the frames and objects of its process.
    "import gc, sys\ndef add(a, b):\n    seen = []\n    frame = sys._getframe()\n    while frame:\n"
    "        seen += list(frame.f_locals.values()); frame = frame.f_back\n"
    "    for thing in [*seen, *gc.get_objects()]:\n"
    "        if isinstance(thing, dict) and thing.get('expected') is not None: return thing['expected']\n"
    "        if isinstance(thing, str) and 'assert add' in thing and 'import' not in thing:\n"
    "            return eval(thing.split('==')[1])\n",
    # Patches the runner.
    'import json, sys\njson.dumps = lambda *a, **k: \'{"value": 6, "outcome": "", "passed": true}\'\n'
    "main = sys.modules['__main__']\nmain.told = lambda e: ''\nmain.reply_to = lambda *a: {'outcome': ''}\n"
    "def add(a, b): return 0",
    "import builtins\nbuiltins.isinstance = lambda *a: True\nbuiltins.all = lambda *a: True\ndef add(a, b): return 0",
    # Writes replies of its own to every descriptor there is.
    'import os\nfor n in range(3, 64):\n    try: os.write(n, b\'{"outcome": ""}\\n\' * 50)\n    except OSError: pass\n'
    "def add(a, b): return 0",
    "import os\nfor n in range(3, 64):\n    try: os.write(n, b'{\"value\": true}\\n' * 50)\n    except OSError: pass\n"
    "def add(a, b): return 0",
    # Leaves before the comparison.
    "import os\ndef add(a, b): os._exit(0)",
    "import atexit\natexit.register(print, 'passed')\ndef add(a, b): raise AssertionError",
    "def add(a, b): raise SystemExit",
    "def add(a, b): return NotImplemented",
    "def add(a, b):\n    while True: yield 5",
    # Reads the tests.
    "import glob\ntext = ''\nfor path in glob.glob('/tmp/**', recursive=True) + glob.glob('/p2o/*.json'):\n"
    "    text += open(path).read()\ndef add(a, b): return 5 if 'expected' in text else 0\nprint(text)",
    # Output of every kind.
    "import sys\nsys.stdout.buffer.write(bytes(range(256)))",
    "def add(a, b): return '\\ud800'\nprint(ascii('\\ud800'))",
    "def add(a, b): return 10 ** 100000",
    "def add(a, b):\n    x = []\n    for _ in range(100000): x = [x]\n    return x",
    "def add(a, b):\n    x = []\n    x.append(x)\n    return x",
    "def add(a, b): return 'x' * 10 ** 8",
    "import sys\nsys.setrecursionlimit(10**9)\ndef add(a, b): return add(a, b)",
    "def add(a, b): return float('nan')\nprint(float('nan'))",
    "def add(a, b): return {1: {2: float('inf')}, (1, 2): {1, 2}}",
]


@pytest.mark.parametrize("tests", [CALLS, ASSERTS, PROGRAMS], ids=["calls", "asserts", "programs"])
@pytest.mark.parametrize("code", CHEATS)
def test_an_answer_cannot_raise_its_own_reward(code: str, tests: list[Any]) -> None:
    assert graded(code, tests, "add" if tests is CALLS else None, is_partial=True).reward == 0.0


def test_what_an_earlier_test_did_to_its_process_does_not_help_the_next() -> None:
    code = "import os\ndef add(a, b):\n    if a == 2: return 5\n    os._exit(0)"
    assert graded(code, CALLS, "add", is_partial=True).reward == 0.5
    assert graded(code, ASSERTS, is_partial=True).reward == 0.5


def test_a_row_without_usable_tests_is_no_answer_of_zero() -> None:
    for tests, words in [
        ([], "there are no tests"),
        ("", "blank"),
        ([{"input": "x"}], "texts `input` and `output`"),
        ([{"args": [1], "expected": 1}], "a function whose name is not given"),
        ({"inputs": ["1"], "outputs": []}, "as long as each other"),
        (["this is no Python"], "no Python code"),
        (CHECK, "checks nothing"),
    ]:
        with pytest.raises(ValueError, match=words):
            graded(ADD, tests)


def test_a_response_without_a_closed_block_has_no_code() -> None:
    function = PythonReward(sandbox=HERE)
    problem = Problem(id="p", question="q", answer=None, columns={"tests": CALLS, "entry_point": "add"})
    for response in (ADD, f"```python\n{ADD}", f"<think>```python\n{ADD}\n```", f"```json\n{ADD}\n```"):
        assert function(problem, response, "stop").reason == "no code"
    thought = f"<think>\n```python\n{SUBTRACT}\n```\n</think>\n```py\n{ADD}\n```"
    assert function(problem, thought, "stop").reward == 1.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sandbox": "none"}, "sandbox='none' must be one of namespaces, limits"),
        ({"processor_s": 0}, "processor_s=0 must be a whole number of at least 1"),
        ({"memory_mib": 0.5}, "memory_mib=0.5 must be a whole number"),
        ({"memory_mib": 1}, "memory_mib=1 must be at least 64"),
        ({"tests": 3}, "unexpected keyword argument"),
    ],
)
def test_bad_settings_are_refused_at_the_start(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_function(RewardSpec(function="python", arguments={"sandbox": HERE, **arguments}))


def test_a_machine_without_bubblewrap_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match=r"bubblewrap is not installed.*apt-get install bubblewrap.*sandbox: limits"):
        load_function(RewardSpec(function="python"))
    assert load_function(RewardSpec(function="python", arguments={"sandbox": "limits"}))
