"""Thousands of answers made right or wrong by construction: none that is wrong is accepted, few that are right refused.

The truth of an answer is known from how it is made (`megatron_p2o.testing.answers.graded`), never from the grader.
"""

import os

from megatron_p2o.testing.answers.graded import generated, is_correct
from megatron_p2o.types import Problem

NUM_GOLDS = int(os.environ.get("P2O_NUM_GOLDS", "580"))
"""Gold answers: twenty of each shape; 2,320 take half a minute of processor time."""

MAX_REFUSED_SHARE = 0.01
"""Largest share of right answers that may be refused. A spelling that is not known costs a reward; a wrong answer that
is accepted teaches it."""


def test_no_wrong_answer_is_accepted_and_hardly_a_right_one_refused() -> None:
    accepted, refused = [], []
    num_right = 0
    for case in generated(seed=10, num_golds=NUM_GOLDS):
        problem = Problem(id="p", question=case.question, answer=case.gold)
        num_right += len(case.right)
        refused += [(case.shape, how, case.gold, text) for how, text in case.right if not is_correct(problem, text)]
        accepted += [(case.shape, how, case.gold, text) for how, text in case.wrong if is_correct(problem, text)]
    assert accepted == []
    assert len(refused) <= MAX_REFUSED_SHARE * num_right, refused
