"""What is checked: placements, rank loads, plans and policies.

Letters: L layers, E logical experts, R slots, G expert groups, N nodes, D ranks (GPUs), X the most
replicas of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from eplb_rs._inputs import is_tensor

if TYPE_CHECKING:
    import numpy.typing as npt

    from eplb_rs.plan import Plan
    from eplb_rs.testing.strategies import Problem

__all__ = [
    "check_groups_stay_on_nodes",
    "check_no_duplicates",
    "check_placement",
    "check_plan",
    "check_policy",
    "check_rank_load",
]

Rebalance: TypeAlias = Callable[[Any, int, int, int, int], tuple[Any, Any, Any]]
"""What :func:`eplb_rs.rebalance_experts` is, called with positional arguments."""


def check_placement(
    phy2log: Any,
    log2phy: Any = None,
    logcnt: Any = None,
    *,
    num_experts: int,
    dead_slots: Any = None,
) -> None:
    """Checks that every slot holds an expert, every expert has a slot, and the maps agree.

    Args:
        phy2log: `[L, R]` integers, the expert in each slot.
        log2phy: `[L, E, X]` or wider, the slots of each expert, each once, in any order; -1 pads
            the end. May be left out.
        logcnt: `[L, E]`, how many slots each expert has. May be left out.
        num_experts: E.
        dead_slots: `[R]` booleans, the slots of dead GPUs, which hold -1. None by default.

    Raises:
        AssertionError: Naming the layer, and the slot or expert, of the first fault.

    >>> check_placement([[0, 1, 1, 2]], [[[0, -1], [2, 1], [3, -1]]], [[1, 2, 1]], num_experts=3)
    >>> check_placement([[0, 1, 1, 2]], [[[0, -1], [2, 3], [3, -1]]], num_experts=3)
    Traceback (most recent call last):
        ...
    AssertionError: log2phy: layer 0, expert 1 lists slot 3, which holds expert 2
    """
    slots = _integers(phy2log, "phy2log", 2)
    num_layers, num_slots = slots.shape
    dead = np.zeros(num_slots, dtype=bool) if dead_slots is None else np.asarray(dead_slots)
    _forbid(
        dead & (slots != -1),
        lambda at: f"phy2log: layer {at[0]}, slot {at[1]} of a dead GPU holds {slots[at]}, not -1",
    )
    _forbid(
        ~dead & ((slots < 0) | (slots >= num_experts)),
        lambda at: (
            f"phy2log: layer {at[0]}, slot {at[1]} holds {slots[at]}, which is no expert "
            f"(0 to {num_experts - 1})"
        ),
    )
    counts = np.zeros((num_layers, num_experts), dtype=np.int64)
    layer = np.arange(num_layers)[:, None]
    np.add.at(counts, (layer, slots[:, ~dead]), 1)
    _forbid(counts == 0, lambda at: f"phy2log: layer {at[0]}, expert {at[1]} has no slot")
    if logcnt is not None:
        told = _integers(logcnt, "logcnt", 2)
        _expect_shape("logcnt", told, counts.shape)
        _forbid(
            told != counts,
            lambda at: (
                f"logcnt: layer {at[0]}, expert {at[1]} has {counts[at]} slots in phy2log, "
                f"{told[at]} in logcnt"
            ),
        )
    if log2phy is not None:
        _check_log2phy(slots, _integers(log2phy, "log2phy", 3), counts)


def _check_log2phy(
    slots: npt.NDArray[np.int64], listed: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]
) -> None:
    (num_layers, num_slots), num_experts = slots.shape, counts.shape[1]
    width = max(listed.shape[2], int(counts.max()))
    _expect_shape("log2phy", listed, (num_layers, num_experts, width))

    def name(at: tuple[int, ...]) -> str:
        return f"log2phy: layer {at[0]}, expert {at[1]}"

    used = np.arange(width) < counts[..., None]
    _forbid(
        used & ((listed < 0) | (listed >= num_slots)),
        lambda at: (
            f"{name(at)} has {counts[at[:2]]} slots in phy2log, but entry {at[2]} is "
            f"{listed[at]}, which is no slot (0 to {num_slots - 1})"
        ),
    )
    _forbid(
        ~used & (listed != -1),
        lambda at: (
            f"{name(at)} has {counts[at[:2]]} slots in phy2log, so entry {at[2]} "
            f"({listed[at]}) should be padding (-1)"
        ),
    )
    layer, expert, _ = np.nonzero(used)
    slot = listed[used]
    held = slots[layer, slot]
    for entry in np.flatnonzero(held != expert)[:1]:
        raise AssertionError(
            f"{name((layer[entry], expert[entry]))} lists slot {slot[entry]}, which holds expert "
            f"{held[entry]}"
        )
    times = np.zeros(slots.shape, dtype=np.int64)
    np.add.at(times, (layer, slot), 1)
    _forbid(
        times > 1,
        lambda at: f"{name((at[0], slots[at]))} lists slot {at[1]} {times[at]} times",
    )


def check_groups_stay_on_nodes(
    phy2log: Any, *, num_experts: int, num_groups: int, num_nodes: int
) -> None:
    """Checks that all replicas of all experts of a group are on one node.

    Args:
        phy2log: `[L, R]` integers, the expert in each slot; node `n` owns slots `n R/N` onwards.
        num_experts: E; group `g` is the experts from `g E/G` onwards.
        num_groups: G.
        num_nodes: N.

    Raises:
        AssertionError: Naming the layer, the slot and the group of the first fault.

    >>> check_groups_stay_on_nodes([[0, 1, 2, 3]], num_experts=4, num_groups=2, num_nodes=2)
    >>> check_groups_stay_on_nodes([[0, 2, 1, 3]], num_experts=4, num_groups=2, num_nodes=2)
    Traceback (most recent call last):
        ...
    AssertionError: phy2log: layer 0, slot 2 on node 1 holds expert 1 of group 0, which is on node 0
    """
    slots = _integers(phy2log, "phy2log", 2)
    check_placement(slots, num_experts=num_experts)
    num_layers, num_slots = slots.shape
    if num_slots % num_nodes or num_experts % num_groups:
        raise AssertionError(
            f"{num_slots} slots do not divide over {num_nodes} nodes, or {num_experts} experts "
            f"into {num_groups} groups"
        )
    node = np.broadcast_to(np.arange(num_slots) // (num_slots // num_nodes), slots.shape)
    group = slots // (num_experts // num_groups)
    first = np.full((num_layers, num_groups), num_nodes)
    layer = np.broadcast_to(np.arange(num_layers)[:, None], slots.shape)
    np.minimum.at(first, (layer, group), node)
    _forbid(
        node != first[layer, group],
        lambda at: (
            f"phy2log: layer {at[0]}, slot {at[1]} on node {node[at]} holds expert "
            f"{slots[at]} of group {group[at]}, which is on node {first[at[0], group[at]]}"
        ),
    )


def check_no_duplicates(phy2log: Any, *, num_gpus: int) -> None:
    """Checks that no rank holds an expert twice, which would serve no balance.

    DeepSeek's policy does not promise this; some engines refuse a placement without it.

    Args:
        phy2log: `[L, R]` integers, the expert in each slot; rank `d` owns slots `d R/D` onwards.
            Slots that hold nothing (-1) count for nothing.
        num_gpus: D.

    Raises:
        AssertionError: Naming the layer, the slots and the expert of the first fault.

    >>> check_no_duplicates([[0, 1, 1, 0]], num_gpus=2)
    >>> check_no_duplicates([[0, 0, 1, 1]], num_gpus=2)
    Traceback (most recent call last):
        ...
    AssertionError: phy2log: layer 0, slots 0 and 1, both of rank 0, hold expert 0
    """
    slots = _integers(phy2log, "phy2log", 2)
    num_layers, num_slots = slots.shape
    if num_slots % num_gpus:
        raise AssertionError(f"{num_slots} slots do not divide over {num_gpus} ranks")
    ranks = slots.reshape(num_layers, num_gpus, -1)
    order = np.argsort(ranks, axis=2, kind="stable")
    held = np.take_along_axis(ranks, order, axis=2)

    def message(at: tuple[int, ...]) -> str:
        layer, rank, place = at
        base = rank * ranks.shape[2]
        first, second = (base + order[layer, rank, place + i] for i in (0, 1))
        return (
            f"phy2log: layer {layer}, slots {first} and {second}, both of rank {rank}, hold "
            f"expert {held[at]}"
        )

    _forbid((held[..., 1:] == held[..., :-1]) & (held[..., 1:] >= 0), message)


def check_rank_load(rank_load: Any, phy2log: Any, load: Any, *, rtol: float = 1e-9) -> None:
    """Checks the load of each rank: its slots' shares, an expert's slots sharing its load evenly.

    Args:
        rank_load: `[L, D]` numbers, in the unit of the load.
        phy2log: `[L, R]` integers, the expert in each slot; rank `d` owns slots `d R/D` onwards.
        load: `[L, E]` numbers.
        rtol: How far a rank may be off, relative to what it should carry.

    Raises:
        AssertionError: Naming the layer and rank of the first fault.

    >>> check_rank_load([[5.0, 7.0]], [[0, 1, 2, 1]], [[3, 4, 5]])
    >>> check_rank_load([[5.0, 8.0]], [[0, 1, 2, 1]], [[3, 4, 5]])
    Traceback (most recent call last):
        ...
    AssertionError: rank_load: layer 0, rank 1 carries 7.0, not 8.0
    """
    tokens, told = _array(load, "load", 2), _array(rank_load, "rank_load", 2)
    slots = _integers(phy2log, "phy2log", 2)
    _expect_shape("load", tokens, (len(slots), tokens.shape[1]))
    check_placement(slots, num_experts=tokens.shape[1])
    num_gpus = told.shape[1]
    _expect_shape("rank_load", told, (len(slots), num_gpus))
    if slots.shape[1] % num_gpus:
        raise AssertionError(f"{slots.shape[1]} slots do not divide over {num_gpus} ranks")
    rank_of_slot = np.repeat(np.arange(num_gpus), slots.shape[1] // num_gpus)
    _check_carried(told, slots, tokens, rank_of_slot, rtol)


def _check_carried(
    told: npt.NDArray[np.float64],
    slots: npt.NDArray[np.int64],
    tokens: npt.NDArray[np.float64],
    rank_of_slot: npt.NDArray[np.int64],
    rtol: float,
) -> None:
    """Checks what ranks carry; slots that hold -1 carry nothing."""
    carried = np.zeros(told.shape)
    for layer, row in enumerate(slots):
        held = row >= 0
        counts = np.bincount(row[held], minlength=tokens.shape[1])
        shares = tokens[layer] / counts
        np.add.at(carried[layer], rank_of_slot[held], shares[row[held]])
    _forbid(
        ~np.isclose(told, carried, rtol=rtol, atol=0.0),
        lambda at: f"rank_load: layer {at[0]}, rank {at[1]} carries {carried[at]}, not {told[at]}",
    )


def check_plan(plan: Plan, *, keeps_groups: bool | None = None) -> None:
    """Checks all that a :class:`eplb_rs.Plan` says of itself.

    Its maps agree, and slots of dead GPUs hold nothing; groups stay on nodes where the policy keeps
    them; ranks carry what their slots hold, all of the load between them, and the slowest takes no
    less than the lower bound; balance and imbalance are what they are defined to be; nothing of it
    can be written to.

    Args:
        plan: The plan.
        keeps_groups: Whether groups must stay on one node; by default where its policy is
            ``"deepseek"`` and they divide over nodes.

    Raises:
        AssertionError: Saying what does not hold.

    >>> from eplb_rs import Planner, Topology
    >>> check_plan(Planner(Topology(1, 2, 2)).plan([[5, 1, 2]]))
    """
    topology, num_layers = plan.topology, plan.num_layers
    live = np.ones(topology.num_gpus, dtype=bool)
    live[topology.dead] = False
    rank_of_slot = np.repeat(np.arange(topology.num_gpus), topology.slots)
    check_placement(
        plan.phy2log,
        plan.log2phy,
        plan.logcnt,
        num_experts=plan.num_experts,
        dead_slots=~live[rank_of_slot],
    )
    _expect_shape("phy2log", plan.phy2log, (num_layers, topology.num_slots))
    if keeps_groups is None:
        keeps_groups = plan.policy == "deepseek" and plan.num_groups % topology.num_nodes == 0
    if keeps_groups:
        check_groups_stay_on_nodes(
            plan.phy2log,
            num_experts=plan.num_experts,
            num_groups=plan.num_groups,
            num_nodes=topology.num_nodes,
        )
    _expect_shape("rank_load", plan.rank_load, (num_layers, topology.num_gpus))
    tokens = plan.expert_load.astype(np.float64)
    _check_carried(plan.rank_load, plan.phy2log, tokens, rank_of_slot, rtol=1e-9)
    for name in ("phy2log", "log2phy", "logcnt", "expert_load", "rank_load", "lower_bound"):
        if getattr(plan, name).flags.writeable:
            raise AssertionError(f"{name} can be written to")
    largest = plan.rank_time[:, live].max(axis=1)
    mean = np.minimum(plan.rank_load.sum(axis=1) / live.sum(), largest)
    _forbid(
        plan.lower_bound > largest * (1 + 1e-9),
        lambda at: (
            f"lower_bound: layer {at[0]} claims {plan.lower_bound[at]}, but the slowest "
            f"rank takes {largest[at]}"
        ),
    )
    _forbid(
        plan.lower_bound < mean * (1 - 1e-9),
        lambda at: (
            f"lower_bound: layer {at[0]} claims {plan.lower_bound[at]}, below the mean "
            f"rank load {mean[at]}"
        ),
    )
    balance = mean.sum() / largest.sum() if largest.sum() > 0 else 1.0
    if not np.isclose(plan.balance, balance, rtol=1e-9) or not 0 < plan.balance <= 1:
        raise AssertionError(f"balance is {plan.balance}, not {balance}")
    if not np.isclose(plan.imbalance, 1 / balance, rtol=1e-9):
        raise AssertionError(f"imbalance is {plan.imbalance}, not {1 / balance}")
    held = np.sort(np.where(plan.phy2log < 0, -1, rank_of_slot * plan.num_experts + plan.phy2log))
    repeated = ((held[:, 1:] == held[:, :-1]) & (held[:, 1:] >= 0)).sum(axis=1)
    _forbid(
        plan.layer_duplicates != repeated,
        lambda at: (
            f"layer_duplicates: layer {at[0]} has {repeated[at]}, not {plan.layer_duplicates[at]}"
        ),
    )


def check_policy(
    rebalance: Rebalance, problem: Problem, *, keeps_groups: bool | None = None
) -> None:
    """Checks a policy on a problem: its placement is valid, repeatable, and of each layer alone.

    Calls it three times: twice with the problem, once with the layers in reverse.

    Args:
        rebalance: The policy, called as :func:`eplb_rs.rebalance_experts` is, with positional
            arguments: load, replicas, groups, nodes, GPUs.
        problem: What to solve; see :func:`problems`.
        keeps_groups: Whether groups must stay on one node; by default where they divide over
            nodes.

    Raises:
        AssertionError: Saying what does not hold.
    """
    topology, load = problem.topology, problem.load
    given = load.copy()
    answer: Sequence[Any] = rebalance(given, *problem.arguments)
    if given.tobytes() != load.tobytes():
        raise AssertionError("the policy changed the load that it was given")
    if len(answer) != 3:
        raise AssertionError("the policy must return phy2log, log2phy and logcnt")
    phy2log, log2phy, logcnt = (np.asarray(_plain(part)) for part in answer)
    _expect_shape("phy2log", phy2log, (len(load), topology.num_slots))
    check_placement(phy2log, log2phy, logcnt, num_experts=problem.num_experts)
    if problem.is_hierarchical if keeps_groups is None else keeps_groups:
        check_groups_stay_on_nodes(
            phy2log,
            num_experts=problem.num_experts,
            num_groups=problem.num_groups,
            num_nodes=topology.num_nodes,
        )
    for layers, turned, what in (
        (load, slice(None), "between two calls with the same load"),
        (np.ascontiguousarray(load[::-1]), slice(None, None, -1), "when layers change places"),
    ):
        again = rebalance(layers, *problem.arguments)
        for name, before, after in zip(
            ("phy2log", "log2phy", "logcnt"), (phy2log, log2phy, logcnt), again, strict=True
        ):
            if not np.array_equal(before, np.asarray(_plain(after))[turned]):
                raise AssertionError(f"{name}: differs {what}")


# What the checks share


def _plain(values: Any) -> Any:
    """What NumPy can read: a tensor becomes an array."""
    return values.detach().cpu().numpy() if is_tensor(values) else values


def _integers(values: Any, name: str, ndim: int) -> npt.NDArray[np.int64]:
    array = _array(values, name, ndim)
    if array.dtype.kind not in "iu":
        raise AssertionError(f"{name}: dtype {array.dtype}, not integers")
    return array.astype(np.int64)


def _array(values: Any, name: str, ndim: int) -> npt.NDArray[Any]:
    try:
        array = np.asarray(_plain(values))
    except ValueError as error:  # rows of different length
        raise AssertionError(f"{name}: {error}") from None
    if array.ndim != ndim or array.size == 0:
        raise AssertionError(f"{name}: shape {array.shape}, not {ndim} dimensions with something")
    if array.dtype.kind not in "iuf":
        raise AssertionError(f"{name}: dtype {array.dtype}, not numbers")
    return array


def _expect_shape(name: str, array: npt.NDArray[Any], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise AssertionError(f"{name}: shape {array.shape}, not {shape}")


def _forbid(wrong: Any, message: Callable[[tuple[int, ...]], str]) -> None:
    """Raises with a message about the first place that is wrong."""
    if wrong.any():
        raise AssertionError(message(tuple(int(i) for i in np.argwhere(wrong)[0])))
