"""Hints from the data: a problem that failed plainly is asked through the weakest of its hints that may be enough.

    plain group           hint after it
    hard                  the first; the next one where templated rollouts of the same group were hard as well
    hard, hint helped     the same
    not hard              none: the problem is asked plainly again

Hard is what `rl.hard_samples.is_hard` says. The level of a hint follows from the ledger's history of its problem alone,
so that a resumed run goes on with it. A hint is a template of its problem, with its level as id: sampling, the contexts
of the objective, the plain rollouts of its group and the ledger treat it as any template.

With hints that the initial policy or people have written this is the light form of SAGE (arXiv:2602.03143: hints only
where a group fails, of several strengths; `objective.context: sampling` trains on the hinted prompt as they do),
Scaf-GRPO (arXiv:2510.19807: tiers from abstract to concrete) and NuRL (arXiv:2509.25666: hints for problems above the
policy's reach). SAGE and Scaf-GRPO raise the level within a step, by sampling a failed group again; here the next group
of the problem has it, which costs no further rollouts. Nothing writes hints during a run.
"""

from collections.abc import Sequence

from megatron_p2o.config.tree import Config, DataConfig, HardConfig
from megatron_p2o.interfaces import TemplateLibrary
from megatron_p2o.rl.hard_samples import HardSampleLedger, LedgerEntry, is_hard
from megatron_p2o.rl.sampling import templates_of
from megatron_p2o.types import PLAIN, Problem, Template


def given_templates(
    problem: Problem, library: TemplateLibrary, ledger: HardSampleLedger, config: Config
) -> Sequence[Template]:
    """Return the template of each rollout of `problem`: its hint of the level it needs, else what `templates_of` says.

    Raises as `templates_of`.
    """
    level = min(hint_level(problem, ledger, config), len(problem.hints))
    group_size, num_plain = config.rollout.group_size, config.assignment.num_plain
    if level == 0:
        return templates_of(problem, library, group_size)
    hint = Template(id=level, text=problem.hints[level - 1], parent=None)
    return (*(hint,) * (group_size - num_plain), *(PLAIN,) * num_plain)


def hint_level(problem: Problem, ledger: HardSampleLedger, config: Config) -> int:
    """Return the level of the hint that a problem needs, 1 the weakest, whether it has one or not; 0: it needs none."""
    level = 0
    if config.data.of_task(problem.task or None).hints_field is None:
        return level
    for entry in ledger.history(problem.id):
        if entry.plain_tries + entry.templated_tries == 0:
            continue  # nothing was decided
        if not is_hard(entry, config.hard, config.rollout.group_size):
            level = 0
        elif level == 0 or not _is_helped(entry, config.hard, config.rollout.group_size):
            level = min(level, len(problem.hints)) + 1
    return level


def _is_helped(entry: LedgerEntry, hard: HardConfig, group_size: int) -> bool:
    """Whether the hint of a group solved its problem more often than a hard one is solved."""
    return entry.templated_solved * group_size > hard.max_solved * entry.templated_tries


def uses_hints(data: DataConfig) -> bool:
    """Whether problems of any task have hints that are used."""
    return any(data.of_task(name).hints_field is not None for name in data.train)
