"""A reward with partial credit: the share of the steps that are right, before the first that is not."""

import re


def share_of_steps(problem, response, finish_reason):
    """Return the share of `problem.columns["steps"]` with which the response begins."""
    said = [part.split() for part in re.sub(r"\\boxed\{|\}", " ", response).split(",")]
    expected = [step.split() for step in problem.columns["steps"]]
    num_right = 0
    while num_right < len(expected) and said[num_right : num_right + 1] == [expected[num_right]]:
        num_right += 1
    return num_right / len(expected)
