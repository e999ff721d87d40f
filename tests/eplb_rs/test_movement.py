"""Plans from a plan in force: most balance for few moves."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from eplb_rs import InvalidInputError, Plan, Planner, Topology
from placements import arrivals

BEFORE = np.round(np.random.default_rng(0).lognormal(0, 1, (58, 256)) * 1000)
AFTER = BEFORE * np.random.default_rng(1).lognormal(0, 0.1, (58, 256))
PLANNER = Planner(Topology(4, 8, 9), policy="balanced")


@pytest.fixture(scope="module")
def previous() -> Plan:
    return PLANNER.plan(BEFORE)


@pytest.mark.parametrize(
    ("moves", "balance"), [(0, 0.920), (60, 0.940), (400, 0.963), (800, 0.980), (1600, 0.9944)]
)
def test_few_moves_go_far(previous: Plan, moves: int, balance: float) -> None:
    plan = PLANNER.plan(AFTER, previous=previous, max_moves=moves)
    assert arrivals(plan, previous) <= moves
    assert plan.balance >= balance
    assert plan.duplicates == 0
    changed = int((plan.phy2log != previous.phy2log).sum())
    assert changed == arrivals(plan, previous)  # what stays on its rank keeps its slot


def test_the_frontier_rises_and_is_kept(previous: Plan) -> None:
    frontier = PLANNER.frontier(AFTER, previous)
    moves = [milestone.moves for milestone in frontier]
    balance = [milestone.balance for milestone in frontier]
    assert moves[0] == 0
    assert moves == sorted(set(moves))
    assert balance == sorted(balance)
    unlimited = PLANNER.plan(AFTER, previous=previous)
    assert unlimited.balance == pytest.approx(balance[-1], abs=1e-5)
    assert arrivals(unlimited, previous) == moves[-1]


def test_nothing_moves_where_nothing_has_changed(previous: Plan) -> None:
    assert np.array_equal(
        PLANNER.plan(BEFORE, previous=previous, max_moves=0).phy2log, previous.phy2log
    )
    same = PLANNER.plan(BEFORE, previous=previous)
    assert arrivals(same, previous) <= 58 * 3


def test_groups_stay_on_their_node() -> None:
    planner = Planner(Topology(4, 8, 9), 8, "balanced")
    previous = planner.plan(BEFORE)
    plan = planner.plan(AFTER, previous=previous, max_moves=600)
    assert arrivals(plan, previous) <= 600
    assert plan.balance >= previous.with_load(AFTER).balance

    def nodes_of(phy2log: npt.NDArray[np.int64]) -> list[list[set[int]]]:
        return [
            [set((slots // 32).tolist()) for slots in row] for row in phy2log.reshape(58, 4, 72)
        ]

    assert nodes_of(plan.phy2log) == nodes_of(previous.phy2log)


def test_a_plan_with_an_expert_twice_on_a_rank_is_a_start_as_well() -> None:
    topology = Topology(1, 4, 4)
    previous = Plan.from_phy2log(
        topology, [[0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 0, 1, 2, 3]], np.ones((1, 10))
    )
    planner = Planner(topology, policy="balanced")
    kept = planner.plan(np.ones((1, 10)), previous=previous, max_moves=0)
    assert set(kept.phy2log[0].tolist()) == set(range(10))
    plan = planner.plan(np.arange(1, 11)[None], previous=previous)
    assert plan.duplicates == 0


def test_what_does_not_fit_is_refused(previous: Plan) -> None:
    other = Planner(Topology(4, 8, 10), policy="balanced")
    for planner, load, arguments, name in (
        (other, AFTER, {"previous": previous}, "previous"),
        (PLANNER, AFTER[:5], {"previous": previous}, "previous"),
        (PLANNER, AFTER, {"previous": "plan"}, "previous"),
        (PLANNER, AFTER, {"max_moves": 3}, "max_moves"),
        (PLANNER, AFTER, {"previous": previous, "max_moves": -1}, "max_moves"),
        (Planner(Topology(4, 8, 9), policy="trivial"), AFTER, {"previous": previous}, "previous"),
    ):
        with pytest.raises(InvalidInputError) as caught:
            planner.plan(load, **arguments)  # type: ignore[arg-type]
        assert caught.value.argument == name
