"""The differences between the sets of rules that `evolution.rules` names."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_p2o.config.callables import CallableKind, check_call, load_callable


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
    is_single_turn: bool
    """Each hard problem has one rewrite, which is its template and no other's (`core_single`): nothing is searched."""
    publishes_empty: bool
    """The empty template may be among those published; else how often a group asks plainly is `assignment.num_plain`
    alone."""


RULES: Mapping[str, Rules] = {
    "asynchronous": Rules(
        is_lock_step=False, is_single_turn=False, reuses_scores=True, refuses_duplicates=True, publishes_empty=False
    ),
    "reference": Rules(
        is_lock_step=True, is_single_turn=False, reuses_scores=False, refuses_duplicates=False, publishes_empty=True
    ),
    "single_turn": Rules(
        is_lock_step=False, is_single_turn=True, reuses_scores=True, refuses_duplicates=False, publishes_empty=False
    ),
}
"""The rules, by the value of `evolution.rules`."""


OWN = RULES["asynchronous"]
"""What holds for rules of the user's own, whose search is a function."""

KIND = CallableKind(parameters=("round_",), other_names=tuple(RULES))
"""What `evolution.rules` may name beside ours: `async def rules(round_: Round) -> EndedBy`, which searches."""


def rules_named(name: str) -> Rules:
    """Return a set of rules. Raises `ValueError` when there is none of that name, as `own_search`."""
    if name in RULES:
        return RULES[name]
    own_search(name)
    return OWN


def own_search(name: str) -> Callable[..., Any]:
    """Return the search of rules of the user's own. Raises `ValueError` unless it is there and takes a round."""
    subject = f"evolution.rules={name}"
    found = load_callable(name, KIND, subject)
    rule = f"be an async def, callable as {KIND.signature}"
    if not inspect.iscoroutinefunction(found):
        raise ValueError(f"{subject} is no async def and must {rule}")
    check_call(found, KIND.parameters, {}, subject=subject, rule=rule)
    return found
