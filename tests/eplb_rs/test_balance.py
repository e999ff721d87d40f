"""The balanced policy: how even its plans are, and that they are always the same.

Letters: L layers, E logical experts, R slots, D ranks.
"""

from __future__ import annotations

import pickle

import eplb_rs
import numpy as np
import numpy.typing as npt
import pytest
from eplb_rs import InfeasibleError, InvalidInputError, Plan, Planner, Topology
from eplb_rs.loads import read_loads
from hypothesis import given
from hypothesis import strategies as st
from placements import check
from recordings import DEEPSEEK_R1


def lognormal(sigma: float, layers: int = 58, experts: int = 256) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(0)
    return np.round(rng.lognormal(0, sigma, (layers, experts)) * 1000).astype(np.float32)


@pytest.mark.parametrize(
    ("gpus", "slots", "sigma", "want", "gap"),
    [
        (32, 9, 1.0, 0.9999, 2e-4),
        (32, 9, 0.5, 0.9999, 2e-4),
        (64, 5, 1.0, 0.9995, 5e-4),
        (64, 5, 0.5, 0.9997, 5e-4),
        (144, 2, 1.0, 0.7647, 0.05),
        (144, 2, 0.5, 0.969, 0.05),
        (320, 1, 1.0, 0.0, 1e-6),
    ],
)
def test_ranks_are_even(gpus: int, slots: int, sigma: float, want: float, gap: float) -> None:
    plan = Planner(Topology(1, gpus, slots), policy="balanced").plan(lognormal(sigma))
    check(plan)
    assert plan.balance >= want
    assert plan.gap <= gap


@pytest.mark.parametrize(
    ("gpus", "slots", "iterations", "wanted"),
    [
        (32, 9, 33, (0.9998, 0.9997, 0.9997)),
        (32, 9, 1000, (0.9999, 0.9999, 0.9999)),
        (64, 5, 140, (0.997, 0.9995, 0.9997)),
        (64, 5, 800, (0.9993, 0.9997, 0.9998)),
        (144, 2, 25, (0.537, 0.7645, 0.964)),
    ],
)
def test_so_many_steps_reach_so_much(
    gpus: int, slots: int, iterations: int, wanted: tuple[float, ...]
) -> None:
    loads = (read_loads(DEEPSEEK_R1).total, lognormal(1.0), lognormal(0.5))
    planner = Planner(Topology(1, gpus, slots), iterations=iterations)
    reference = Planner(Topology(1, gpus, slots), policy="deepseek")
    for load, balance in zip(loads, wanted, strict=True):
        plan = planner.plan(load)
        check(plan)
        assert plan.balance >= balance > reference.plan(load).balance
        assert plan.duplicates == 0


def test_groups_cost_what_they_must() -> None:
    load = read_loads(DEEPSEEK_R1).total
    plan = Planner(Topology(4, 8, 9), 8).plan(load)
    check(plan)
    assert plan.policy == "balanced"
    assert plan.balance >= 0.799  # at most .7996 with each group on one node


def test_more_steps_never_give_a_worse_plan() -> None:
    load = lognormal(1.0, 6)
    unlike = Topology(1, 32, 9, speeds=[1.0, 1.5] * 16)
    for topology, groups in (
        (Topology(1, 32, 9), 1),
        (Topology(1, 64, 5), 1),
        (Topology(1, 144, 2), 1),
        (Topology(4, 8, 9), 8),
        (unlike, 1),
    ):
        worst = np.full(len(load), np.inf)
        for iterations in (0, 1, 5, 30, 33, 60, 100, 150, 200, 400, 1000, 3000):
            planner = Planner(topology, groups, iterations=iterations)
            largest = planner.plan(load).rank_time.max(axis=1)
            assert (largest <= worst * (1 + 1e-6)).all()  # integer units round
            worst = largest


def test_a_time_limit_is_kept() -> None:
    load = lognormal(1.0)
    planner = Planner(Topology(1, 64, 5), policy="balanced", time_limit_us=20_000)
    plan = planner.plan(load)
    check(plan)
    assert plan.balance >= 0.99
    assert planner.last_timing.native_us >= 1000


def test_any_number_of_threads_gives_the_same_plan() -> None:
    load = lognormal(1.0, 13)
    for topology in (Topology(1, 64, 5), Topology(4, 8, 9), Topology(1, 144, 2)):
        plans = [
            Planner(topology, 1, "balanced", threads, iterations=200).plan(load)
            for threads in (1, 2, 3, 8, 1)
        ]
        assert all(plan == plans[0] for plan in plans)


def test_a_layer_does_not_depend_on_the_others() -> None:
    load = lognormal(1.0, 5)
    planner = Planner(Topology(1, 64, 5), policy="balanced")
    whole = planner.plan(load).phy2log
    for layer in range(5):
        assert np.array_equal(planner.plan(load[layer : layer + 1]).phy2log[0], whole[layer])


def test_groups_need_not_divide_over_nodes() -> None:
    load = lognormal(0.5, 4, 60)
    plan = Planner(Topology(3, 4, 10), 5, "balanced").plan(load)
    check(plan)
    for row in plan.phy2log.reshape(4, 3, 40):
        assert sum(len(set((slots // 12).tolist())) for slots in row) == 5


def test_groups_that_fit_on_no_node_are_infeasible() -> None:
    planner = Planner(Topology(4, 1, 3), 2, "balanced")
    with pytest.raises(InfeasibleError, match="whole groups"):
        planner.plan(np.ones((1, 8)))
    assert Planner(Topology(4, 1, 3), 2, "balanced", group_rule="free").plan(np.ones((1, 8)))


def test_settings_that_are_none_are_refused() -> None:
    topology = Topology(1, 2, 2)
    for settings, argument in (
        ({"group_rule": "loose"}, "group_rule"),
        ({"group_rule": 3}, "group_rule"),
        ({"iterations": -1}, "iterations"),
        ({"iterations": 1.5}, "iterations"),
        ({"time_limit_us": 0}, "time_limit_us"),
        ({"time_limit_us": float("nan")}, "time_limit_us"),
        ({"time_limit_us": "soon"}, "time_limit_us"),
        ({"iterations": 1, "time_limit_us": 1}, "time_limit_us"),
    ):
        with pytest.raises(InvalidInputError) as caught:
            Planner(topology, policy="balanced", **settings)  # type: ignore[arg-type]
        assert caught.value.argument == argument


def test_planners_keep_their_settings_when_pickled() -> None:
    planner = Planner(
        Topology(2, 2, 3, speeds=[1, 2, 1, 1]), 2, "balanced", group_rule="free", iterations=7
    )
    again = pickle.loads(pickle.dumps(planner))
    assert (again.group_rule, again.iterations, again.time_limit_us) == ("free", 7, None)
    assert again.topology == planner.topology


@given(
    data=st.data(),
    nodes=st.integers(1, 3),
    gpus=st.integers(1, 6),
    experts=st.integers(1, 40),
)
def test_anything_goes(data: st.DataObject, nodes: int, gpus: int, experts: int) -> None:
    num_gpus = nodes * gpus
    least = -(-experts // num_gpus)
    slots = data.draw(st.lists(st.integers(least, least + 3), min_size=num_gpus, max_size=num_gpus))
    speeds = data.draw(
        st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=num_gpus, max_size=num_gpus)
    )
    dead = data.draw(st.lists(st.integers(0, num_gpus - 1), max_size=num_gpus - 1, unique=True))
    topology = Topology(nodes, gpus, 1, slots=slots, speeds=speeds, dead=dead)
    values = st.sampled_from([0, 1, 5, 5, 90, 1e6])
    load = [data.draw(st.lists(values, min_size=experts, max_size=experts)) for _ in range(2)]
    live = sum(slots) - sum(slots[gpu] for gpu in dead)
    planner = Planner(topology, policy="balanced", iterations=50)
    if live < experts:
        with pytest.raises(InfeasibleError):
            planner.plan(load)
        return
    plan = planner.plan(load)
    for row in plan.phy2log:
        assert set(row[row >= 0].tolist()) == set(range(experts))
    assert (plan.rank_time.max(axis=1) >= plan.lower_bound * (1 - 1e-6)).all()
    assert Plan.from_json(plan.to_json()) == plan
    assert eplb_rs.Plan.from_phy2log(topology, plan.phy2log, load).phy2log.shape == (2, sum(slots))


def _optimum(load: npt.NDArray[np.float32], gpus: int, slots: int) -> float:
    """The least largest rank load, by HiGHS: a variable says that a rank has one of the expert's
    ``c`` replicas, another that it has ``c`` of them."""
    scipy = pytest.importorskip("scipy.optimize")
    experts = len(load)
    most = min(gpus, gpus * slots - experts + 1)
    options = [(e, c) for e in range(experts) for c in range(1, most + 1)]
    num_y = len(options)
    size = 1 + num_y + num_y * gpus  # the level, y[e, c], x[e, c, rank]

    def x(option: int, rank: int) -> int:
        return 1 + num_y + option * gpus + rank

    rows, low, high = [], [], []

    def add(row: dict[int, float], least: float, most: float) -> None:
        dense = np.zeros(size)
        for index, value in row.items():
            dense[index] = value
        rows.append(dense)
        low.append(least)
        high.append(most)

    for expert in range(experts):
        add({1 + i: 1 for i, (e, _) in enumerate(options) if e == expert}, 1, 1)
    for i, (_, c) in enumerate(options):
        add({**{x(i, r): 1 for r in range(gpus)}, 1 + i: -c}, 0, 0)
        for rank in range(gpus):
            add({x(i, rank): 1, 1 + i: -1}, -np.inf, 0)
    for rank in range(gpus):
        add({x(i, rank): 1 for i in range(num_y)}, slots, slots)
        shares = {x(i, rank): float(load[e]) / c for i, (e, c) in enumerate(options)}
        add({**shares, 0: -1}, -np.inf, 0)
    objective = np.zeros(size)
    objective[0] = 1
    result = scipy.milp(
        objective,
        constraints=scipy.LinearConstraint(np.array(rows), low, high),
        integrality=np.r_[0, np.ones(size - 1)],
        bounds=scipy.Bounds(0, np.r_[np.inf, np.ones(size - 1)]),
        options={"mip_rel_gap": 1e-6, "time_limit": 20},
    )
    assert result.status == 0, result.message
    return float(result.fun)


def test_an_exact_solver_finds_little_better() -> None:
    rng = np.random.default_rng(7)
    worst = 0.0
    for case in range(200):
        gpus, slots = [(2, 3), (3, 2), (2, 4), (3, 3)][case % 4]
        experts = int(rng.integers(slots, gpus * slots))
        load = np.round(rng.lognormal(0, 1, experts) * 100 + 1).astype(np.float32)
        plan = Planner(Topology(1, gpus, slots), policy="balanced").plan(load[None])
        best = _optimum(load, gpus, slots)
        got = float(plan.rank_load.max())
        assert plan.lower_bound[0] <= best * (1 + 1e-5)
        assert plan.tight_lower_bound()[0] <= best * (1 + 1e-5)
        assert got <= best * 1.01, (case, gpus, slots, load.tolist(), got, best)
        worst = max(worst, got / best - 1)
    assert worst <= 0.01
