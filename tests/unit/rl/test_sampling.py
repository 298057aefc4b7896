"""How a problem becomes a prompt that is sampled."""

import pytest

from megatron_p2o.interfaces import PromptTooLongError
from megatron_p2o.rl.sampling import asked
from megatron_p2o.testing.fakes import FakeRenderer, fake_problem
from megatron_p2o.types import PLAIN, Template

HINT = Template(id=1, text="§ go on", parent=0)


def test_a_template_too_long_for_a_problem_leaves_it_plain() -> None:
    problem = fake_problem(1)
    renderer = FakeRenderer(max_prompt_tokens=len(problem.question) + 3)
    assert asked(problem, PLAIN, renderer).template is PLAIN
    prompt = asked(problem, HINT, renderer)
    assert (prompt.template, prompt.is_templated) == (PLAIN, False)
    with pytest.raises(PromptTooLongError):
        asked(problem, PLAIN, FakeRenderer(max_prompt_tokens=1))
