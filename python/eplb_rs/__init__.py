"""Where experts live: expert-parallel load balancing for mixture-of-experts models.

>>> import eplb_rs
>>> load = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86]]
>>> phy2log, log2phy, logcnt = eplb_rs.rebalance_experts(load, 16, 4, 2, 8)
>>> phy2log.tolist()
[[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1]]

:func:`rebalance_experts` is a drop-in for DeepSeek's EPLB. :class:`Planner` is for those who
replan in a loop; its :class:`Plan` says how good it is. :mod:`eplb_rs.loads` reads recorded
loads, :mod:`eplb_rs.testing` helps to property-test placements.
"""

from eplb_rs._core import Topology, __version__
from eplb_rs.buffers import PlanBuffers
from eplb_rs.deepseek import rebalance_experts
from eplb_rs.errors import InfeasibleError, InvalidInputError, PlanError
from eplb_rs.explanation import Explanation, explain
from eplb_rs.plan import GroupCost, Plan
from eplb_rs.planner import Milestone, Planner, Timing
from eplb_rs.transfers import TransferLimits, Transfers
from eplb_rs.worth import Worth

__all__ = [
    "Explanation",
    "GroupCost",
    "InfeasibleError",
    "InvalidInputError",
    "Milestone",
    "Plan",
    "PlanBuffers",
    "PlanError",
    "Planner",
    "Timing",
    "Topology",
    "TransferLimits",
    "Transfers",
    "Worth",
    "__version__",
    "explain",
    "rebalance_experts",
]
