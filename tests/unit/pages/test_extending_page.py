"""The reward function that docs/extending.md shows works as the page says."""

import re
from pathlib import Path

import yaml

from megatron_p2o.config.tree import GradingConfig
from megatron_p2o.rewards.function_grader import FunctionGrader
from megatron_p2o.types import CORRECT, Grade, Problem

PAGE = Path(__file__).parents[3] / "docs" / "extending.md"


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found[1]


def test_the_palindrome_reward_of_the_page_grades_answers(tmp_path: Path) -> None:
    (tmp_path / "palindrome.py").write_text(block("python"))
    settings = yaml.safe_load(block("yaml"))["grading"]
    function = f"{tmp_path}/{settings['function']}"
    config = GradingConfig(function=function, arguments=settings["arguments"], num_workers=1, deadline_s=120)
    problem = Problem(id="p", question="q", answer=None, columns={"minimum_letters": 5})
    grader = FunctionGrader(config)
    try:
        answers = ["Never odd or even.", "abcxa", "aba"]
        grades = [grader.submit(problem, answer, "stop").result(120) for answer in answers]
    finally:
        grader.close()
    assert grades == [
        CORRECT,
        Grade(reward=0.5, feedback="50% of the letters mirror."),
        Grade(reward=0.0, feedback="It has 3 letters; 5 are needed."),
    ]
