"""A teacher's responses in the place of sampled ones (`data.demonstrations_field`).

They stand where rollouts through a template stand, so that ledger and metrics count them apart from plain ones. They
are graded like any other. `objective.surrogate: clone` then is rejection sampling and behavioural cloning: the
distillation from a teacher that P2O is compared with (arXiv:2603.21877, version 3). With another surrogate they are
off-policy members of their group, whose policy ratio begins at 1 as under `objective.context: replace`.

Nothing is sampled: the engines read each response on the bare prompt, so that its log-probs are the policy's own.
"""

from collections.abc import Sequence

import numpy as np

from megatron_p2o.config.tree import Config, DataConfig
from megatron_p2o.interfaces import PromptRenderer, RolloutEngines
from megatron_p2o.rl.hard_samples import HardSampleLedger
from megatron_p2o.types import PLAIN, Completion, Demonstration, Problem, Prompt, Template

DEMONSTRATED = "(a teacher's response)"
"""Text of a demonstration where a template's text is shown."""


def uses_demonstrations(data: DataConfig) -> bool:
    """Whether problems of any task have demonstrations that are used."""
    return any(data.of_task(name).demonstrations_field is not None for name in data.train)


def demonstrations_of(problem: Problem, ledger: HardSampleLedger, config: Config) -> Sequence[Template]:
    """Return a demonstration for each templated rollout of `problem`, and PLAIN for its plain ones; empty where it has
    none.

    The next group of the problem has the next ones. Each is there once at most: few of them make a smaller group.
    """
    responses, num_plain = problem.demonstrations, config.assignment.num_plain
    if not responses:
        return ()
    num_shown = min(config.rollout.group_size - num_plain, len(responses))
    first = len(ledger.history(problem.id)) * num_shown
    turns = [(first + place) % len(responses) for place in range(num_shown)]
    return (*(_demonstration(problem, turn) for turn in turns), *(PLAIN,) * num_plain)


def demonstrated(prompts: Sequence[Prompt], engines: RolloutEngines, renderer: PromptRenderer) -> list[Completion]:
    """Return the teacher's response to each prompt, all of them asked through a `Demonstration`.

    One that no engine has read counts as given up on. Raises what the engines raise.
    """
    responses = [renderer.response_ids(_response_of(prompt)) for prompt in prompts]
    return [
        Completion(
            prompt=prompt,
            token_ids=token_ids,
            logprobs=np.zeros(len(token_ids), np.float32) if logprobs is None else logprobs,
            finish_reason="abort" if logprobs is None else "stop",
            weight_versions=(),
        )
        for prompt, token_ids, logprobs in zip(prompts, responses, engines.score(prompts, responses), strict=True)
    ]


def _demonstration(problem: Problem, turn: int) -> Demonstration:
    return Demonstration(
        id=turn + 1,
        text=DEMONSTRATED,
        parent=None,
        lineage_problem_ids=frozenset({problem.id}),
        response=problem.demonstrations[turn],
    )


def _response_of(prompt: Prompt) -> str:
    assert isinstance(prompt.template, Demonstration), "asked through a demonstration"
    return prompt.template.response
