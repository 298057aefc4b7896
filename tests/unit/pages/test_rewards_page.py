"""The examples of docs/rewards.md are what they say."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_p2o.rewards.functions import BUILT_IN, RewardSpec
from megatron_p2o.testing.answers.graded import load_function
from megatron_p2o.types import Problem

PAGE = (Path(__file__).parents[3] / "docs" / "rewards.md").read_text(encoding="utf-8")

BLOCK = re.compile(r"^(```+)(\w+)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)


def sections() -> dict[str, dict[str, str]]:
    """Return the blocks of each section by label; of several with one label the first."""
    found = {}
    for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        blocks: dict[str, str] = {}
        for _, label, text in BLOCK.findall(part):
            blocks.setdefault(label, text)
        found[part.partition("\n")[0]] = blocks
    return found


SECTIONS = sections()


def function_of(blocks: dict[str, str]) -> Any:
    settings = yaml.safe_load(blocks["yaml"])
    try:
        return load_function(RewardSpec(function=settings["function"], arguments=settings.get("arguments", {})))
    except ValueError as error:
        if "bubblewrap" in str(error) or "reasoning-gym" in str(error):
            pytest.skip(str(error))
        raise


@pytest.mark.parametrize("name", ["exact", "regex", "json_schema", "python", "reasoning_gym"])
def test_the_example_of_a_reward_tells_right_from_wrong(name: str) -> None:
    blocks = SECTIONS[name]
    row = json.loads(blocks["json"])
    problem = Problem(id="p", question=row["question"], answer=row["answer"], columns=row)
    function = function_of(blocks)
    assert function(problem, blocks["right"], "stop").reward == 1.0
    assert function(problem, blocks["wrong"], "stop").reward == 0.0


def test_the_example_of_the_judge_has_arguments_that_it_takes() -> None:
    settings = yaml.safe_load(SECTIONS["judge"]["yaml"])
    settings["arguments"]["base_url"] = "http://127.0.0.1:9/v1"
    with pytest.raises(ValueError, match=r"judge http://127.0.0.1:9/v1: "):
        load_function(RewardSpec(function="judge", arguments={**settings["arguments"], "max_retries": 0}))


def test_every_built_in_is_on_the_page() -> None:
    assert {name for name in BUILT_IN if f"| `{name}` |" not in PAGE} == set()
