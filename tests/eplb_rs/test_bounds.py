"""Lower bounds: never above what a placement reaches, and near it.

Letters: L layers, E logical experts, R slots, D ranks.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import numpy.typing as npt
import pytest
from eplb_rs import Plan, Planner, Topology
from eplb_rs.loads import read_loads
from recordings import DEEPSEEK_R1


def load_named(name: str) -> npt.NDArray[np.float32]:
    if name == "DeepSeek-R1":
        return read_loads(DEEPSEEK_R1).total.astype(np.float32)
    sigma = float(name)
    rng = np.random.default_rng(0)
    return np.round(rng.lognormal(0, sigma, (58, 256)) * 1000).astype(np.float32)


@pytest.mark.parametrize("name", ["DeepSeek-R1", "1.0", "0.5"])
def test_plans_of_two_slots_a_rank_are_proved_within_a_percent(name: str) -> None:
    load = load_named(name)
    plan = Planner(Topology(1, 144, 2), policy="balanced", iterations=2000).plan(load)
    largest = plan.rank_load.max(axis=1)
    bound = plan.tight_lower_bound()
    assert (bound >= plan.lower_bound).all()
    assert (bound <= largest).all()
    assert (largest / bound - 1).mean() <= 0.01


@pytest.mark.parametrize("name", ["DeepSeek-R1", "1.0", "0.5"])
def test_plans_of_one_slot_a_rank_are_proved_best(name: str) -> None:
    plan = Planner(Topology(1, 320, 1), policy="balanced", iterations=10).plan(load_named(name))
    assert plan.gap <= 1e-6


def every_placement(
    topology: Topology, num_experts: int, num_groups: int = 1
) -> npt.NDArray[np.int64]:
    """All there are, `[P, R]`; -1 in dead slots; groups stay on their node."""
    slots = topology.slots
    gpu = np.repeat(np.arange(topology.num_gpus), slots)
    live = ~np.isin(gpu, topology.dead)
    choices = [range(num_experts) if alive else [-1] for alive in live]
    all_of_them = np.array(list(product(*choices)), dtype=np.int64)
    there = (all_of_them[:, :, None] == np.arange(num_experts)).any(axis=1).all(axis=1)
    all_of_them = all_of_them[there]
    if num_groups > 1:
        group = np.where(all_of_them >= 0, all_of_them // (num_experts // num_groups), -1)
        node = gpu // topology.gpus_per_node
        stay = np.ones(len(group), dtype=bool)
        for which in range(num_groups):
            nodes = np.stack(
                [
                    ((group == which) & (node == number)).any(axis=1)
                    for number in range(topology.num_nodes)
                ]
            )
            stay &= nodes.sum(axis=0) == 1
        all_of_them = all_of_them[stay]
    return all_of_them


def least_time(
    topology: Topology, placements: npt.NDArray[np.int64], load: npt.NDArray[np.float32]
) -> float:
    """The time of the slowest rank in the best of all placements."""
    counts = (placements[:, :, None] == np.arange(len(load))).sum(axis=1)
    of_expert = np.take_along_axis(load / counts, placements.clip(0), axis=1)
    share = np.where(placements >= 0, of_expert, 0.0)
    ends = np.cumsum(topology.slots)
    ranks = np.stack(
        [
            share[:, end - size : end].sum(axis=1)
            for end, size in zip(ends, topology.slots, strict=True)
        ],
        axis=1,
    )
    speeds = np.array(topology.speeds)
    live = ~np.isin(np.arange(topology.num_gpus), topology.dead)
    return float((ranks * (speeds[live].mean() / speeds)).max(axis=1).min())


@pytest.mark.parametrize(
    ("topology", "num_experts", "num_groups"),
    [
        (Topology(1, 3, 2), 4, 1),
        (Topology(1, 4, 2), 3, 1),
        (Topology(1, 4, 1, slots=[2, 1, 2, 2]), 4, 1),
        (Topology(1, 4, 2, dead=[2]), 4, 1),
        (Topology(1, 3, 2, speeds=[1, 2, 4]), 3, 1),
        (Topology(1, 3, 2, slots=[1, 1, 4], speeds=[3, 1, 1]), 3, 1),
        (Topology(2, 2, 2), 4, 2),
        (Topology(2, 1, 4, speeds=[1, 2]), 4, 2),
        (Topology(2, 2, 2, slots=[2, 2, 2, 1], dead=[0]), 2, 2),
    ],
    ids=str,
)
def test_no_placement_is_below_the_bounds(
    topology: Topology, num_experts: int, num_groups: int
) -> None:
    placements = every_placement(topology, num_experts, num_groups)
    planner = Planner(topology, num_groups, "balanced")
    rng = np.random.default_rng(5)
    loads = np.round(rng.lognormal(0, 1.5, (60, num_experts)) * 100).astype(np.float32)
    plan = planner.plan(loads)
    bound, tight = plan.lower_bound, plan.tight_lower_bound()
    reached = plan.rank_time.max(axis=1)
    for layer, load in enumerate(loads):
        best = least_time(topology, placements, load)
        assert bound[layer] <= tight[layer] <= best * (1 + 1e-9)
        assert reached[layer] >= best * (1 - 1e-9)


def test_slow_ranks_and_ranks_with_few_slots_raise_the_bound() -> None:
    one_slot = Topology(1, 4, 1, slots=[1, 1, 1, 37])
    plan = Planner(one_slot, policy="balanced").plan(np.ones((1, 40)))
    assert plan.lower_bound[0] > 3 * plan.rank_load.mean()
    # The fast rank has one slot: the slow one carries seven of eight experts, at a fifth of the
    # mean speed.
    narrow = Topology(1, 2, 4, slots=[1, 7], speeds=[9, 1])
    plan = Planner(narrow, policy="balanced").plan(np.ones((1, 8)))
    assert plan.lower_bound[0] == pytest.approx(35.0)
    assert plan.gap == pytest.approx(0.0, abs=1e-6)


def test_layers_without_load_have_no_bound() -> None:
    for topology in (Topology(2, 2, 2), Topology(2, 2, 2, speeds=[1, 2, 3, 4])):
        plan = Planner(topology, 2, "balanced").plan(np.zeros((2, 4)))
        assert not plan.lower_bound.any()
        assert not plan.tight_lower_bound().any()
        assert plan.gap == 0.0


def test_a_plan_that_breaks_the_rule_is_not_bound_by_it() -> None:
    load = np.array([[100.0, 100, 1, 1]])
    strict = Planner(Topology(2, 1, 2), 2, "balanced").plan(load)
    assert strict.lower_bound[0] == pytest.approx(200.0)
    apart = Plan.from_phy2log(strict.topology, [[0, 2, 1, 3]], load, num_groups=2)
    assert apart.lower_bound[0] == pytest.approx(101.0)
