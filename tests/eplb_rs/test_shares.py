"""The split of tokens over replicas: the optimum, its proof, and what engines make of it."""

import itertools
import pickle
from collections.abc import Iterator

import eplb_rs
import numpy as np
import numpy.typing as npt
import pytest
from eplb_rs.shares import Splitter
from scipy.optimize import linprog
from scipy.sparse import coo_matrix

Array = npt.NDArray[np.generic]


def random_cases(count: int) -> Iterator[tuple[eplb_rs.Plan, npt.NDArray[np.float32]]]:
    """Plans of one layer and loads for them: disconnected ranks, experts with a single replica,
    experts without load, experts several times on a rank."""
    rng = np.random.default_rng(20260)
    for number in range(count):
        ranks, per_rank = int(rng.integers(1, 17)), int(rng.integers(1, 8))
        slots = ranks * per_rank
        experts = int(rng.integers(1, slots + 1))
        if number % 4 == 0:  # a block of experts for each half of the ranks
            half = slots // 2
            experts = max(experts, 2)
            low = np.concatenate([np.arange(experts // 2), rng.integers(0, experts // 2, slots)])
            high = np.concatenate(
                [np.arange(experts // 2, experts), rng.integers(experts // 2, experts, slots)]
            )
            if half < experts // 2 or slots - half < experts - experts // 2:
                continue
            held = np.concatenate([rng.permutation(low[:half]), high[: slots - half]])
        else:
            held = np.concatenate([np.arange(experts), rng.integers(0, experts, slots - experts)])
            held = rng.permutation(held)
        spread = rng.choice([0.0, 1.0, 3.0])
        load = np.round(rng.lognormal(0, spread, (1, experts)) * 1000)
        load[rng.random(load.shape) < rng.choice([0, 0.3, 1.0], p=[0.6, 0.35, 0.05])] = 0
        topology = eplb_rs.Topology(1, ranks, per_rank)
        yield (
            eplb_rs.Plan.from_phy2log(topology, held[None], load),
            load.astype(np.float32),
        )


def uneven_cases(count: int) -> Iterator[tuple[eplb_rs.Plan, npt.NDArray[np.float32]]]:
    """The same on ranks of unequal slots and speeds, some of them dead."""
    rng = np.random.default_rng(20261)
    for number in range(count):
        slots = rng.integers(1, 8, int(rng.integers(2, 17)))
        ranks = len(slots)
        speeds = (
            rng.choice([1.0, 1.5, 2.0, 3.0], ranks) if number % 3 else rng.uniform(1, 900, ranks)
        )
        dead = np.flatnonzero(rng.random(ranks - 1) < 0.1).tolist()
        topology = eplb_rs.Topology(1, ranks, int(slots.max()), slots=slots.tolist())
        topology = topology.with_speeds(speeds.tolist()).with_dead(dead)
        live = ~np.isin(np.repeat(np.arange(ranks), slots), dead)
        experts = int(rng.integers(1, live.sum() + 1))
        more = rng.integers(0, experts, live.sum() - experts)
        held = np.full(len(live), -1)
        held[live] = rng.permutation(np.concatenate([np.arange(experts), more]))
        load = np.round(rng.lognormal(0, rng.choice([0.0, 1.0, 3.0]), (1, experts)) * 1000)
        yield (
            eplb_rs.Plan.from_phy2log(topology, held[None], load),
            load.astype(np.float32),
        )


def rank_of_slot(plan: eplb_rs.Plan) -> npt.NDArray[np.int64]:
    return np.repeat(np.arange(plan.topology.num_gpus), plan.topology.slots)


def relative_speeds(plan: eplb_rs.Plan) -> npt.NDArray[np.float64]:
    """The mean of live ranks is 1."""
    speeds = np.array(plan.topology.speeds)
    return speeds / np.delete(speeds, plan.topology.dead).mean()


def optimum(plan: eplb_rs.Plan, load: npt.NDArray[np.float32]) -> float:
    """The least possible longest rank time, by a linear program over tokens by slot."""
    live = plan.phy2log[0] >= 0
    held = plan.phy2log[0][live]
    slots, ranks = len(held), plan.topology.num_gpus
    rank_of = rank_of_slot(plan)[live]
    every, ones = np.arange(slots), np.ones(slots)
    sums = coo_matrix((ones, (held, every)), shape=(plan.num_experts, slots + 1))
    carried = coo_matrix(
        (
            np.concatenate([ones, -relative_speeds(plan)]),
            (
                np.concatenate([rank_of, np.arange(ranks)]),
                np.concatenate([every, np.full(ranks, slots)]),
            ),
        ),
        shape=(ranks, slots + 1),
    )
    scale = max(float(load.max()), 1.0)
    answer = linprog(
        np.append(np.zeros(slots), 1.0),
        A_ub=carried,
        b_ub=np.zeros(ranks),
        A_eq=sums,
        b_eq=load[0] / scale,
        method="highs",
    )
    assert answer.status == 0
    return float(answer.fun) * scale


def test_the_optimum_of_a_linear_program() -> None:
    compared = 0
    for plan, load in random_cases(280):
        shares = Splitter(plan).split(load)
        wanted = optimum(plan, load)
        assert shares.lower_bound[0] == pytest.approx(wanted, rel=1e-6, abs=1e-9)
        assert shares.rank_load.max() == pytest.approx(wanted, rel=1e-6, abs=1e-9)
        compared += 1
    assert compared >= 200


def test_shares_add_up_and_give_the_rank_loads() -> None:
    for plan, load in random_cases(100):
        shares = Splitter(plan).split(load)
        held, slots = plan.phy2log[0], plan.topology.num_slots
        np.testing.assert_allclose(np.bincount(held, shares.by_slot[0]), 1, rtol=1e-12)
        ranks = np.arange(slots) * plan.topology.num_gpus // slots
        carried = np.bincount(ranks, shares.by_slot[0] * load[0][held])
        np.testing.assert_allclose(carried, shares.rank_load[0], rtol=1e-9, atol=1e-9)


def test_the_optimum_where_ranks_are_unlike() -> None:
    for plan, load in uneven_cases(120):
        shares = Splitter(plan).split(load)
        wanted = optimum(plan, load)
        assert shares.lower_bound[0] == pytest.approx(wanted, rel=1e-6, abs=1e-9)
        assert shares.rank_time.max() == pytest.approx(wanted, rel=1e-6, abs=1e-9)
        held = plan.phy2log[0]
        live = held >= 0
        assert (shares.by_slot[0][~live] == 0).all()
        sums = np.bincount(held[live], shares.by_slot[0][live])
        np.testing.assert_allclose(sums, 1, rtol=1e-12)
        by_slot = np.where(live, shares.by_slot[0] * load[0][held], 0)
        carried = np.bincount(rank_of_slot(plan), by_slot)
        np.testing.assert_allclose(carried, shares.rank_load[0], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(Splitter(plan).uniform(load).rank_load, plan.rank_load)


def test_whole_tokens_where_ranks_are_unlike() -> None:
    rng = np.random.default_rng(20262)
    for _ in range(40):
        slots = rng.integers(1, 3, 3).tolist()
        topology = eplb_rs.Topology(1, 3, 2, slots=slots, speeds=rng.uniform(1, 5, 3).tolist())
        held = rng.permutation(np.concatenate([[0, 1], rng.integers(0, 2, sum(slots) - 2)]))
        plan = eplb_rs.Plan.from_phy2log(topology, held[None], np.ones((1, 2)))
        tokens = rng.integers(0, 9, 2)
        quotas, largest = Splitter(plan).split_tokens(tokens)
        np.testing.assert_array_equal(np.bincount(held, quotas, minlength=2), tokens)
        speeds, ranks = relative_speeds(plan), rank_of_slot(plan)
        carried = np.bincount(ranks, quotas)
        assert largest == carried.max()
        best = np.inf
        for tried in itertools.product(*(range(int(tokens[expert]) + 1) for expert in held)):
            if (np.bincount(held, tried, minlength=2) == tokens).all():
                best = min(best, (np.bincount(ranks, tried) / speeds).max())
        assert (carried / speeds).max() == pytest.approx(best)


def test_more_tokens_than_unlike_ranks_can_count_are_refused() -> None:
    topology = eplb_rs.Topology(1, 2, 1, speeds=[1, 900])
    plan = eplb_rs.Plan.from_phy2log(topology, [[0, 1]], np.ones((1, 2)))
    Splitter(plan).split_tokens([2**49, 2**48])
    with pytest.raises(eplb_rs.InvalidInputError, match="tokens"):
        Splitter(plan).split_tokens([2**52, 0])


def test_the_tight_ranks_prove_the_bound() -> None:
    for plan, load in itertools.chain(random_cases(100), uneven_cases(60)):
        shares = Splitter(plan).split(load)
        held = plan.phy2log[0]
        elsewhere = held[~shares.tight[0][rank_of_slot(plan)]]
        alone = np.delete(load[0], elsewhere[elsewhere >= 0]).sum(dtype=np.float64)
        speed = relative_speeds(plan)[shares.tight[0]].sum()
        assert shares.lower_bound[0] <= alone / speed * (1 + 1e-9)


@pytest.fixture
def plan() -> eplb_rs.Plan:
    rng = np.random.default_rng(1)
    load = np.round(rng.lognormal(0, 1, (6, 64)) * 1000)
    return eplb_rs.Planner(eplb_rs.Topology(1, 8, 10)).plan(load)


@pytest.fixture
def later(plan: eplb_rs.Plan) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(2)
    return (plan.expert_load * np.exp(0.2 * rng.standard_normal((6, 64)))).astype(np.float32)


def test_uniform_is_what_plans_assume(plan: eplb_rs.Plan, later: Array) -> None:
    uniform = Splitter(plan).uniform(later)
    judged = plan.with_load(later)
    np.testing.assert_allclose(uniform.rank_load, judged.rank_load, rtol=1e-12)
    assert uniform.balance == pytest.approx(judged.balance)


def test_a_new_split_is_at_least_as_good_as_any_other(plan: eplb_rs.Plan, later: Array) -> None:
    splitter = Splitter(plan)
    best = splitter.split(later)
    fixed = splitter.split(plan.expert_load).applied_to(later)
    assert best.balance >= fixed.balance
    assert best.balance >= splitter.uniform(later).balance
    np.testing.assert_array_equal(fixed.lower_bound, best.lower_bound)
    np.testing.assert_array_equal(fixed.tight, best.tight)


def test_with_shares(plan: eplb_rs.Plan, later: Array) -> None:
    shares = plan.with_shares(later)
    np.testing.assert_array_equal(shares.by_slot, Splitter(plan).split(later).by_slot)
    assert shares.plan is plan
    assert plan.with_shares().balance >= plan.balance - 1e-12


def test_every_door_gives_the_same(plan: eplb_rs.Plan, later: npt.NDArray[np.float32]) -> None:
    splitter = Splitter(plan)
    shares = splitter.split(later)
    by_slot, level = np.empty((6, 80)), np.empty(6)
    splitter.split_into(later, by_slot, level)
    np.testing.assert_array_equal(by_slot, shares.by_slot)
    np.testing.assert_array_equal(level, shares.lower_bound)
    planner = eplb_rs.Planner(plan.topology)
    for layer in range(6):
        for row, largest in (
            splitter.split_step(later[layer], layer=layer),
            splitter.split_step(later[layer].tolist(), layer=layer, out=np.empty(80)),
            planner.split_step(later[layer], plan, layer=layer),
        ):
            np.testing.assert_array_equal(row, by_slot[layer])
            assert largest == level[layer]
    again = pickle.loads(pickle.dumps(splitter)).split(later)
    np.testing.assert_array_equal(again.by_slot, by_slot)
    for shares in (again, splitter.uniform(later)):
        copy = pickle.loads(pickle.dumps(shares))
        assert repr(copy) == repr(shares)
        np.testing.assert_array_equal(copy.by_slot, shares.by_slot)
        np.testing.assert_array_equal(copy.lower_bound, shares.lower_bound)
        assert not any(
            array.flags.writeable for array in (copy.by_slot, copy.rank_load, copy.expert_load)
        )


def test_whole_tokens(plan: eplb_rs.Plan, later: npt.NDArray[np.float32]) -> None:
    splitter = Splitter(plan)
    tokens = np.round(later).astype(np.int64)
    exact = splitter.split(tokens)
    for layer in range(6):
        quotas, level = splitter.split_tokens(tokens[layer], layer=layer)
        sums = np.bincount(plan.phy2log[layer], quotas)
        np.testing.assert_array_equal(sums.astype(np.int64), tokens[layer])
        assert quotas.min() >= 0
        assert quotas.reshape(8, 10).sum(axis=1).max() == level
        assert level == np.ceil(exact.lower_bound[layer] - 1e-6)
    rounded = exact.quotas(tokens)
    for layer in range(6):
        sums = np.bincount(plan.phy2log[layer], rounded[layer])
        np.testing.assert_array_equal(sums.astype(np.int64), tokens[layer])
    held = np.take_along_axis(tokens, plan.phy2log, axis=1)
    assert np.abs(rounded - exact.by_slot * held).max() < 1 + 1e-6


@pytest.mark.parametrize("width", [1, 2, 4, 16, 64])
def test_repeated_entries(plan: eplb_rs.Plan, later: Array, width: int) -> None:
    shares = Splitter(plan).split(later)
    table = shares.log2phy(width)
    assert table.shape == (6, 64, width)
    given = np.zeros((6, 80))
    for layer in range(6):
        for expert, row in enumerate(table[layer]):
            slots = row[row >= 0]
            assert len(slots) >= 1
            assert (row[len(slots) :] == -1).all()
            assert (plan.phy2log[layer, slots] == expert).all()
            np.add.at(given[layer], slots, 1 / len(slots))
    # An expert's nearest shares are off by half an entry at most; with few, by what they are.
    several = np.take_along_axis(plan.logcnt, plan.phy2log, axis=1)
    assert np.abs(given - shares.by_slot)[several == 2].max() <= 0.5 / width + 1e-9


def test_an_expert_without_load_is_split_evenly() -> None:
    plan = eplb_rs.Plan.from_phy2log(eplb_rs.Topology(1, 3, 2), [[0, 1, 0, 2, 0, 0]], [[0, 5, 7]])
    shares = Splitter(plan).split(plan.expert_load)
    np.testing.assert_array_equal(shares.by_slot, [[0.25, 1, 0.25, 1, 0.25, 0.25]])


def test_slots_of_one_rank_get_equal_parts() -> None:
    plan = eplb_rs.Plan.from_phy2log(eplb_rs.Topology(1, 2, 2), [[0, 0, 0, 1]], [[90, 10]])
    shares = Splitter(plan).split(plan.expert_load)
    np.testing.assert_allclose(shares.by_slot, [[25 / 90, 25 / 90, 40 / 90, 1]], rtol=1e-12)
    assert Splitter(plan).split_tokens([91, 10])[0].tolist() == [26, 25, 40, 10]


def test_layers_above_the_limit_for_staying_attached() -> None:
    """Longer work lets go of the interpreter; the answer is the same."""
    rng = np.random.default_rng(3)
    load = rng.lognormal(0, 1, (200, 48)).astype(np.float32)
    plan = eplb_rs.Planner(eplb_rs.Topology(1, 8, 7)).plan(load)
    splitter = Splitter(plan)
    shares = splitter.split(load)
    for layer in range(0, 200, 17):
        row, _ = splitter.split_step(load[layer], layer=layer)
        np.testing.assert_array_equal(row, shares.by_slot[layer])


def refused(code: str, argument: str) -> pytest.RaisesExc[eplb_rs.InvalidInputError]:
    return pytest.RaisesExc(
        eplb_rs.InvalidInputError, check=lambda e: (e.code, e.argument) == (code, argument)
    )


def test_bad_input(plan: eplb_rs.Plan, later: npt.NDArray[np.float32]) -> None:
    splitter = Splitter(plan)
    row, level = np.full(80, 7.0), np.full(6, 7.0)
    shares = splitter.split(later)
    read_only = np.empty(80)
    read_only.flags.writeable = False
    for code, argument, call in (
        ("wrong_type", "plan", lambda: Splitter(plan.phy2log)),
        ("wrong_shape", "load", lambda: splitter.split(later[:3])),
        ("negative", "load", lambda: splitter.split(-later)),
        ("not_finite", "load", lambda: splitter.split(later * np.nan)),
        ("wrong_shape", "load", lambda: splitter.split_step(later, out=row)),
        ("wrong_shape", "load", lambda: splitter.split_step(later[0, :5], out=row)),
        ("negative", "load", lambda: splitter.split_step(-later[0], out=row)),
        ("out_of_range", "layer", lambda: splitter.split_step(later[0], layer=6, out=row)),
        ("not_integer", "layer", lambda: splitter.split_step(later[0], layer=0.5, out=row)),
        ("negative", "layer", lambda: splitter.split_step(later[0], layer=-1, out=row)),
        ("wrong_shape", "out", lambda: splitter.split_step(later[0], out=row[:5])),
        ("wrong_dtype", "out", lambda: splitter.split_step(later[0], out=row.astype(np.float32))),
        ("wrong_type", "out", lambda: splitter.split_step(later[0], out=[0.0] * 80)),
        ("read_only", "out", lambda: splitter.split_step(later[0], out=read_only)),
        ("wrong_shape", "shares", lambda: splitter.split_into(later, row, level)),
        ("not_contiguous", "out", lambda: splitter.split_step(later[0], out=np.empty(160)[::2])),
        ("negative", "tokens", lambda: splitter.split_tokens(-np.ones(64, dtype=np.int64))),
        ("wrong_dtype", "tokens", lambda: splitter.split_tokens(later[0])),
        ("wrong_shape", "tokens", lambda: splitter.split_tokens([1, 2])),
        ("too_large", "tokens", lambda: splitter.split_tokens([2**60] * 64)),
        ("not_positive", "width", lambda: shares.log2phy(0)),
        ("too_large", "width", lambda: shares.log2phy(10**6)),
        ("wrong_shape", "tokens", lambda: shares.quotas([[1, 2]])),
    ):
        with refused(code, argument):
            call()
    assert (row == 7).all()
    assert (level == 7).all()
