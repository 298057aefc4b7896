"""Problems of reasoning-gym and the reward that scores them."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_p2o.config.tree import DataConfig
from megatron_p2o.data import reasoning_gym as generator
from megatron_p2o.data.problems import load_problems
from megatron_p2o.rewards.built_in.reasoning_gym import READS_ARITHMETIC, READS_LITERALS, VERSION, is_arithmetic
from megatron_p2o.rewards.functions import RewardSpec
from megatron_p2o.testing.answers.graded import load_function
from megatron_p2o.types import Grade, Problem

library = pytest.importorskip("reasoning_gym", reason="needs reasoning-gym: pip install -r requirements/dev.txt")


def problems_of(directory: Path, task: str, size: int = 3, *settings: str) -> list[Problem]:
    out = directory / f"{task}.jsonl"
    more = [part for setting in settings for part in ("--set", setting)]
    assert generator.main([task, "--size", str(size), "--seed", "7", "--out", str(out), *more]) == 0
    return load_problems(out, DataConfig(train=str(out)))


def graded(problem: Problem, answer: str | None, **arguments: Any) -> Grade:
    function = load_function(RewardSpec(function="reasoning_gym", arguments=arguments))
    return function(problem, "no tag" if answer is None else f"<answer>{answer}</answer>", "stop")


TASKS = ["chain_sum", "countdown", "spiral_matrix", "n_queens", "word_sorting", "polynomial_multiplication"]


@pytest.mark.parametrize("task", TASKS)
def test_the_librarys_own_answer_scores_one_and_another_less(task: str, tmp_path: Path) -> None:
    for problem in problems_of(tmp_path, task):
        assert problem.source == task
        assert graded(problem, problem.answer).reward == 1.0
        wrong = graded(problem, "17 34 51")
        assert wrong.reward is not None and wrong.reward < 0.1
        assert graded(problem, None).reward == 0.0


def test_a_scorer_may_give_part_of_one(tmp_path: Path) -> None:
    problem = problems_of(tmp_path, "countdown")[0]
    assert graded(problem, "1 + 1").reward == 0.05
    chain = problems_of(tmp_path, "chain_sum")[0]
    assert graded(chain, f"it is {chain.answer}").reward == pytest.approx(
        len(str(chain.answer)) / len(f"it is {chain.answer}")
    )


def test_the_same_arguments_write_the_same_file(tmp_path: Path) -> None:
    files = []
    for folder in ("a", "b"):
        problems_of(tmp_path / folder, "chain_sum", 3, "min_terms=4", "max_terms=4")
        files.append((tmp_path / folder / "chain_sum.jsonl").read_text())
    assert files[0] == files[1]
    row = json.loads(files[0].splitlines()[0])
    assert row["settings"] == {"min_terms": 4, "max_terms": 4}
    assert row["question"].count("+") + row["question"].count(" - ") == 3


def test_the_scorer_has_the_settings_that_the_problems_were_made_with(tmp_path: Path) -> None:
    sums = {settings: problems_of(tmp_path, "puzzle24", 1, *settings)[0] for settings in ((), ("max_value=6",))}
    rewards = {settings: graded(problem, "8 + 8 + 7 + 1").reward for settings, problem in sums.items()}
    assert rewards == {(): 1.0, ("max_value=6",): 0.01}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["chain_summ"], "has no dataset 'chain_summ'; it has ab, "),
        (["chain_sum", "--set", "max_terms=0"], "does not make chain_sum with {'max_terms': 0}"),
        (["chain_sum", "--set", "terms=3"], "does not make chain_sum with {'terms': 3}"),
        (["chain_sum", "--set", "max_terms"], "--set max_terms must be NAME=VALUE"),
        (["rearc"], "scores less than 1 when it is read from a file"),
    ],
)
def test_what_cannot_be_written_is_told(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generator.main([*arguments, "--size", "2", "--seed", "1", "--out", str(tmp_path / "x")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


CODE = [
    "__import__('os').system('touch /tmp/p2o_was_here')",
    "oracle_answer.split()",
    "list(entry.values())",
    "[oracle_answer]",
    "exec(chr(49))",
    "open(0)",
    "().__class__",
    "(lambda: 1)()",
    "[x for x in (1, 2)]",
    "sys._getframe()",
    "S.One",
    "preview(x)",
    "lambdify(x, x)",
    "x.subs(x, 1)",
    "1 .real",
    "f'{x}'",
    "x\uff0esubs",
    "9" * 2000,
]


@pytest.mark.parametrize(
    "task", ["string_insertion", "spiral_matrix", "binary_matrix", "n_queens", *sorted(READS_ARITHMETIC)]
)
@pytest.mark.parametrize("code", CODE)
def test_code_in_an_answer_is_not_run(task: str, code: str, tmp_path: Path) -> None:
    problem = problems_of(tmp_path, task, 1)[0]
    grade = graded(problem, code)
    assert grade.reward is not None and grade.reward <= 0.05
    if task in READS_ARITHMETIC:
        assert (grade.reward, grade.reason) == (0.0, "no arithmetic")


@pytest.mark.parametrize(
    "text", ["(3 + 4) * 5", "x**2/2 + C", "2*x*exp(x) - log(x)", "1.5*x", "5!", "sqrt(2)", "3*4\n+ 1"]
)
def test_arithmetic_is_let_pass(text: str) -> None:
    assert is_arithmetic(text)


def test_every_scorer_that_evaluates_answers_is_known() -> None:
    # Of the version that is required: which modules evaluate anything, and of those which are known not to be answers.
    from importlib.metadata import version

    assert version("reasoning-gym") == VERSION
    calls = {"eval", "exec", "parse_expr", "sympify"}
    found = set()
    root = Path(library.__path__[0])
    for file in root.rglob("*.py"):
        module = ".".join(file.relative_to(root.parent).with_suffix("").parts)
        for node in ast.walk(ast.parse(file.read_text())):
            name = getattr(node.func, "id", getattr(node.func, "attr", "")) if isinstance(node, ast.Call) else ""
            if name in calls:
                found.add(module)
    own_problems = {  # these evaluate what the library itself has generated
        "reasoning_gym.code.codeio",
        "reasoning_gym.algorithmic.number_sorting",
        "reasoning_gym.arithmetic.gsm_symbolic.generators_00_49",
        "reasoning_gym.arithmetic.gsm_symbolic.generators_50_99",
        "reasoning_gym.arithmetic.bitwise_arithmetic",
        "reasoning_gym.arithmetic.basic_arithmetic",
        "reasoning_gym.logic.propositional_logic",
    }
    arithmetic = {name for name in found if name.rpartition(".")[2] in READS_ARITHMETIC}
    assert found - own_problems == {*READS_LITERALS, *arithmetic}
    assert len(arithmetic) == len(READS_ARITHMETIC)


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.2.0")
    with pytest.raises(ValueError, match=r"needs reasoning-gym 0\.1\.25, which is 0.2.0"):
        load_function(RewardSpec(function="reasoning_gym"))


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"question": "q"}, "has no column 'metadata'"),
        ({"metadata": {}}, "does not say its dataset"),
        ({"metadata": {"source_dataset": "no_such"}}, "no_such"),
    ],
)
def test_a_row_of_another_kind_is_no_verdict(columns: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        graded(Problem(id="p", question="q", answer="1", columns=columns), "1")
