"""Rules for groups of experts: strict, priced and free; what they cost and save.

Letters: L layers, E logical experts, R slots, D ranks.
"""

from __future__ import annotations

import pickle

import numpy as np
import numpy.typing as npt
import pytest
from eplb_rs import InvalidInputError, Plan, Planner, Topology
from eplb_rs.loads import read_loads
from hypothesis import given, settings
from hypothesis import strategies as st
from placements import arrivals, check
from recordings import DEEPSEEK_R1

NODES = Topology(4, 8, 9)


@pytest.fixture(scope="module")
def load() -> npt.NDArray[np.float32]:
    return read_loads(DEEPSEEK_R1).total.astype(np.float32)


def pairings(items: tuple[int, ...]) -> list[list[tuple[int, int]]]:
    if not items:
        return [[]]
    first, rest = items[0], items[1:]
    return [
        [(first, other), *more]
        for other in rest
        for more in pairings(tuple(item for item in rest if item != other))
    ]


def node_level(loads: npt.NDArray[np.float64], slots: int, ranks: int) -> float:
    """What some rank of a node carries at least: the mean, or the least largest share."""
    counts = np.ones(len(loads))
    for _ in range(slots - len(loads)):
        counts[(np.where(counts < ranks, loads / counts, 0)).argmax()] += 1
    return max(float(loads.sum()) / ranks, float((loads / counts).max()))


def test_groups_are_on_the_best_nodes_of_all_pairings(load: npt.NDArray[np.float32]) -> None:
    plan = Planner(NODES, 8, "balanced").plan(load)
    check(plan)
    assert not plan.crossing_tokens.any()
    groups = load.reshape(58, 8, 32).astype(np.float64)
    every = pairings(tuple(range(8)))
    assert len(every) == 105
    best = np.empty(58)
    for layer in range(58):
        level = {
            (a, b): node_level(np.concatenate([groups[layer, a], groups[layer, b]]), 72, 8)
            for a in range(8)
            for b in range(a + 1, 8)
        }
        best[layer] = min(max(level[pair] for pair in pairing) for pairing in every)
    np.testing.assert_allclose(plan.lower_bound, best, rtol=1e-8)
    largest = plan.rank_load.max(axis=1)
    assert (largest <= best * 1.001).all()
    assert plan.balance >= 0.7995
    assert plan.balance >= load.sum(dtype=np.float64) / 32 / best.sum() * 0.9999


def test_what_the_rule_costs_is_reported(load: npt.NDArray[np.float32]) -> None:
    plan = Planner(NODES, 8, "balanced").plan(load)
    cost = plan.group_cost
    assert cost.balance == plan.balance
    assert cost.balance_without >= 0.999
    assert cost.crossing_share == 0.0
    assert 0.4 <= cost.crossing_share_without <= 0.75


def test_crossing_tokens_are_those_served_off_the_home_of_their_group() -> None:
    topology = Topology(2, 2, 1)
    plan = Plan.from_phy2log(topology, [[0, 2, 0, 1]], [[10, 4, 7]], num_groups=1)
    assert plan.crossing_tokens[0] == 9.0  # node 0: 5 + 7, node 1: 5 + 4
    two = Topology(2, 2, 2)
    plan = Plan.from_phy2log(two, [[0, 1, 2, 3, 0, 2, 3, 1]], [[10, 4, 8, 6]], num_groups=2)
    # Both groups are as much on either node: home is the first, and half of all crosses.
    assert plan.crossing_tokens[0] == 14.0
    assert plan.crossing_share == 0.5


def objective(plan: Plan, cost: float) -> float:
    ranks = plan.topology.num_gpus - len(plan.topology.dead)
    return float((plan.rank_time.max(axis=1) + cost * plan.crossing_tokens / ranks).sum())


def test_the_higher_the_price_the_less_crosses(load: npt.NDArray[np.float32]) -> None:
    strict, free = (
        Planner(NODES, 8, "balanced", group_rule=rule).plan(load) for rule in ("strict", "free")
    )
    shares, balances = [], []
    for cost in (0.0, 0.1, 0.3, 1.0, 100.0):
        plan = Planner(NODES, 8, "balanced", group_rule="priced", crossing_cost=cost).plan(load)
        check(plan)
        assert plan.group_rule == "priced"
        assert plan.duplicates == 0
        assert objective(plan, cost) <= min(objective(strict, cost), objective(free, cost)) * 1.0001
        shares.append(plan.crossing_share)
        balances.append(plan.balance)
    assert shares == sorted(shares, reverse=True)
    assert balances == sorted(balances, reverse=True)
    assert balances[0] == pytest.approx(free.balance, abs=1e-4)
    assert shares[-1] == 0.0
    assert balances[-1] == pytest.approx(strict.balance, abs=1e-4)
    # In between, most of the balance for a part of the crossing.
    assert balances[2] >= 0.97
    assert shares[2] <= 0.5 * free.crossing_share


@settings(deadline=None)
@given(
    data=st.data(),
    nodes=st.integers(1, 3),
    gpus=st.integers(1, 4),
    groups=st.integers(1, 4),
    size=st.integers(1, 5),
    cost=st.sampled_from([0.0, 0.2, 1.0, 1e9]),
)
def test_any_machines_and_groups_have_a_priced_plan(
    data: st.DataObject, nodes: int, gpus: int, groups: int, size: int, cost: float
) -> None:
    num_gpus, experts = nodes * gpus, groups * size
    least = -(-experts // num_gpus)
    slots = data.draw(st.lists(st.integers(least, least + 3), min_size=num_gpus, max_size=num_gpus))
    speeds = data.draw(
        st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=num_gpus, max_size=num_gpus)
    )
    dead = data.draw(st.lists(st.integers(0, num_gpus - 1), max_size=1, unique=True))
    topology = Topology(nodes, gpus, 1, slots=slots, speeds=speeds)
    if num_gpus > 1 and sum(slots) - sum(slots[gpu] for gpu in dead) >= experts:
        topology = topology.with_dead(dead)
    load = [data.draw(st.lists(st.sampled_from([0, 1, 7, 90]), min_size=experts, max_size=experts))]
    planner = Planner(
        topology, groups, "balanced", group_rule="priced", crossing_cost=cost, iterations=20
    )
    plan = planner.plan(load)
    for row in plan.phy2log:
        assert set(row[row >= 0].tolist()) == set(range(experts))
    assert (plan.rank_time.max(axis=1) >= plan.lower_bound * (1 - 1e-6)).all()
    assert plan == planner.plan(load)


def test_prices_are_checked_and_kept() -> None:
    for settings_, code in (
        ({"group_rule": "priced", "crossing_cost": -1}, "out_of_range"),
        ({"group_rule": "priced", "crossing_cost": float("nan")}, "out_of_range"),
        ({"group_rule": "priced", "crossing_cost": "dear"}, "wrong_type"),
        ({"group_rule": "free", "crossing_cost": 1}, "inconsistent"),
    ):
        with pytest.raises(InvalidInputError) as caught:
            Planner(NODES, 8, "balanced", **settings_)  # type: ignore[arg-type]
        assert (caught.value.argument, caught.value.code) == ("crossing_cost", code)
    planner = Planner(NODES, 8, "balanced", group_rule="priced", crossing_cost=0.25)
    again = pickle.loads(pickle.dumps(planner))
    assert (again.group_rule, again.crossing_cost) == ("priced", 0.25)
    assert Planner(NODES, 8, "balanced").crossing_cost is None


def test_plans_keep_their_rule(load: npt.NDArray[np.float32]) -> None:
    for rule in ("strict", "priced", "free"):
        plan = Planner(NODES, 8, "balanced", group_rule=rule, iterations=5).plan(load[:2])
        assert plan.group_rule == rule
        for other in (Plan.from_json(plan.to_json()), pickle.loads(pickle.dumps(plan))):
            assert other == plan
            assert other.group_rule == rule
            assert (other.lower_bound == plan.lower_bound).all()
        assert plan.with_load(load[:2] + 1).group_rule == rule
    text = plan.to_json().replace('"group_rule": "free"', '"group_rule": "loose"')
    with pytest.raises(InvalidInputError, match="group_rule"):
        Plan.from_json(text)
    older = plan.to_json().replace('  "group_rule": "free",\n', "")
    assert Plan.from_json(older).group_rule == "free"


def test_priced_plans_keep_to_the_placement_in_force(load: npt.NDArray[np.float32]) -> None:
    load, cost = load[:12], 0.3
    planner = Planner(NODES, 8, group_rule="priced", crossing_cost=cost)
    previous = planner.plan(load)
    later = load * np.random.default_rng(1).lognormal(0, 0.1, load.shape).astype(np.float32)

    def paid(plan: Plan) -> float:
        crossing = plan.crossing_tokens.sum() / NODES.num_gpus
        return float(plan.rank_load.max(axis=1).sum() + cost * crossing)

    scratch, kept = planner.plan(later), previous.with_load(later)
    worst = paid(kept) * (1 + 1e-6)
    for most in (0, 50, 300, 1000):
        plan = planner.plan(later, previous=previous, max_moves=most)
        assert arrivals(plan, previous) <= most
        assert paid(plan) <= worst
        worst = paid(plan) * 1.002
    free = Planner(NODES, policy="balanced").plan(later, previous=previous)
    plan = planner.plan(later, previous=previous)
    check(plan)
    assert paid(plan) <= paid(scratch) * 1.001
    assert paid(plan) < paid(free)
    assert plan.crossing_share < free.crossing_share
    assert arrivals(plan, previous) < 0.7 * arrivals(scratch, previous)
