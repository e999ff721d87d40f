"""What is drawn: machines, loads, placements, problems and plans.

Letters: L layers, E logical experts, R slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

try:
    from hypothesis import strategies as st
    from hypothesis.extra import numpy as st_numpy
except ImportError as error:
    raise ImportError("eplb_rs.testing needs hypothesis: pip install 'eplb-rs[testing]'") from error

from eplb_rs._core import Topology
from eplb_rs.plan import Plan
from eplb_rs.planner import Planner, PolicyName

if TYPE_CHECKING:
    import numpy.typing as npt

    from eplb_rs._inputs import Load

__all__ = ["Problem", "loads", "placements", "plans", "problems", "topologies"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """A load and the machines to place its experts on. Every planner should solve it.

    Attributes:
        load: `[L, E]` float32.
        topology: The machines; at least E slots.
        num_groups: In how many groups the experts are; divides E.
    """

    load: Load
    topology: Topology
    num_groups: int

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.load.shape[1])

    @property
    def is_hierarchical(self) -> bool:
        """Whether groups divide over nodes, so that each can stay on one."""
        return self.num_groups % self.topology.num_nodes == 0

    @property
    def arguments(self) -> tuple[int, int, int, int]:
        """``num_replicas``, ``num_groups``, ``num_nodes`` and ``num_gpus``, as
        :func:`eplb_rs.rebalance_experts` takes them after the load."""
        topology = self.topology
        return topology.num_slots, self.num_groups, topology.num_nodes, topology.num_gpus


def topologies(
    *,
    max_nodes: int = 4,
    max_gpus_per_node: int = 4,
    max_slots_per_gpu: int = 4,
) -> st.SearchStrategy[Topology]:
    """Machines of every size up to the given ones.

    >>> from hypothesis import given
    >>> @given(topologies(max_slots_per_gpu=8))
    ... def test_slots_fill_the_gpus(topology):
    ...     assert topology.num_slots == topology.num_gpus * topology.slots_per_gpu
    >>> test_slots_fill_the_gpus()
    """
    return st.builds(
        Topology,
        st.integers(1, max_nodes),
        st.integers(1, max_gpus_per_node),
        st.integers(1, max_slots_per_gpu),
    )


@st.composite
def loads(  # noqa: D417 - hypothesis passes `draw`
    draw: st.DrawFn,
    *,
    num_layers: int | None = None,
    num_experts: int | None = None,
    max_layers: int = 4,
    max_experts: int = 24,
) -> Load:
    """Loads `[L, E]`, float32, of every kind that has been seen to break a planner.

    Even and skewed ones, small whole numbers that tie, zeros of either sign (some or all), a single
    hot expert, values so large that their sums are near the end of float32, and denormals.

    Args:
        num_layers: L; by default from 1 to ``max_layers``.
        num_experts: E; by default from 1 to ``max_experts``.
        max_layers: The most layers.
        max_experts: The most experts.

    >>> from hypothesis import given
    >>> @given(loads(num_experts=8))
    ... def test_loads_can_be_planned(load):
    ...     Planner(Topology(1, 2, 4)).plan(load)
    >>> test_loads_can_be_planned()
    """
    layers = draw(st.integers(1, max_layers)) if num_layers is None else num_layers
    experts = draw(st.integers(1, max_experts)) if num_experts is None else num_experts
    # Half the range of float32 is the most that a layer may sum to.
    largest = float(np.nextafter(np.float32(np.finfo(np.float32).max / 2 / experts), np.float32(0)))
    tiniest = float(np.finfo(np.float32).tiny)
    values = draw(
        st.sampled_from(
            [
                st.integers(0, 3).map(float),
                st.integers(0, 100_000).map(float),
                st.floats(0.0, 20.0, width=32).map(lambda power: float(np.float32(2.0**power))),
                st.sampled_from([0.0, -0.0]),
                st.one_of(st.just(0.0), st.floats(0.0, 1e6, width=32)),
                st.floats(0.0, largest, width=32),
                st.floats(0.0, tiniest, width=32, exclude_max=True),
            ]
        )
    )
    load: Load = draw(st_numpy.arrays(np.float32, (layers, experts), elements=values))
    if draw(st.booleans()):
        hot = draw(st.integers(0, experts - 1))
        load[:, hot] = draw(st.sampled_from([0.0, 1.0, 1e9, largest]))
    return load


@st.composite
def placements(
    draw: st.DrawFn, topology: Topology, *, num_experts: int, num_layers: int = 1
) -> npt.NDArray[np.int64]:
    """Placements `[L, R]` that no planner would make, but that are valid: each slot holds an
    expert, each expert has a slot.

    >>> from eplb_rs.testing import check_placement
    >>> from hypothesis import given
    >>> @given(placements(Topology(1, 2, 3), num_experts=4))
    ... def test_any_placement(phy2log):
    ...     check_placement(phy2log, num_experts=4)
    >>> test_any_placement()
    """
    spare = topology.num_slots - num_experts
    more = st.lists(st.integers(0, num_experts - 1), min_size=spare, max_size=spare)
    return np.array(
        [draw(st.permutations([*range(num_experts), *draw(more)])) for _ in range(num_layers)],
        dtype=np.int64,
    )


@st.composite
def problems(  # noqa: D417 - hypothesis passes `draw`
    draw: st.DrawFn,
    *,
    hierarchical: bool | None = None,
    machines: st.SearchStrategy[Topology] | None = None,
    max_layers: int = 4,
) -> Problem:
    """Problems that every planner should solve.

    Args:
        hierarchical: Whether groups divide over nodes; by default both.
        machines: The topologies; by default :func:`topologies`.
        max_layers: The most layers.

    >>> from eplb_rs.testing import check_groups_stay_on_nodes
    >>> from hypothesis import given
    >>> @given(problems(hierarchical=True))
    ... def test_groups_stay(problem):
    ...     nodes = problem.topology.num_nodes
    ...     plan = Planner(problem.topology, problem.num_groups, "deepseek").plan(problem.load)
    ...     check_groups_stay_on_nodes(
    ...         plan.phy2log,
    ...         num_experts=problem.num_experts,
    ...         num_groups=problem.num_groups,
    ...         num_nodes=nodes,
    ...     )
    >>> test_groups_stay()
    """
    topology = draw(topologies() if machines is None else machines)
    num_nodes = topology.num_nodes
    if hierarchical is None:
        hierarchical = num_nodes == 1 or draw(st.booleans())
    if hierarchical:
        num_experts = num_nodes * draw(st.integers(1, topology.num_slots // num_nodes))
    else:
        num_experts = draw(st.integers(1, topology.num_slots))
    groups = [
        groups
        for groups in range(1, num_experts + 1)
        if num_experts % groups == 0 and (groups % num_nodes == 0) is hierarchical
    ]
    if not groups:  # one node: everything is hierarchical
        groups = [1]
    return Problem(
        load=draw(loads(num_experts=num_experts, max_layers=max_layers)),
        topology=topology,
        num_groups=draw(st.sampled_from(groups)),
    )


@st.composite
def plans(draw: st.DrawFn, *, max_layers: int = 4) -> Plan:
    """Plans: by every policy of this package, and of arbitrary valid placements.

    >>> from hypothesis import given
    >>> @given(plans())
    ... def test_plans_come_back(plan):
    ...     assert Plan.from_json(plan.to_json()) == plan
    >>> test_plans_come_back()
    """
    problem = draw(problems(max_layers=max_layers))
    names: list[PolicyName | None] = ["balanced", "deepseek", "trivial", None]
    policy = draw(st.sampled_from(names))
    num_layers = len(problem.load)
    some = st.lists(st.integers(0, 999), min_size=num_layers, max_size=num_layers, unique=True)
    layer_ids = draw(st.none() | some)
    if policy is not None:
        planner = Planner(
            problem.topology,
            problem.num_groups,
            policy,
            # Groups that do not divide over nodes may fit on none.
            group_rule="strict" if problem.is_hierarchical else "free",
            iterations=30,
        )
        return planner.plan(problem.load, layer_ids=layer_ids)
    phy2log = draw(
        placements(problem.topology, num_experts=problem.num_experts, num_layers=num_layers)
    )
    return Plan.from_phy2log(
        problem.topology,
        phy2log,
        problem.load,
        num_groups=problem.num_groups,
        layer_ids=layer_ids,
    )
