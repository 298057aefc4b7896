"""A reward of one's own, from the response and a column of the row: no gold answer, since many answers are right."""

from megatron_p2o.types import Grade


def palindrome(problem, response, finish_reason):
    """Return 1 for a palindrome that begins with `problem.columns["letters"]` and is longer; only letters count."""
    said = "".join(letter for letter in response.lower() if letter.isalpha())
    start = problem.columns["letters"]
    if not said.startswith(start) or len(said) == len(start):
        return Grade(reward=0.0, feedback=f"{said!r} does not go on from {start!r}.")
    if said != said[::-1]:
        return Grade(reward=0.0, feedback=f"{said!r} read backwards is {said[::-1]!r}.")
    return 1.0
