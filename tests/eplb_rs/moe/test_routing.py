"""Tokens to replicas: as predicted to the token, on every rule."""

import eplb_rs
import numpy as np
import pytest
from eplb_rs.loads import read_loads
from eplb_rs.testing import topologies
from hypothesis import given
from hypothesis import strategies as st
from recordings import DEEPSEEK_R1

torch = pytest.importorskip("torch")

from eplb_rs.moe import RoutingTable, predicted_tokens, routing_rows  # noqa: E402

TOPOLOGY = eplb_rs.Topology(2, 2, 5)
EXPERTS, LAYERS = 12, 3


def plan_for(rng, topology=TOPOLOGY):
    load = rng.lognormal(0, 1.5, (LAYERS, EXPERTS))
    return eplb_rs.Planner(topology, policy="balanced").plan(load)


def rules(plan, rng):
    load = rng.lognormal(0, 1.5, (LAYERS, EXPERTS))
    return ["uniform", "nearest", plan.with_shares(load)]


@pytest.mark.parametrize("index", range(3))
def test_every_slot_gets_what_was_predicted(index):
    rng = np.random.default_rng(3)
    plan = plan_for(rng)
    rule = rules(plan, rng)[index]
    ids = [torch.from_numpy(rng.integers(-1, EXPERTS, (LAYERS, 40 + r, 3))) for r in range(4)]
    counts = np.zeros((LAYERS, 4, EXPERTS), dtype=np.int64)
    measured = np.zeros((LAYERS, TOPOLOGY.num_slots), dtype=np.int64)
    for source in range(4):
        rows, lengths = routing_rows(plan, source, rule)
        for layer in range(LAYERS):
            table = RoutingTable(EXPERTS, 16)
            table.update(rows[layer], lengths[layer])
            chosen = ids[source][layer]
            slots, count = table.route(chosen)
            counts[layer, source] = count
            assert torch.equal(slots < 0, chosen < 0)
            used = slots >= 0
            experts = torch.from_numpy(plan.phy2log[layer].copy())[slots[used]]
            assert torch.equal(experts, chosen[used])
            measured[layer] += np.bincount(slots[used], minlength=TOPOLOGY.num_slots)
            wanted = np.bincount(chosen[chosen >= 0], minlength=EXPERTS)
            np.testing.assert_array_equal(count, wanted)
    np.testing.assert_array_equal(predicted_tokens(plan, counts, rule), measured)


def test_uniform_is_even_to_a_token():
    rng = np.random.default_rng(0)
    plan = plan_for(rng)
    counts = rng.integers(0, 50, (LAYERS, 4, EXPERTS))
    tokens = predicted_tokens(plan, counts)
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            slots = plan.log2phy[layer, expert, : plan.logcnt[layer, expert]]
            got = tokens[layer, slots]
            assert got.sum() == counts[layer, :, expert].sum()
            assert got.max() - got.min() <= 4  # at most one for each source


def test_nearest_stays_on_the_rank_then_on_the_node():
    plan = plan_for(np.random.default_rng(0))
    for source in range(4):
        rows, lengths = routing_rows(plan, source, "nearest")
        for layer in range(LAYERS):
            for expert in range(EXPERTS):
                ranks = {int(s) // 5 for s in np.flatnonzero(plan.phy2log[layer] == expert)}
                used = {int(s) // 5 for s in rows[layer, expert, : lengths[layer, expert]]}
                here = {r for r in ranks if r == source}
                near = {r for r in ranks if r // 2 == source // 2}
                assert used == (here or near or ranks)


def test_shares_are_kept_to_a_place():
    rng = np.random.default_rng(1)
    plan = plan_for(rng)
    shares = plan.with_shares(rng.lognormal(0, 1.5, (LAYERS, EXPERTS)))
    rows, lengths = routing_rows(plan, 1, shares, width=32)
    assert lengths.max() <= 32
    for layer in range(LAYERS):
        used = rows[layer][rows[layer] >= 0]
        got = np.bincount(used, minlength=TOPOLOGY.num_slots)
        got = got / lengths[layer, plan.phy2log[layer]]
        assert np.abs(got - shares.by_slot[layer]).max() <= 1 / 32 + 1e-9


def test_places_of_a_slot_are_spread():
    """After any number of tokens, a slot is within a token of what its share asks for."""
    rng = np.random.default_rng(2)
    plan = plan_for(rng)
    shares = plan.with_shares(rng.lognormal(0, 1.5, (LAYERS, EXPERTS)))
    rows, lengths = routing_rows(plan, 0, shares)
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            row = rows[layer, expert, : lengths[layer, expert]]
            for slot in set(row.tolist()):
                got = np.cumsum(row == slot)
                asked = np.arange(1, len(row) + 1) * got[-1] / len(row)
                assert np.abs(got - asked).max() <= 1


@given(topologies(), st.integers(0, 2**31), st.sampled_from([0, 1, 2]))
def test_any_topology(topology, seed, index):
    rng = np.random.default_rng(seed)
    experts = int(rng.integers(1, topology.num_slots + 1))
    load = rng.lognormal(0, 1, (2, experts))
    plan = eplb_rs.Planner(topology, policy="balanced").plan(load)
    rule = ["uniform", "nearest", plan.with_shares(load)][index]
    counts = rng.integers(0, 9, (2, topology.num_gpus, experts))
    tokens = predicted_tokens(plan, counts, rule)
    for layer in range(2):
        got = np.bincount(plan.phy2log[layer], tokens[layer], experts)
        np.testing.assert_array_equal(got, counts[layer].sum(axis=0))


def test_few_moves_make_two_ranks_as_even_as_a_random_router():
    """8,192 tokens a rank, 8 of 256 experts each, of the least even of DeepSeek-R1's layers and a
    median one: rows of the fuller rank, as they are and filled up to tiles of 128."""
    loads = read_loads(DEEPSEEK_R1).loads.sum(axis=0)
    by_rank = loads.reshape(len(loads), 2, 128).sum(axis=2)
    uneven = np.argsort(by_rank.max(axis=1) / by_rank.sum(axis=1), kind="stable")
    loads = np.stack([np.ones(256), loads[uneven[-1]], loads[uneven[len(uneven) // 2]]])
    in_order = eplb_rs.Plan.from_phy2log(
        eplb_rs.Topology(1, 2, 128), np.tile(np.arange(256), (3, 1)), loads
    )
    plan = eplb_rs.Planner(in_order.topology).plan(loads, previous=in_order)
    moves = np.bincount(plan.transfers(in_order).table[:, 0], minlength=3)
    assert moves.tolist() == [0, 6, 4]
    chance = np.minimum(8 * loads / loads.sum(axis=1, keepdims=True), 1)
    counts = np.random.default_rng(0).binomial(8192, chance[:, None].repeat(2, axis=1))

    def fullest(plan, tile):
        rows = predicted_tokens(plan, counts)
        return (-(-rows // tile) * tile).reshape(3, 2, 128).sum(axis=2).max(axis=1)

    before, after = fullest(in_order, 1), fullest(plan, 1)
    np.testing.assert_allclose(before / before[0], [1, 1.45, 1.17], atol=0.01)
    np.testing.assert_allclose(after / after[0], 1, atol=0.01)
    tiles = fullest(plan, 128)
    assert (tiles / tiles[0] < 1.05).all()


def test_refusals():
    plan = plan_for(np.random.default_rng(0))
    other = plan_for(np.random.default_rng(5))
    bad = [
        ("unknown", lambda: routing_rows(plan, 0, "closest")),
        ("out_of_range", lambda: routing_rows(plan, 4)),
        ("wrong_shape", lambda: routing_rows(plan, 0, other.with_shares())),
        ("wrong_shape", lambda: predicted_tokens(plan, [[1]])),
        ("wrong_dtype", lambda: predicted_tokens(plan, np.ones((3, 4, 12)))),
        ("negative", lambda: predicted_tokens(plan, -np.ones((3, 4, 12), dtype=int))),
        ("too_large", lambda: RoutingTable(12, 1).update(np.zeros((12, 2), int), np.full(12, 2))),
    ]
    for code, call in bad:
        with pytest.raises(eplb_rs.InvalidInputError) as caught:
            call()
        assert caught.value.code == code
