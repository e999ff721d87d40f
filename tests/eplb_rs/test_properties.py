"""What holds for every plan, whatever the load and the machines."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import eplb_rs
import numpy as np
import numpy.typing as npt
import pytest
import reference
from eplb_rs import Plan, Planner, Topology, testing
from eplb_rs.planner import PolicyName
from eplb_rs.testing import Problem
from hypothesis import assume, given
from hypothesis import strategies as st

Arrays = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]

BIG_MACHINES = testing.topologies(max_nodes=3, max_gpus_per_node=9, max_slots_per_gpu=12)
"""Enough slots for the paths that short lists never take."""

POLICIES: st.SearchStrategy[PolicyName] = st.sampled_from(("deepseek", "trivial"))


def maps(plan: Plan) -> Arrays:
    return plan.phy2log, plan.log2phy, plan.logcnt


def planned(problem: Problem, **options: Any) -> Plan:
    return Planner(problem.topology, problem.num_groups, **{"policy": "deepseek", **options}).plan(
        problem.load
    )


def assert_same(got: Arrays, wanted: Arrays) -> None:
    for name, one, other in zip(("phy2log", "log2phy", "logcnt"), got, wanted, strict=True):
        np.testing.assert_array_equal(one, other, err_msg=name, strict=True)


# The policy


@given(testing.problems())
def test_the_answer_is_that_of_the_reference(problem: Problem) -> None:
    got = eplb_rs.rebalance_experts(problem.load, *problem.arguments)
    assert_same(got, reference.rebalance_experts(problem.load, *problem.arguments))


@given(testing.problems(machines=BIG_MACHINES, max_layers=2))
def test_the_answer_is_that_of_the_reference_on_many_slots(problem: Problem) -> None:
    got = eplb_rs.rebalance_experts(problem.load, *problem.arguments)
    assert_same(got, reference.rebalance_experts(problem.load, *problem.arguments))


@pytest.mark.parametrize(
    ("num_experts", "arguments"),
    [
        (256, (288, 8, 4, 32)),
        (256, (288, 1, 1, 32)),
        (128, (160, 1, 1, 32)),
        (384, (448, 1, 1, 64)),
        (256, (288, 1, 1, 144)),
        (256, (320, 8, 8, 64)),
        (256, (1024, 1, 1, 32)),
        (512, (513, 1, 1, 1)),
        (7, (406, 7, 7, 7)),
        (200, (200, 100, 50, 50)),
    ],
)
@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0, 8.0])
def test_the_answer_is_that_of_the_reference_on_shapes_in_use(
    num_experts: int, arguments: tuple[int, int, int, int], spread: float
) -> None:
    random = np.random.default_rng([num_experts, *arguments])
    load = random.lognormal(4.0, spread, (6, num_experts)).astype(np.float32)
    load[3:] = np.floor(load[3:])  # ties
    got = eplb_rs.rebalance_experts(load, *arguments)
    assert_same(got, reference.rebalance_experts(load, *arguments))


@given(testing.problems())
def test_a_policy_passes_the_checks_for_policies(problem: Problem) -> None:
    testing.check_policy(eplb_rs.rebalance_experts, problem)


@given(testing.problems(), POLICIES)
def test_a_plan_passes_the_checks_for_plans(problem: Problem, policy: PolicyName) -> None:
    testing.check_plan(planned(problem, policy=policy))


@given(testing.problems(hierarchical=True))
def test_groups_stay_on_a_node(problem: Problem) -> None:
    testing.check_groups_stay_on_nodes(
        planned(problem).phy2log,
        num_experts=problem.num_experts,
        num_groups=problem.num_groups,
        num_nodes=problem.topology.num_nodes,
    )


@given(testing.problems(hierarchical=False))
def test_groups_and_nodes_are_ignored_where_they_do_not_divide(problem: Problem) -> None:
    num_replicas, _, _, num_gpus = problem.arguments
    assume(not problem.is_hierarchical)
    got = eplb_rs.rebalance_experts(problem.load, *problem.arguments)
    assert_same(got, eplb_rs.rebalance_experts(problem.load, num_replicas, 1, 1, num_gpus))


@given(testing.problems(), st.randoms(use_true_random=False), POLICIES)
def test_permuting_layers_permutes_the_plan(
    problem: Problem, random: Any, policy: PolicyName
) -> None:
    order = list(range(len(problem.load)))
    random.shuffle(order)
    planner = Planner(problem.topology, problem.num_groups, policy)
    plan, permuted = planner.plan(problem.load), planner.plan(problem.load[order])
    assert_same(maps(permuted), tuple(part[order] for part in maps(plan)))  # type: ignore[arg-type]


@given(testing.problems(), st.integers(-20, 20))
def test_scaling_by_a_power_of_two_changes_nothing(problem: Problem, power: int) -> None:
    scaled = problem.load.astype(np.float64) * 2.0**power
    normal = (scaled == 0) | (scaled >= 2.0**-100)
    assume(normal.all() and scaled.sum(axis=1).max() <= np.finfo(np.float32).max / 4)
    assume(((problem.load == 0) | (problem.load >= 2.0**-100)).all())
    got = eplb_rs.rebalance_experts(scaled, *problem.arguments)
    assert_same(got, eplb_rs.rebalance_experts(problem.load, *problem.arguments))


@given(testing.problems())
def test_the_sign_of_zero_changes_nothing(problem: Problem) -> None:
    negative = np.where(problem.load == 0, np.float32(-0.0), problem.load)
    one, other = (
        planned(problem),
        Planner(problem.topology, problem.num_groups, "deepseek").plan(negative),
    )
    assert_same(maps(one), maps(other))
    assert one == other
    assert hash(one) == hash(other)


@given(testing.problems())
def test_no_load_gives_an_even_plan(problem: Problem) -> None:
    plan = Planner(problem.topology).plan(np.zeros_like(problem.load))
    assert plan.balance == plan.imbalance == 1.0
    assert (plan.layer_imbalance == 1.0).all()
    assert (plan.rank_load == 0.0).all()


# How it is called


@given(testing.problems(), POLICIES)
def test_any_number_of_threads_gives_the_same_bytes(problem: Problem, policy: PolicyName) -> None:
    plan = planned(problem, policy=policy)
    for threads in range(2, 9):
        other = planned(problem, policy=policy, threads=threads)
        assert_same(maps(other), maps(plan))


@given(testing.problems(), st.sampled_from([None, False, True]))
def test_letting_go_of_the_interpreter_gives_the_same_bytes(
    problem: Problem, release: bool | None
) -> None:
    assert_same(maps(planned(problem, release_gil=release)), maps(planned(problem)))


@given(testing.problems())
def test_every_form_of_input_gives_the_same_bytes(problem: Problem) -> None:
    torch = pytest.importorskip("torch")
    load, arguments = problem.load, problem.arguments
    wanted = eplb_rs.rebalance_experts(load, *arguments)
    strided = np.zeros((load.shape[0] * 2, load.shape[1] * 3), dtype=np.float32)
    strided[::2, ::3] = load
    forms = [
        load.astype(np.float64),
        load.astype(np.longdouble),
        load.astype(">f4"),
        load.astype(">f8"),
        np.asfortranarray(load),
        strided[::2, ::3],
        np.ascontiguousarray(load[::-1, ::-1])[::-1, ::-1],
        load.tolist(),
        [tuple(row) for row in load],
        np.ma.masked_array(load),
    ]
    whole = load.astype(np.int64) if (load < 2**62).all() else None
    if whole is not None and (whole == load).all():
        kinds: list[Any] = [np.int64, np.uint64, ">i8"]
        kinds += [kind for kind in (np.uint8, np.int32) if whole.max() <= np.iinfo(kind).max]
        forms += [whole.astype(kind) for kind in kinds]
    for form in forms:
        assert_same(eplb_rs.rebalance_experts(form, *arguments), wanted)
    tensor = torch.from_numpy(load)
    tensors = [
        tensor,
        tensor.double(),
        tensor.clone().requires_grad_(),
        tensor.T.contiguous().T,
        tensor.to_sparse(),
        torch.stack([tensor, tensor], dim=2)[:, :, 1],
    ]
    for form in tensors:
        answer = eplb_rs.rebalance_experts(form, *arguments)
        assert_same(tuple(part.numpy() for part in answer), wanted)


@given(testing.problems(), POLICIES, st.integers(0, 2), st.booleans())
def test_planning_into_buffers_gives_the_same_bytes(
    problem: Problem, policy: PolicyName, extra: int, with_log2phy: bool
) -> None:
    planner = Planner(problem.topology, problem.num_groups, policy)
    plan = planner.plan(problem.load)
    width = plan.log2phy.shape[2] + extra if with_log2phy else 0
    out = planner.allocate(plan.num_layers, plan.num_experts, width)
    for buffer in (out.phy2log, out.log2phy, out.logcnt):
        if buffer is not None:
            buffer.fill(-7)  # every entry is written, whatever was there
    planner.plan_into(problem.load, out)
    assert (out.log2phy is None) == (not with_log2phy)
    log2phy = plan.log2phy
    if out.log2phy is not None:
        assert (out.log2phy[:, :, plan.log2phy.shape[2] :] == -1).all()
        log2phy = out.log2phy[:, :, : plan.log2phy.shape[2]]
    assert_same((out.phy2log, log2phy, out.logcnt), maps(plan))


@given(testing.problems())
def test_what_a_planner_did_before_changes_nothing(problem: Problem) -> None:
    planner = Planner(problem.topology, problem.num_groups, "deepseek")
    first = planner.plan(problem.load)
    many = np.repeat(problem.load[:, ::-1], 3, axis=0)
    planner.plan(many)
    planner.plan(problem.load[:1])
    assert_same(maps(planner.plan(problem.load)), maps(first))
    assert_same(maps(planned(problem)), maps(first))


@given(testing.problems())
def test_a_plan_outlives_its_planner_and_its_load(problem: Problem) -> None:
    load = problem.load.copy()
    plan = Planner(problem.topology, problem.num_groups, "deepseek").plan(load)
    arrays, rank_load = maps(plan), plan.rank_load
    load[:] = 1.0
    assert_same(arrays, reference.rebalance_experts(problem.load, *problem.arguments))
    np.testing.assert_array_equal(plan.expert_load, problem.load)
    testing.check_rank_load(rank_load, plan.phy2log, problem.load)


# What a plan says of itself


@given(testing.plans())
def test_ranks_carry_the_whole_load(plan: Plan) -> None:
    total = plan.expert_load.astype(np.float64).sum(axis=1)
    np.testing.assert_allclose(plan.rank_load.sum(axis=1), total, rtol=1e-12, atol=0.0)


@given(testing.plans())
def test_balance_is_a_fraction_and_the_bound_is_below_it(plan: Plan) -> None:
    largest, mean = plan.rank_load.max(axis=1), plan.rank_load.mean(axis=1)
    assert 0.0 < plan.balance <= 1.0
    assert plan.imbalance >= 1.0
    assert (plan.layer_imbalance >= 1.0).all()
    assert (plan.lower_bound <= largest * (1 + 1e-12)).all()
    assert (plan.lower_bound >= mean * (1 - 1e-12)).all()


@given(st.integers(1, 100), st.floats(0.0, 1e9, width=32), st.integers(1, 3))
def test_even_ranks_are_balanced_to_the_last_digit(
    num_gpus: int, tokens: float, num_layers: int
) -> None:
    plan = Planner(Topology(1, num_gpus, 1)).plan([[tokens]] * num_layers)
    assert plan.balance <= 1.0 <= plan.imbalance
    assert (plan.layer_imbalance >= 1.0).all()
    assert plan.balance == pytest.approx(1.0, abs=1e-12)


def least_largest_load(load: npt.NDArray[Any], topology: Topology) -> float:
    """The least load of the heaviest rank over all placements of one layer, by trying all."""
    num_gpus, width = topology.num_gpus, topology.slots_per_gpu
    best = np.inf

    def place(slot: int, held: list[int]) -> None:
        nonlocal best
        if slot == topology.num_slots:
            counts = np.bincount(held, minlength=len(load))
            if counts.all():
                shares = (load / counts)[held].reshape(num_gpus, width).sum(axis=1)
                best = min(best, float(shares.max()))
            return
        # Order within a rank does not matter.
        first = 0 if slot % width == 0 else held[-1]
        for expert in range(first, len(load)):
            place(slot + 1, [*held, expert])

    place(0, [])
    return best


@given(
    testing.loads(num_layers=1, max_experts=4),
    st.sampled_from([Topology(1, 2, 2), Topology(1, 2, 3), Topology(1, 3, 2), Topology(1, 4, 1)]),
)
def test_no_placement_beats_the_lower_bound(load: Any, topology: Topology) -> None:
    assume(load.shape[1] <= topology.num_slots)
    bound = Planner(topology).plan(load).lower_bound[0]
    assert bound <= least_largest_load(load[0].astype(np.float64), topology) * (1 + 1e-12)


@given(testing.plans())
def test_duplicates_are_repeats_on_a_rank(plan: Plan) -> None:
    width = plan.topology.slots_per_gpu
    for layer, row in enumerate(plan.phy2log.tolist()):
        ranks = [row[start : start + width] for start in range(0, len(row), width)]
        assert plan.layer_duplicates[layer] == sum(len(rank) - len(set(rank)) for rank in ranks)
    assert plan.duplicates == plan.layer_duplicates.sum()


@given(testing.plans(), st.data())
def test_another_load_judges_the_same_placement(plan: Plan, data: st.DataObject) -> None:
    load = data.draw(testing.loads(num_layers=plan.num_layers, num_experts=plan.num_experts))
    other = plan.with_load(load)
    assert_same(maps(other), maps(plan))
    assert (other.topology, other.num_groups, other.policy, other.layer_ids) == (
        plan.topology,
        plan.num_groups,
        plan.policy,
        plan.layer_ids,
    )
    testing.check_rank_load(other.rank_load, plan.phy2log, load)
    assert (other == plan) == bool((load == plan.expert_load).all())


@given(testing.plans())
def test_a_placement_from_elsewhere_is_numbered_by_slot(plan: Plan) -> None:
    again = Plan.from_phy2log(plan.topology, plan.phy2log, plan.expert_load)
    testing.check_plan(again)
    assert again.phy2log.tobytes() == plan.phy2log.tobytes()
    np.testing.assert_array_equal(again.logcnt, plan.logcnt)
    used = np.where(again.log2phy < 0, plan.topology.num_slots, again.log2phy)
    assert (np.diff(used, axis=2) >= 0).all()


# How it is kept


def assert_all_kept(again: Plan, plan: Plan) -> None:
    assert again == plan
    assert hash(again) == hash(plan)
    assert repr(again) == repr(plan)
    assert_same(maps(again), maps(plan))
    assert again.expert_load.tobytes() == plan.expert_load.tobytes()
    assert again.layer_ids == plan.layer_ids
    assert again.topology == plan.topology
    assert again.num_groups == plan.num_groups
    assert again.policy == plan.policy


@given(testing.plans())
def test_json_gives_the_plan_back(plan: Plan) -> None:
    text = plan.to_json()
    assert_all_kept(Plan.from_json(text), plan)
    assert_all_kept(Plan.from_json(json.dumps(json.loads(text))), plan)
    assert Plan.from_json(text).to_json() == text


@given(testing.plans())
def test_pickling_and_copying_give_the_plan_back(plan: Plan) -> None:
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert_all_kept(pickle.loads(pickle.dumps(plan, protocol)), plan)
    assert_all_kept(copy.copy(plan), plan)
    assert_all_kept(copy.deepcopy(plan), plan)


@pytest.mark.parametrize("name", ["plan.json", "a name, with spaces & umlauts äöü"])
def test_a_file_gives_the_plan_back(tmp_path: Path, name: str) -> None:
    plan = Planner(Topology(1, 2, 3)).plan([[0.1, 2, 3], [1e-40, 1e30, 7]], layer_ids=[3, 60])
    plan.save(tmp_path / name)
    assert_all_kept(Plan.load(tmp_path / name), plan)
    assert_all_kept(Plan.load(str(tmp_path / name)), plan)


@given(testing.problems())
def test_equal_requests_give_equal_plans(problem: Problem) -> None:
    one, other = planned(problem), planned(problem, threads=2)
    assert one == other
    assert hash(one) == hash(other)
    assert len({one, other}) == 1
    assert one != "a plan"


def test_plans_differ_by_load_layers_machines_and_slots() -> None:
    topology = Topology(1, 2, 2)
    plan = Planner(topology).plan([[1, 2, 3], [4, 5, 6]])
    others = [
        plan.with_load([[1, 2, 3], [4, 5, 7]]),
        Planner(topology).plan([[1, 2, 3], [4, 5, 6]], layer_ids=[0, 2]),
        Planner(topology).plan([[1, 2, 3]]),
        Plan.from_phy2log(topology, plan.phy2log[:, ::-1], plan.expert_load),
        Plan.from_phy2log(Topology(2, 1, 2), plan.phy2log, plan.expert_load),
        Plan.from_phy2log(Topology(1, 1, 4), plan.phy2log, plan.expert_load),
    ]
    for other in others:
        assert plan != other
    assert len({plan, *others}) == 1 + len(others)


@given(testing.topologies())
def test_topologies_compare_pickle_and_print(topology: Topology) -> None:
    sizes = (topology.num_nodes, topology.gpus_per_node, topology.slots_per_gpu)
    for again in (
        Topology(*sizes),
        pickle.loads(pickle.dumps(topology)),
        copy.deepcopy(topology),
        eval(repr(topology), {"Topology": Topology}),
        Topology.from_totals(
            num_replicas=topology.num_slots,
            num_nodes=topology.num_nodes,
            num_gpus=topology.num_gpus,
        ),
    ):
        assert again == topology
        assert hash(again) == hash(topology)
    assert topology != Topology(sizes[0] + 1, *sizes[1:])
    assert topology != sizes


@given(testing.problems(), POLICIES)
def test_planners_pickle(problem: Problem, policy: PolicyName) -> None:
    planner = Planner(problem.topology, problem.num_groups, policy, release_gil=False)
    again = pickle.loads(pickle.dumps(planner))
    assert repr(again) == repr(planner)
    assert again.release_gil is False
    assert again.plan(problem.load) == planner.plan(problem.load)


def test_no_array_of_a_plan_can_be_written_to() -> None:
    plan = Planner(Topology(1, 2, 2)).plan([[1, 2, 3]])
    for name in ("phy2log", "log2phy", "logcnt"):
        array = getattr(plan, name)
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True
    for name in ("expert_load", "rank_load", "lower_bound", "layer_imbalance", "layer_duplicates"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(plan, name)[:] = 0
    for name in ("topology", "balance", "policy"):
        with pytest.raises(AttributeError):
            setattr(plan, name, None)
    with pytest.raises(TypeError, match=r"Planner\.plan"):
        Plan()
