"""What if: a recorded trace replayed, and what each way of planning would have made of it.

Each window is met by a plan that was made before it came. It is then scored: the *balance* of a
window is the sum over layers of the mean rank load, divided by the sum over layers of the largest;
1 is perfect, and expert layers take 1 / balance of the time they would take then.

>>> import eplb_rs
>>> from eplb_rs.simulate import simulate
>>> trace = [[[10, 10, 60, 20]], [[10, 10, 50, 30]], [[20, 10, 60, 10]]]
>>> topology = eplb_rs.Topology(num_nodes=1, gpus_per_node=2, slots_per_gpu=3)
>>> result = simulate(trace, topology, policies=["trivial", "balanced"], estimator="last")
>>> for outcome in result.outcomes:
...     print(outcome.policy, outcome.shares, outcome.balance.round(2))
trivial uniform [0.83 0.67]
trivial arriving [1.   0.83]
balanced uniform [1.   0.91]
balanced arriving [1. 1.]

Letters: T windows replayed, W windows scored, S plans made, L layers, E logical experts.
"""

from eplb_rs.simulate.links import Links
from eplb_rs.simulate.outcome import Outcome, PlanSteps, Simulation
from eplb_rs.simulate.replay import simulate

__all__ = ["Links", "Outcome", "PlanSteps", "Simulation", "simulate"]
