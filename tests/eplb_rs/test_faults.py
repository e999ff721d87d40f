"""Ranks that die and ranks that join."""

from __future__ import annotations

import numpy as np
import pytest
from eplb_rs import InfeasibleError, Plan, Planner, Topology
from eplb_rs.testing import check_plan
from placements import arrivals, check

LOAD = np.round(np.random.default_rng(0).lognormal(0, 1, (8, 256)) * 1000)
ALL = Topology(4, 8, 9)


@pytest.fixture(scope="module")
def previous() -> Plan:
    return Planner(ALL, policy="balanced").plan(LOAD)


def orphans(previous: Plan, topology: Topology) -> int:
    """How many experts have no replica left."""
    alive = np.ones((32, 9), dtype=bool)
    alive[topology.dead] = False
    rows = previous.phy2log[:, alive.ravel()]
    return sum(256 - len(set(row.tolist())) for row in rows)


@pytest.mark.parametrize("dead", [[0], [17], [31]])
def test_a_rank_dies(previous: Plan, dead: list[int]) -> None:
    topology = ALL.with_dead(dead)
    planner = Planner(topology, policy="balanced")
    for repeats in (True, False):
        least = planner.plan(LOAD, previous=previous, max_moves=0, repeats=repeats)
        assert arrivals(least, previous) == orphans(previous, topology)
    check(least)
    scratch = planner.plan(LOAD)
    plan = planner.plan(LOAD, previous=previous)
    check(plan)
    assert plan.balance >= 0.99 * scratch.balance
    # About as even as a plan from scratch, for about half of the moves.
    enough = planner.plan(LOAD, previous=previous, min_balance=0.99 * scratch.balance)
    assert enough.balance >= 0.99 * scratch.balance - 1e-6
    assert arrivals(enough, previous) <= 8 * 40


@pytest.mark.parametrize("dead", range(32))
def test_any_rank_may_die(previous: Plan, dead: int) -> None:
    topology = ALL.with_dead([dead])
    planner = Planner(topology)
    scratch = planner.plan(LOAD).balance
    least = orphans(previous, topology)
    for limits, most, wanted in (
        ({"max_moves": 0}, least, 0.82),
        ({"max_moves": least * 11 // 10}, least * 11 // 10, 0.85),
        ({"min_balance": 0.99 * scratch}, 7 * least, 0.99 * scratch - 1e-6),
        ({}, 12 * least, scratch / 1.0011),
    ):
        plan = planner.plan(LOAD, previous=previous, **limits)  # type: ignore[arg-type]
        assert arrivals(plan, previous) <= most
        assert plan.balance >= wanted
        assert set(range(256)) == set(plan.phy2log[0].tolist()) - {-1}


def test_a_node_of_two_dies() -> None:
    topology = Topology(16, 2, 9)
    previous = Planner(topology, policy="balanced").plan(LOAD)
    planner = Planner(topology.with_dead([6, 7]), policy="balanced")
    scratch = planner.plan(LOAD)
    least = planner.plan(LOAD, previous=previous, max_moves=0)
    assert arrivals(least, previous) == orphans(previous, planner.topology)
    enough = planner.plan(LOAD, previous=previous, min_balance=0.99 * scratch.balance)
    assert enough.balance >= 0.99 * scratch.balance - 1e-6
    assert arrivals(enough, previous) <= 8 * 40


def test_a_rank_joins(previous: Plan) -> None:
    without = Planner(ALL.with_dead([5]), policy="balanced").plan(LOAD)
    planner = Planner(ALL, policy="balanced")
    plan = planner.plan(LOAD, previous=without)
    check(plan)
    assert plan.balance >= 0.999
    # One expert for each layer, in all slots of the rank; without repeats, one for each slot.
    fewest = planner.plan(LOAD, previous=without, max_moves=0)
    assert arrivals(fewest, without) <= 8 * 9
    filled = planner.plan(LOAD, previous=without, max_moves=0, repeats=False)
    check(filled)
    assert arrivals(filled, without) == 8 * 9


def test_a_node_dies() -> None:
    topology = Topology(4, 8, 11)
    previous = Planner(topology, policy="balanced").plan(LOAD)
    planner = Planner(topology.with_dead(range(8, 16)), policy="balanced")
    plan = planner.plan(LOAD, previous=previous)
    check(plan)
    assert plan.balance >= 0.99 * planner.plan(LOAD).balance


def test_too_few_slots_are_named(previous: Plan) -> None:
    planner = Planner(ALL.with_dead(range(8)), policy="balanced")
    for arguments in ({}, {"previous": previous}):
        with pytest.raises(InfeasibleError, match="40 slots are missing"):
            planner.plan(LOAD, **arguments)  # type: ignore[arg-type]


def test_slow_ranks_get_less() -> None:
    speeds = [0.5 if gpu % 4 == 0 else 1.0 for gpu in range(32)]
    plan = Planner(ALL.with_speeds(speeds), policy="balanced").plan(LOAD)
    check(plan)
    assert plan.balance >= 0.999
    slow = plan.rank_load[:, ::4].mean()
    assert slow == pytest.approx(0.5 * plan.rank_load[:, 1::4].mean(), rel=0.01)


def test_ranks_may_have_different_numbers_of_slots() -> None:
    slots = [12 if gpu < 8 else 8 for gpu in range(32)]
    plan = Planner(ALL.with_slots(slots), policy="balanced").plan(LOAD)
    check(plan)
    assert plan.balance >= 0.999


def test_groups_are_dealt_out_anew_where_a_node_has_no_room_left() -> None:
    # Three groups of three experts on the last node; then it has six slots.
    machines = Topology(3, 3, 4).with_slots([4, 4, 2, 1, 2, 1, 3, 3, 3])
    load = np.random.default_rng(0).integers(0, 4, (3, 18))
    planner = Planner(machines, num_groups=6, group_rule="strict", iterations=20)
    previous = planner.plan(load)
    planner = Planner(machines.with_dead([7]), num_groups=6, group_rule="strict", iterations=20)
    for limit in (None, 0, 3, 20):
        check_plan(planner.plan(load, previous=previous, max_moves=limit), keeps_groups=False)


def test_a_node_that_joins_gets_groups() -> None:
    machines = Topology(4, 2, 4)
    load = np.random.default_rng(0).integers(1, 9, (2, 20))
    away = Planner(machines.with_dead([6, 7]), num_groups=5, group_rule="strict")
    previous = away.plan(load)
    planner = Planner(machines.with_dead([7]), num_groups=5, group_rule="strict")
    check_plan(planner.plan(load, previous=previous, max_moves=1), keeps_groups=False)
