"""Property tests for placements: strategies that draw problems, and checks of the answers.

The checks take plain arrays, tensors or nested lists, so they serve any planner, not only this
one. The strategies are `hypothesis <https://hypothesis.readthedocs.io>`_ strategies; that library
comes with ``pip install 'eplb-rs[testing]'``.

A policy of your own, held to everything a placement must be:

>>> from hypothesis import given
>>> import eplb_rs
>>> from eplb_rs import testing
>>> @given(testing.problems())
... def test_my_policy(problem):
...     testing.check_policy(eplb_rs.rebalance_experts, problem)
>>> test_my_policy()

What a broken placement is told:

>>> testing.check_placement([[0, 1, 2, 4]], num_experts=4)
Traceback (most recent call last):
    ...
AssertionError: phy2log: layer 0, slot 3 holds 4, which is no expert (0 to 3)

Letters: L layers, E logical experts, R slots, G expert groups, N nodes, D ranks (GPUs), X the most
replicas of an expert.
"""

from eplb_rs.testing.checks import (
    check_groups_stay_on_nodes,
    check_no_duplicates,
    check_placement,
    check_plan,
    check_policy,
    check_rank_load,
)
from eplb_rs.testing.strategies import Problem, loads, placements, plans, problems, topologies

__all__ = [
    "Problem",
    "check_groups_stay_on_nodes",
    "check_no_duplicates",
    "check_placement",
    "check_plan",
    "check_policy",
    "check_rank_load",
    "loads",
    "placements",
    "plans",
    "problems",
    "topologies",
]
