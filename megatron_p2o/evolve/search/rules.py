"""The differences between the sets of rules that `evolution.rules` names."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """One set of rules. No field has a default, so a new set must decide each.

    What keeps an unusable template out (`guards`) is not among them: every set goes through it.
    """

    is_lock_step: bool
    """All lineages advance together and the budget is in the authors' unit (`core_reference`); else each on its own,
    and every rollout counts (`core_async`)."""
    reuses_scores: bool
    """Training rollouts and minibatches count as scores of a template."""
    refuses_duplicates: bool
    """A text that is a candidate already is not tried again."""
    publishes_empty: bool
    """The empty template may be among those published; else how often a group asks plainly is `assignment.num_plain`
    alone."""


RULES: Mapping[str, Rules] = {
    "asynchronous": Rules(is_lock_step=False, reuses_scores=True, refuses_duplicates=True, publishes_empty=False),
    "reference": Rules(is_lock_step=True, reuses_scores=False, refuses_duplicates=False, publishes_empty=True),
}
"""The rules, by the value of `evolution.rules`."""


def rules_named(name: str) -> Rules:
    """Return a set of rules. Raises `ValueError` when there is none of that name."""
    if name not in RULES:
        raise ValueError(f"evolution.rules={name} must be one of {', '.join(RULES)}")
    return RULES[name]
