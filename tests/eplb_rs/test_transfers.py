"""Who sends what to whom, and in which round."""

from __future__ import annotations

import numpy as np
import pytest
from eplb_rs import InvalidInputError, Plan, Planner, Topology, Transfers
from hypothesis import given
from hypothesis import strategies as st

TOPOLOGY = Topology(2, 4, 5)


def plan_of(seed: int) -> Plan:
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(np.r_[np.arange(24), rng.integers(0, 24, 16)]) for _ in range(3)]
    return Plan.from_phy2log(TOPOLOGY, rows, np.ones((3, 24)))


def simulated_s(moves: Transfers, expert_bytes: float, near_gb_s: float, far_gb_s: float) -> float:
    """Plays the rounds one by one, and refuses a rank that sends or receives twice in one."""
    total = 0.0
    layers = sorted(set(moves.layer.tolist())) if moves.by_layer else [None]
    for layer in layers:
        for number in range(moves.num_rounds):
            of_round = moves.table[moves.round == number]
            if layer is not None:
                of_round = of_round[of_round[:, 0] == layer]
            assert len(set(of_round[:, 3].tolist())) == len(of_round)
            assert len(set(of_round[:, 5].tolist())) == len(of_round)
            seconds = [
                expert_bytes / (near_gb_s if source // 4 == target // 4 else far_gb_s) / 1e9
                for source, target in of_round[:, [3, 5]].tolist()
            ]
            total += max(seconds, default=0.0)
    return total


@given(a=st.integers(0, 10**6), b=st.integers(0, 10**6), by_layer=st.booleans())
def test_rounds_are_as_few_as_can_be(a: int, b: int, by_layer: bool) -> None:
    previous, plan = plan_of(a), plan_of(b)
    moves = plan.transfers(previous, by_layer=by_layer)
    sent = moves.table[moves.round >= 0]
    for layer in range(3) if by_layer else [None]:
        rows = sent if layer is None else sent[sent[:, 0] == layer]
        degree = max(
            np.bincount(rows[:, 3], minlength=8).max(), np.bincount(rows[:, 5], minlength=8).max()
        )
        assert rows[:, 6].max(initial=-1) + 1 == degree
    predicted = moves.predicted_s(1e6, intra_node_gb_s=100, inter_node_gb_s=25)
    assert predicted == pytest.approx(simulated_s(moves, 1e6, 100, 25))
    slots = previous.phy2log.copy()
    first, later = ~moves.repeats, moves.repeats
    for some in (first, later):
        source = slots[moves.layer[some], moves.source_slot[some]]
        assert (source == moves.expert[some]).all()
        slots[moves.layer[some], moves.slot[some]] = moves.expert[some]
    assert np.array_equal(slots, plan.phy2log)
    assert (moves.source[later] == moves.target[later]).all()
    came = moves.table[moves.source != moves.target][:, [0, 1, 5]].tolist()
    assert len(came) == len(set(map(tuple, came))), "an expert comes to a rank twice"


def test_a_copy_on_the_node_comes_first() -> None:
    topology = Topology(2, 2, 2)
    load = np.ones((1, 4))
    previous = Plan.from_phy2log(topology, [[0, 1, 2, 3, 0, 2, 1, 3]], load)
    plan = Plan.from_phy2log(topology, [[0, 1, 2, 0, 0, 2, 1, 3]], load)
    moves = plan.transfers(previous)
    assert moves.table.tolist() == [[0, 0, 0, 0, 3, 1, 0]]
    assert moves.num_bytes(44e6) == 44e6


def test_what_fills_several_slots_of_a_rank_is_sent_once() -> None:
    topology = Topology(1, 3, 3)
    load = np.ones((1, 4))
    previous = Plan.from_phy2log(topology, [[0, 1, 2, 3, 0, 1, 2, 3, 0]], load)
    plan = Plan.from_phy2log(topology, [[3, 3, 3, 2, 0, 1, 2, 3, 2]], load)
    moves = plan.transfers(previous)
    assert moves.table.tolist() == [
        [0, 3, 3, 1, 0, 0, 0],
        [0, 3, 0, 0, 1, 0, -1],
        [0, 3, 0, 0, 2, 0, -1],
        [0, 2, 2, 0, 3, 1, 0],
        [0, 2, 6, 2, 8, 2, -1],
    ]
    assert moves.repeats.tolist() == [False, True, True, False, False]
    assert moves.rank_bytes(10).tolist() == [[10, 10], [10, 10], [0, 0]]


def test_a_rank_that_joins_gets_what_fills_it_once() -> None:
    load = np.random.default_rng(3).lognormal(0, 1, (2, 24))
    topology = Topology(1, 4, 9)
    previous = Planner(topology.with_dead([3])).plan(load)
    moves = Planner(topology).plan(load, previous=previous, max_moves=0).transfers(previous)
    to_it = moves.table[moves.target == 3]
    assert (np.bincount(to_it[:, 0]) == 9).all()
    assert (to_it[:, 6] >= 0).sum() == 2


def test_nothing_to_send_takes_no_time() -> None:
    plan = plan_of(1)
    moves = plan.transfers(plan)
    assert (len(moves), moves.num_rounds) == (0, 0)
    assert moves.predicted_s(1e6, intra_node_gb_s=1, inter_node_gb_s=1) == 0


def test_what_only_dead_ranks_held_comes_from_storage() -> None:
    topology = Topology(1, 4, 9)
    load = np.arange(1, 25)[None]
    previous = Planner(topology, policy="balanced").plan(load)
    after = topology.with_dead([2])
    plan = Planner(after, policy="balanced").plan(load, previous=previous)
    moves = plan.transfers(previous)
    assert (moves.source != 2).all()
    lost = set(range(24)) - set(np.delete(previous.phy2log.reshape(4, 9), 2, 0).ravel().tolist())
    assert moves.num_from_storage >= len(lost) > 0


def test_other_plans_are_refused() -> None:
    plan = plan_of(1)
    with pytest.raises(InvalidInputError):
        plan.transfers("plan")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError):
        plan.transfers(Planner(Topology(2, 4, 6), policy="balanced").plan(np.ones((3, 24))))
    moves = plan.transfers(plan_of(2))
    with pytest.raises(InvalidInputError):
        moves.predicted_s(0, intra_node_gb_s=1, inter_node_gb_s=1)
