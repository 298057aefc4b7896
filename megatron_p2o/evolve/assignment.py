"""Which template each rollout of a hard problem is asked through in the next epoch."""

import random
from collections.abc import Mapping, Sequence

from megatron_p2o.config import AssignmentConfig
from megatron_p2o.types import PLAIN, Template

SMALLEST_WEIGHT = 1e-6
"""Weight of a template with mean reward 0: still possible when it is alone."""


def assign(
    problem_ids: Sequence[str],
    cover: Sequence[Template],
    solved: Mapping[int, frozenset[str]],
    group_size: int,
    config: AssignmentConfig,
    rng: random.Random,
    *,
    guard_leaks: bool,
) -> dict[str, tuple[Template, ...]]:
    """Return one template per rollout for every problem that has any; a problem left out is asked plainly.

    Templates of `cover` that solve the problem come into question, else all of `cover`; under `guard_leaks` never one
    whose lineage saw the problem's answer. Drawn with replacement, weighted by mean development reward. `solved` maps
    template ids to the problems they are known to solve: the authors know of development problems only.
    """
    assignments: dict[str, tuple[Template, ...]] = {}
    for problem_id in problem_ids:
        allowed = [z for z in cover if not (guard_leaks and problem_id in z.lineage_problem_ids)]
        solvers = [z for z in allowed if problem_id in solved[z.id]]
        if allowed:
            assignments[problem_id] = _draw(solvers or allowed, group_size, config, rng)
    return assignments


def _draw(
    templates: Sequence[Template], group_size: int, config: AssignmentConfig, rng: random.Random
) -> tuple[Template, ...]:
    weights = [template.score if template.score > 0 else SMALLEST_WEIGHT for template in templates]
    num_templated = group_size - config.num_plain
    if config.same_template_in_group:
        drawn = rng.choices(templates, weights) * num_templated
    else:
        drawn = rng.choices(templates, weights, k=num_templated)
    asked = [PLAIN if template.id == PLAIN.id else template for template in drawn]
    return (*asked, *(PLAIN,) * config.num_plain)
