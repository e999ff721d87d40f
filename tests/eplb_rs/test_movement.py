"""Plans from a plan in force: most balance for few moves."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from eplb_rs import (
    InfeasibleError,
    InvalidInputError,
    Plan,
    Planner,
    Topology,
    TransferLimits,
)
from hypothesis import given
from hypothesis import strategies as st
from placements import arrivals, check

BEFORE = np.round(np.random.default_rng(0).lognormal(0, 1, (58, 256)) * 1000)
AFTER = BEFORE * np.random.default_rng(1).lognormal(0, 0.1, (58, 256))
PLANNER = Planner(Topology(4, 8, 9), policy="balanced")


@pytest.fixture(scope="module")
def previous() -> Plan:
    return PLANNER.plan(BEFORE)


@pytest.mark.parametrize(
    ("moves", "balance"), [(0, 0.922), (60, 0.940), (400, 0.963), (800, 0.980), (1600, 0.9945)]
)
def test_few_moves_go_far(previous: Plan, moves: int, balance: float) -> None:
    plan = PLANNER.plan(AFTER, previous=previous, max_moves=moves)
    assert arrivals(plan, previous) <= moves
    assert plan.balance >= balance
    # What stays on its rank keeps its slot; a slot that changes without a move repeats an expert.
    changed = int((plan.phy2log != previous.phy2log).sum())
    assert changed <= arrivals(plan, previous) + plan.duplicates


@pytest.mark.parametrize(
    ("moves", "balance"), [(0, 0.918), (60, 0.940), (400, 0.963), (800, 0.980), (1600, 0.9945)]
)
def test_few_moves_go_far_without_repeats(previous: Plan, moves: int, balance: float) -> None:
    plan = PLANNER.plan(AFTER, previous=previous, max_moves=moves, repeats=False)
    assert arrivals(plan, previous) <= moves
    assert plan.balance >= balance
    assert plan.duplicates == 0
    changed = int((plan.phy2log != previous.phy2log).sum())
    assert changed == arrivals(plan, previous)


def test_the_frontier_rises_and_is_kept(previous: Plan) -> None:
    for repeats in (True, False):
        frontier = PLANNER.frontier(AFTER, previous, repeats=repeats)
        moves = [milestone.moves for milestone in frontier]
        balance = [milestone.balance for milestone in frontier]
        assert moves[0] == 0
        assert moves == sorted(set(moves))
        assert balance == sorted(balance)
        last = PLANNER.plan(AFTER, previous=previous, repeats=repeats, max_moves=moves[-1])
        assert last.balance == pytest.approx(balance[-1], abs=2e-4)


# A plan without limits is as even as one from scratch, to within so much.
SPARED = 1.0011


@pytest.mark.parametrize(
    ("topology", "most_moves"),
    [(Topology(4, 8, 9), (3100, 4600, 9000)), (Topology(18, 8, 2), (7200, 8400, 8400))],
    ids=["288/32", "288/144"],
)
def test_without_limits_it_is_as_even_as_from_scratch(
    topology: Topology, most_moves: tuple[int, ...]
) -> None:
    planner = Planner(topology)
    previous = planner.plan(BEFORE)
    for jitter, most in zip((0.1, 0.5, 2.0), most_moves, strict=True):
        load = BEFORE * np.random.default_rng(1).lognormal(0, jitter, BEFORE.shape)
        scratch, plan = planner.plan(load), planner.plan(load, previous=previous)
        check(plan)
        assert plan.balance * SPARED >= scratch.balance
        assert arrivals(plan, previous) <= most < arrivals(scratch, previous) * 0.6


@given(st.data())
def test_on_any_machines_it_is_as_even_as_from_scratch(data: st.DataObject) -> None:
    shape = [data.draw(st.integers(1, most)) for most in (3, 4, 6)]
    topology = Topology(*shape)
    num_gpus = topology.num_gpus
    if data.draw(st.booleans()):
        slots = st.lists(st.integers(1, 6), min_size=num_gpus, max_size=num_gpus)
        topology = topology.with_slots(data.draw(slots))
    if data.draw(st.booleans()):
        speeds = st.lists(st.sampled_from([1.0, 0.5, 3.0]), min_size=num_gpus, max_size=num_gpus)
        topology = topology.with_speeds(data.draw(speeds))
    dead = st.sets(st.integers(0, num_gpus - 1), max_size=num_gpus - 1)
    machines = [topology.with_dead(sorted(data.draw(dead))) for _ in range(2)]
    live = [sum(np.delete(one.slots, one.dead)) for one in machines]
    num_experts = data.draw(st.integers(1, min(live)))
    divisors = [groups for groups in range(1, num_experts + 1) if num_experts % groups == 0]
    num_groups = data.draw(st.sampled_from(divisors))
    rule = data.draw(st.sampled_from(["strict", "free"]))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    loads = random.lognormal(0, data.draw(st.sampled_from([0, 1, 3])), (2, 3, num_experts))
    before, planner = (Planner(one, num_groups, group_rule=rule) for one in machines)  # type: ignore[arg-type]
    try:
        previous, scratch = before.plan(loads[0]), planner.plan(loads[1])
    except InfeasibleError:  # groups do not fit
        return
    # Where a rank has more slots than experts it may hold, it has to repeat some.
    grouped = rule == "strict" and num_groups > 1 and topology.num_nodes > 1
    roomy = grouped or max(topology.slots) > num_experts
    if not roomy:
        check(scratch)
    for repeats in (False, True):
        plan = planner.plan(loads[1], previous=previous, repeats=repeats)
        slowest, of_scratch = (one.rank_time.max(axis=1).sum() for one in (plan, scratch))
        assert slowest <= of_scratch * SPARED
        if not repeats and not roomy:
            check(plan)


def test_a_price_stops_moves_that_gain_less(previous: Plan) -> None:
    plans = [
        PLANNER.plan(AFTER, previous=previous, move_cost=cost) for cost in (0.001, 30, 300, 1e9)
    ]
    moves = [arrivals(plan, previous) for plan in plans]
    assert moves == sorted(moves, reverse=True)
    assert moves[0] > 1000
    assert moves[-1] == 0
    heaviest = [plan.rank_load.max(axis=1).sum() for plan in plans]
    for cost, some, none in zip((30, 300), moves[1:3], heaviest[1:3], strict=True):
        assert heaviest[-1] - none > cost * some


def test_a_balance_that_is_enough_stops_moves(previous: Plan) -> None:
    for balance in (0.95, 0.98):
        plan = PLANNER.plan(AFTER, previous=previous, min_balance=balance)
        assert balance - 1e-6 <= plan.balance < balance + 0.003


def test_limits_on_bytes_and_seconds_are_kept(previous: Plan) -> None:
    speeds = {"intra_node_gb_s": 200.0, "inter_node_gb_s": 25.0, "latency_us": 10.0}
    most = 44e6 * 20
    limits = TransferLimits(expert_bytes=44e6, max_bytes_per_rank=most)
    plan = PLANNER.plan(AFTER, previous=previous, limits=limits)
    sent = plan.transfers(previous).rank_bytes(44e6)
    assert 0.9 * most <= sent.max() <= most
    assert sent.sum(axis=0)[0] == sent.sum(axis=0)[1]
    limits = TransferLimits(expert_bytes=44e6, max_seconds=0.1, **speeds)
    plan = PLANNER.plan(AFTER, previous=previous, limits=limits)
    seconds = plan.transfers(previous).predicted_s(44e6, **speeds)
    assert 0.08 <= seconds <= 0.1
    assert plan.balance > previous.with_load(AFTER).balance
    nothing = PLANNER.plan(
        AFTER, previous=previous, limits=TransferLimits(expert_bytes=44e6, max_bytes_per_rank=0)
    )
    assert arrivals(nothing, previous) == 0


def test_a_plan_is_worth_it_over_a_long_horizon(previous: Plan) -> None:
    costs = {
        "us_per_token": 0.01,
        "expert_bytes": 44e6,
        "intra_node_gb_s": 200.0,
        "inter_node_gb_s": 25.0,
    }
    short = PLANNER.worth_it(AFTER, previous, horizon=0.1, **costs)
    long = PLANNER.worth_it(AFTER, previous, horizon=1e4, **costs)
    assert not short or short.moves == 0
    assert long
    assert long.net_s == long.gain_s - long.cost_s > 0
    assert long.moves == arrivals(long.plan, previous)
    assert long.balance > long.balance_before == previous.with_load(AFTER).balance
    same = PLANNER.worth_it(AFTER, previous, previous, horizon=1, **costs)
    assert (same.gain_s, same.cost_s, bool(same)) == (0, 0, False)
    for name in ("horizon", *costs):
        with pytest.raises(InvalidInputError) as caught:
            PLANNER.worth_it(AFTER, previous, previous, **{"horizon": 1, **costs, name: -1})
        assert caught.value.argument == name
    with pytest.raises(InvalidInputError, match=r"`hidden` \(50\.0\) must be from 0 to 1"):
        PLANNER.worth_it(AFTER, previous, previous, horizon=1, hidden=50, **costs)


@pytest.mark.parametrize("threads", [2, 8])
def test_threads_make_no_difference(previous: Plan, threads: int) -> None:
    planner = Planner(Topology(4, 8, 9), policy="balanced", threads=threads)
    for moves in (60, 800, None):
        plan = planner.plan(AFTER, previous=previous, max_moves=moves)
        assert plan == PLANNER.plan(AFTER, previous=previous, max_moves=moves)


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
    assert arrivals(kept, previous) == 0
    assert set(kept.phy2log[0].tolist()) == set(range(10))
    plan = planner.plan(np.arange(1, 11)[None], previous=previous)
    assert plan.duplicates == 0


@pytest.mark.parametrize("load", [1e30, 1e-45, 0.0])
def test_loads_may_be_huge_or_nothing(previous: Plan, load: float) -> None:
    loads = np.full((58, 256), np.float32(1e-40))
    loads[:, 7] = load
    for limits in ({}, {"max_moves": 0}, {"max_moves": 99}, {"min_balance": 0.9}, {"move_cost": 1}):
        plan = PLANNER.plan(loads, previous=previous, **limits)  # type: ignore[arg-type]
        assert set(plan.phy2log[0].tolist()) == set(range(256))
        assert 0 < plan.balance <= 1
    assert PLANNER.plan(loads, previous=previous).balance * SPARED >= PLANNER.plan(loads).balance


def test_what_does_not_fit_is_refused(previous: Plan) -> None:
    other = Planner(Topology(4, 8, 10), policy="balanced")
    for planner, load, arguments, name in (
        (other, AFTER, {"previous": previous}, "previous"),
        (PLANNER, AFTER[:5], {"previous": previous}, "previous"),
        (PLANNER, AFTER, {"previous": "plan"}, "previous"),
        (PLANNER, AFTER, {"max_moves": 3}, "max_moves"),
        (PLANNER, AFTER, {"previous": previous, "max_moves": -1}, "max_moves"),
        (PLANNER, AFTER, {"move_cost": 3}, "move_cost"),
        (PLANNER, AFTER, {"previous": previous, "move_cost": float("nan")}, "move_cost"),
        (PLANNER, AFTER, {"previous": previous, "min_balance": 0}, "min_balance"),
        (PLANNER, AFTER, {"previous": previous, "min_balance": 1.01}, "min_balance"),
        (PLANNER, AFTER, {"previous": previous, "limits": 3}, "limits"),
        (
            PLANNER,
            AFTER,
            {"previous": previous, "limits": TransferLimits(expert_bytes=[1])},
            "expert_bytes",
        ),
        (Planner(Topology(4, 8, 9), policy="trivial"), AFTER, {"previous": previous}, "previous"),
    ):
        with pytest.raises(InvalidInputError) as caught:
            planner.plan(load, **arguments)  # type: ignore[arg-type]
        assert caught.value.argument == name
