"""The checks that users are offered catch what is broken, and say where."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import eplb_rs
import numpy as np
import numpy.typing as npt
import pytest
from eplb_rs import testing
from eplb_rs.testing import Problem
from hypothesis import given
from hypothesis import strategies as st

Ints = npt.NDArray[np.int64]


# The strategies


@given(testing.topologies(max_nodes=2, max_gpus_per_node=3, max_slots_per_gpu=5))
def test_topologies_stay_within_their_limits(topology: eplb_rs.Topology) -> None:
    assert topology.num_nodes <= 2
    assert topology.gpus_per_node <= 3
    assert topology.slots_per_gpu <= 5


@given(testing.loads(num_layers=3, max_experts=7))
def test_loads_are_loads(load: Any) -> None:
    assert load.dtype == np.float32
    assert load.shape[0] == 3
    assert 1 <= load.shape[1] <= 7
    assert (load >= 0).all()
    assert load.astype(np.float64).sum(axis=1).max() <= np.finfo(np.float32).max / 2


@given(st.data())
def test_placements_are_valid(data: st.DataObject) -> None:
    topology = data.draw(testing.topologies())
    num_experts = data.draw(st.integers(1, topology.num_slots))
    phy2log = data.draw(testing.placements(topology, num_experts=num_experts, num_layers=2))
    assert phy2log.shape == (2, topology.num_slots)
    testing.check_placement(phy2log, num_experts=num_experts)


@given(testing.problems())
def test_problems_can_be_solved(problem: Problem) -> None:
    assert problem.num_experts <= problem.topology.num_slots
    assert problem.num_experts % problem.num_groups == 0
    eplb_rs.rebalance_experts(problem.load, *problem.arguments)


@given(testing.problems(hierarchical=True), testing.problems(hierarchical=False))
def test_problems_are_of_the_kind_asked_for(inside: Problem, across: Problem) -> None:
    assert inside.is_hierarchical
    assert not across.is_hierarchical or across.topology.num_nodes == 1


@given(testing.plans())
def test_plans_hold(plan: eplb_rs.Plan) -> None:
    testing.check_plan(plan)


# The checks, on placements that are broken in one place

LOAD = np.arange(1.0, 13.0, dtype=np.float32).reshape(2, 6)
"""Two layers of six experts; below, on eight slots of four ranks of two nodes."""


def sound() -> tuple[Ints, Ints, Ints]:
    phy2log, log2phy, logcnt = eplb_rs.rebalance_experts(LOAD, 8, 2, 2, 4)
    return phy2log.copy(), log2phy.copy(), logcnt.copy()


def replaced(array: Ints, at: tuple[int, ...], value: int) -> Ints:
    array = array.copy()
    array[at] = value
    return array


def test_a_sound_placement_passes() -> None:
    torch = pytest.importorskip("torch")
    phy2log, log2phy, logcnt = sound()
    testing.check_placement(phy2log, log2phy, logcnt, num_experts=6)
    testing.check_placement(phy2log.tolist(), log2phy.tolist(), logcnt.tolist(), num_experts=6)
    tensors = map(torch.from_numpy, (phy2log, log2phy, logcnt))
    testing.check_placement(*tensors, num_experts=6)
    wider = np.pad(log2phy, ((0, 0), (0, 0), (0, 3)), constant_values=-1)
    testing.check_placement(phy2log.astype(np.uint8), wider, num_experts=6)
    testing.check_groups_stay_on_nodes(phy2log, num_experts=6, num_groups=2, num_nodes=2)


def broken() -> Iterator[tuple[str, tuple[Any, Any, Any], str]]:
    p, m, c = sound()
    twice = next(e for e in range(6) if c[1, e] == 2)
    once = next(e for e in range(6) if c[1, e] == 1)
    only = int(m[1, once, 0])
    other = int(m[1, twice, 0])
    yield "expert beyond", (replaced(p, (1, 3), 6), m, c), "layer 1, slot 3 holds 6"
    yield "dead slot", (replaced(p, (0, 2), -1), m, c), "layer 0, slot 2 holds -1"
    yield "no slot", (replaced(p, (1, only), twice), None, None), f"layer 1, expert {once} has no"
    yield "count", (p, m, replaced(c, (1, once), 2)), f"logcnt: layer 1, expert {once} has 1 slots"
    yield "count shape", (p, m, c[:, :5]), "logcnt: shape (2, 5), not (2, 6)"
    yield "count dtype", (p, m, c.astype(float)), "logcnt: dtype float64"
    yield "layers", (p, m[:1], c), "log2phy: shape (1, 6, 2), not (2, 6, 2)"
    yield "ragged", ([*p.tolist()[:1], [0]], m, c), "phy2log: setting an array element"
    yield "words", (p.astype(str), m, c), "phy2log: dtype <U21, not numbers"
    yield "flat", (p[0], m, c), "phy2log: shape (8,), not 2 dimensions"
    yield "empty", (p[:0], m, c), "phy2log: shape (0, 8)"
    yield "narrow", (p, m[:, :, :1], c), "log2phy: shape (2, 6, 1), not (2, 6, 2)"
    yield (
        "slot of another",
        (p, replaced(m, (1, once, 0), other), c),
        f"layer 1, expert {once} lists slot {other}, which holds expert {twice}",
    )
    yield (
        "listed twice",
        (p, replaced(m, (1, twice, 1), other), c),
        f"layer 1, expert {twice} lists slot {other} 2 times",
    )
    yield (
        "forgotten replica",
        (p, replaced(m, (1, twice, 1), -1), c),
        f"layer 1, expert {twice} has 2 slots in phy2log, but entry 1 is -1",
    )
    yield (
        "slot beyond",
        (p, replaced(m, (1, twice, 1), 8), c),
        f"layer 1, expert {twice} has 2 slots in phy2log, but entry 1 is 8",
    )
    yield (
        "padding",
        (p, replaced(m, (1, once, 1), only), c),
        f"layer 1, expert {once} has 1 slots in phy2log, so entry 1 ({only}) should be padding",
    )


@pytest.mark.parametrize(("maps", "message"), [pytest.param(m, t, id=i) for i, m, t in broken()])
def test_a_broken_placement_is_named(maps: tuple[Any, Any, Any], message: str) -> None:
    with pytest.raises(AssertionError) as caught:
        testing.check_placement(*maps, num_experts=6)
    assert message in str(caught.value)


@given(testing.plans(max_layers=2), st.data())
def test_any_changed_entry_is_caught(plan: eplb_rs.Plan, data: st.DataObject) -> None:
    """No entry of the three maps can be changed without contradicting another."""
    maps = {"phy2log": plan.phy2log, "log2phy": plan.log2phy, "logcnt": plan.logcnt}
    name = data.draw(st.sampled_from(sorted(maps)))
    changed = maps[name].copy()
    at = tuple(data.draw(st.integers(0, size - 1)) for size in changed.shape)
    changed[at] += data.draw(st.sampled_from([-1, 1, 1000, -1000, 2**62]))
    with pytest.raises(AssertionError):
        testing.check_placement(**{**maps, name: changed}, num_experts=plan.num_experts)


def test_a_group_on_two_nodes_is_named() -> None:
    check = testing.check_groups_stay_on_nodes
    phy2log = [[0, 1, 2, 3], [0, 3, 2, 1]]
    with pytest.raises(AssertionError, match="layer 1, slot 2 on node 1 holds expert 2 of group 1"):
        check(phy2log, num_experts=4, num_groups=2, num_nodes=2)
    check(phy2log, num_experts=4, num_groups=2, num_nodes=1)
    check(phy2log, num_experts=4, num_groups=4, num_nodes=4)
    with pytest.raises(AssertionError, match="do not divide"):
        check(phy2log, num_experts=4, num_groups=3, num_nodes=2)
    with pytest.raises(AssertionError, match="do not divide"):
        check(phy2log, num_experts=4, num_groups=4, num_nodes=3)


def test_an_expert_twice_on_a_rank_is_named() -> None:
    testing.check_no_duplicates([[0, 1, 1, 0]], num_gpus=2)
    with pytest.raises(AssertionError, match="layer 1, slots 3 and 5, both of rank 1, hold expert"):
        testing.check_no_duplicates([[0, 1, 2, 0, 1, 2], [0, 1, 2, 2, 0, 2]], num_gpus=2)
    with pytest.raises(AssertionError, match="do not divide"):
        testing.check_no_duplicates([[0, 1, 1]], num_gpus=2)
    testing.check_no_duplicates([[0, 1, -1, -1]], num_gpus=2)  # rank 1 is dead


def test_a_wrong_rank_load_is_named() -> None:
    phy2log, _, _ = sound()
    topology = eplb_rs.Topology(2, 2, 2)
    rank_load = eplb_rs.Plan.from_phy2log(topology, phy2log, LOAD).rank_load.copy()
    testing.check_rank_load(rank_load, phy2log, LOAD)
    rank_load[1, 2] *= 1.001
    with pytest.raises(AssertionError, match="layer 1, rank 2 carries"):
        testing.check_rank_load(rank_load, phy2log, LOAD)
    for told, load, message in (
        (rank_load[0], LOAD, "rank_load: shape"),
        (rank_load[:1], LOAD, "rank_load: shape"),
        (rank_load[:, :3], LOAD, "do not divide over 3 ranks"),
        (rank_load, LOAD[:1], "load: shape"),
        (rank_load, LOAD[0], "load: shape"),
    ):
        with pytest.raises(AssertionError, match=message):
            testing.check_rank_load(told, phy2log, load)


class Tampered(eplb_rs.Plan):
    """A plan some of whose answers are wrong."""

    wrong: dict[str, Any]

    def __getattribute__(self, name: str) -> Any:
        wrong = object.__getattribute__(self, "__dict__").get("wrong", {})
        return wrong[name] if name in wrong else super().__getattribute__(name)


def read_only(values: Any) -> Any:
    array = np.array(values)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("balance", lambda v: v * 0.99, "balance is"),
        ("balance", lambda _: 0.0, "balance is"),
        ("imbalance", lambda v: v * 1.01, "imbalance is"),
        ("lower_bound", lambda v: read_only(v * 2), "lower_bound: layer 0 claims"),
        ("lower_bound", lambda v: read_only(v / 2), "below the mean"),
        ("lower_bound", np.array, "lower_bound can be written to"),
        ("rank_load", lambda v: read_only(v[:, ::-1]), "rank_load: layer 0, rank 0 carries"),
        ("rank_load", lambda v: v[:, :-1], "rank_load: shape"),
        ("phy2log", np.array, "phy2log can be written to"),
        ("phy2log", lambda v: read_only(v[:, ::-1]), "log2phy: layer 0"),
        ("layer_duplicates", lambda v: v + 1, "layer_duplicates: layer 0 has 1, not 2"),
        ("logcnt", lambda v: read_only(v + 1), "logcnt: layer 0, expert 0"),
    ],
)
def test_a_plan_that_misstates_itself_is_named(
    name: str, change: Callable[[Any], Any], message: str
) -> None:
    topology = eplb_rs.Topology(2, 2, 2)
    plan = Tampered.from_phy2log(topology, sound()[0], LOAD, num_groups=2)
    testing.check_plan(plan)
    plan.wrong = {name: change(getattr(plan, name))}
    with pytest.raises(AssertionError) as caught:
        testing.check_plan(plan)
    assert message in str(caught.value)


def test_a_policy_plan_that_splits_a_group_is_named() -> None:
    topology = eplb_rs.Topology(2, 2, 2)
    phy2log = [[0, 3, 1, 4, 2, 5, 0, 3]] * 2
    plan = eplb_rs.Plan.from_phy2log(topology, phy2log, LOAD, num_groups=2, policy="deepseek")
    with pytest.raises(AssertionError, match="of group 0, which is on node 0"):
        testing.check_plan(plan)


# The check of a whole policy

PROBLEM = Problem(load=LOAD, topology=eplb_rs.Topology(2, 2, 2), num_groups=2)


def test_the_reference_policy_passes() -> None:
    testing.check_policy(eplb_rs.rebalance_experts, PROBLEM)


def trivial(weight: Any, num_replicas: int, *_: int) -> tuple[Ints, Ints, Ints]:
    planner = eplb_rs.Planner(eplb_rs.Topology(1, 1, num_replicas), policy="trivial")
    plan = planner.plan(weight)
    return plan.phy2log, plan.log2phy, plan.logcnt


def test_a_policy_that_splits_groups_is_named() -> None:
    testing.check_policy(trivial, PROBLEM, keeps_groups=False)
    with pytest.raises(AssertionError, match="of group 1, which is on node 0"):
        testing.check_policy(trivial, PROBLEM)


def test_a_policy_that_depends_on_the_call_is_named() -> None:
    calls = 0

    def fickle(weight: Any, *arguments: int) -> tuple[Ints, Ints, Ints]:
        nonlocal calls
        calls += 1
        turned = weight if calls % 2 else weight[:, ::-1]
        return eplb_rs.rebalance_experts(turned, *arguments)

    with pytest.raises(AssertionError, match="phy2log: differs between two calls"):
        testing.check_policy(fickle, PROBLEM)


def test_a_policy_that_mixes_layers_is_named() -> None:
    def mixing(weight: Any, *arguments: int) -> tuple[Ints, Ints, Ints]:
        ramp = np.where(np.arange(len(weight))[:, None] == 0, weight, weight[:, ::-1])
        return eplb_rs.rebalance_experts(ramp, *arguments)

    with pytest.raises(AssertionError, match="phy2log: differs when layers change places"):
        testing.check_policy(mixing, PROBLEM)


def test_a_policy_that_returns_something_else_is_named() -> None:
    problem = Problem(
        load=np.ones((1, 2), dtype=np.float32), topology=eplb_rs.Topology(1, 1, 2), num_groups=1
    )
    with pytest.raises(AssertionError, match="must return phy2log, log2phy and logcnt"):
        testing.check_policy(lambda *_: [[0, 1]], problem)  # type: ignore[arg-type,return-value]


def test_a_policy_that_writes_to_the_load_is_named() -> None:
    def writing(weight: Any, *arguments: int) -> tuple[Ints, Ints, Ints]:
        weight[0, 0] = 9.0
        return eplb_rs.rebalance_experts(weight, *arguments)

    with pytest.raises(AssertionError, match="changed the load"):
        testing.check_policy(writing, PROBLEM)


def test_without_hypothesis_the_import_says_what_to_install() -> None:
    program = """
import sys
import eplb_rs
assert "hypothesis" not in sys.modules
sys.modules["hypothesis"] = None
try:
    import eplb_rs.testing
except ImportError as error:
    assert "pip install 'eplb-rs[testing]'" in str(error)
else:
    raise SystemExit("imported")
"""
    subprocess.run([sys.executable, "-c", program], check=True)
