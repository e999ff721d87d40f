"""What is asked for, and what an answer has to be."""

from __future__ import annotations

import copy
import json
import math
import pickle
from functools import cache
from typing import TYPE_CHECKING, Any

import eplb_rs
import numpy as np
import numpy.typing as npt
import reference
from eplb_rs import Plan, PlanBuffers, Planner, Topology, testing

from fuzzing.case import Case, FuzzError, Summary
from fuzzing.inputs import (
    ODD_LOADS,
    ODD_NUMBERS,
    Floats,
    buffer,
    load,
    num_experts_for,
    number,
    sizes,
    values,
)

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["TARGETS"]

Answer = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]


def check_answer(
    case: Case, answer: Any, plain: Floats | None, arguments: tuple[Any, ...] | None
) -> None:
    """Checks the maps of a load that was planned; at times against the reference."""
    if plain is None:
        raise FuzzError("what is no load was planned")
    phy2log, log2phy, logcnt = map(np.asarray, answer)
    testing.check_placement(phy2log, log2phy, logcnt, num_experts=plain.shape[1])
    if phy2log.dtype != np.int64 or len(phy2log) != len(plain):
        raise FuzzError(f"phy2log is {phy2log.dtype} {phy2log.shape}")
    if arguments is not None and case.chance(0.1):
        for got, wanted in zip(
            (phy2log, log2phy, logcnt),
            reference.rebalance_experts(plain, *map(int, arguments)),
            strict=True,
        ):
            if got.shape != wanted.shape or (got != wanted).any():
                raise FuzzError("the answer is not the reference's")
        case.summary.compared += 1


def fuzz_rebalance(case: Case) -> None:
    """`rebalance_experts`."""
    nodes, gpus, slots = sizes(case)
    groups = case.upto(6)
    weight, plain = load(case, num_experts_for(case, nodes * gpus * slots, groups))
    arguments = (
        number(case, nodes * gpus * slots),
        number(case, groups),
        number(case, nodes),
        number(case, nodes * gpus),
    )
    answer = case.attempt(
        lambda: eplb_rs.rebalance_experts(weight, *arguments), weight=weight, arguments=arguments
    )
    if answer is not None:
        check_answer(case, answer, plain, arguments)


def planner(case: Case, topology: Topology, num_groups: Any, *, odd: float = 0.03) -> Any:
    options = {
        "num_groups": num_groups,
        "policy": "deepseek" if case.chance(0.8) else "trivial",
        "threads": 1 if case.chance(0.99) else case.upto(4),
        "release_gil": case.pick([None, False, True]),
    }
    if case.chance(odd):
        name = case.pick(list(options))
        options[name] = case.pick([*ODD_NUMBERS, "", "greedy", "\ud800"])
        if name == "threads" and isinstance(options[name], int) and options[name] > 4:
            options[name] = 2**40
    given = topology if not case.chance(odd / 3) else case.pick(ODD_NUMBERS)
    return case.attempt(lambda: Planner(given, **options), topology=given, options=options)


def fuzz_plan(case: Case) -> None:
    """`Topology`, `Planner` and `Planner.plan`."""
    counts = sizes(case)
    given = tuple(number(case, count, odd=0.01) for count in counts)
    topology = case.attempt(lambda: Topology(*given), counts=given)
    if topology is None:
        return
    if topology.num_slots > 1000:
        return  # odd counts that are sound, and slow
    groups = case.upto(6)
    made = planner(case, topology, number(case, groups, odd=0.02))
    if made is None:
        return
    array, plain = load(case, num_experts_for(case, topology.num_slots, groups))
    ids = None if case.chance(0.9) else odd_layer_ids(case, 2 if plain is None else len(plain))
    plan = case.attempt(
        lambda: made.plan(array, layer_ids=ids), planner=made, load=array, layer_ids=ids
    )
    if plan is None:
        return
    arguments = (topology.num_slots, made.num_groups, topology.num_nodes, topology.num_gpus)
    check_answer(
        case,
        (plan.phy2log, plan.log2phy, plan.logcnt),
        plain,
        arguments if made.policy == "deepseek" else None,
    )
    if case.chance(0.1):
        check_whole_plan(case, plan)


def odd_layer_ids(case: Case, length: int) -> Any:
    sound = [case.upto(60) for _ in range(length)]
    if case.chance(0.5):
        return sound
    if case.chance(0.5):
        sound[case.upto(length) - 1] = case.pick(ODD_NUMBERS)
        return sound
    return case.pick([*ODD_NUMBERS, sound * 2, iter(sound)])


def check_whole_plan(case: Case, plan: Plan, *, keeps_groups: bool | None = None) -> None:
    """All that a plan says of itself, and that it comes back."""
    testing.check_plan(plan, keeps_groups=keeps_groups)
    again = [copy.deepcopy(plan), pickle.loads(pickle.dumps(plan)), Plan.from_json(plan.to_json())]
    for other in again:
        if other != plan or hash(other) != hash(plan) or repr(other) != repr(plan):
            raise FuzzError("a plan did not come back")
    other_load, plain = load(case, plan.num_experts)
    judged = case.attempt(lambda: plan.with_load(other_load), plan=plan, load=other_load)
    if judged is not None:
        testing.check_rank_load(judged.rank_load, plan.phy2log, plain)


def fuzz_plan_into(case: Case) -> None:
    """`Planner.plan_into`."""
    topology = Topology(*sizes(case))
    groups = case.upto(6)
    made = planner(case, topology, groups, odd=0.0)
    num_experts = num_experts_for(case, topology.num_slots, groups)
    array, plain = load(case, num_experts)
    num_layers = 2 if plain is None else len(plain)
    width = max(topology.num_slots - num_experts + 1, 1)
    if case.chance(0.1):
        width = case.upto(width)
    out = PlanBuffers(
        phy2log=buffer(case, (num_layers, topology.num_slots)),
        log2phy=buffer(case, (num_layers, num_experts, width)) if case.chance(0.8) else None,
        logcnt=buffer(case, (num_layers, num_experts)),
    )
    if case.chance(0.02):
        shared = np.ravel(out.phy2log)[: num_layers * num_experts]
        if len(shared) == num_layers * num_experts:
            out = PlanBuffers(
                phy2log=out.phy2log,
                log2phy=out.log2phy,
                logcnt=shared.reshape(num_layers, num_experts),
            )
    given: Any = out if case.chance(0.99) else case.pick([None, (1, 2, 3), object(), {}])
    parts = [
        part for part in (out.phy2log, out.log2phy, out.logcnt) if isinstance(part, np.ndarray)
    ]
    before = [part.copy() for part in parts]
    done = case.attempt(lambda: made.plan_into(array, given) or True, load=array, out=given)
    if done is None:
        for part, old in zip(parts, before, strict=True):
            if (part != old).any():
                raise FuzzError("a refused call changed a buffer")
        return
    if out.log2phy is not None and plain is not None:
        answer = (out.phy2log, out.log2phy[:, :, : int(out.logcnt.max())], out.logcnt)
        arguments = (topology.num_slots, groups, topology.num_nodes, topology.num_gpus)
        check_answer(case, answer, plain, arguments if made.policy == "deepseek" else None)
    else:
        testing.check_placement(out.phy2log, None, out.logcnt, num_experts=num_experts)


def fuzz_replan(case: Case) -> None:
    """The balanced policy, on machines of any kind, and plans from its own."""
    topology = machines(case)
    groups = case.upto(6)
    rule = case.pick(["strict", "free", "priced"])
    options = {
        "num_groups": groups,
        "group_rule": rule,
        "crossing_cost": case.random.random() if rule == "priced" else None,
        "iterations": case.upto(40),
    }
    made = case.attempt(lambda: Planner(topology, **options), topology=topology, options=options)
    if made is None:
        return
    num_experts = num_experts_for(case, topology.num_slots, groups)
    array, _ = load(case, num_experts)
    plan = case.attempt(lambda: made.plan(array), planner=made, load=array)
    if plan is None:
        return
    testing.check_plan(plan, keeps_groups=False)
    other, plain = load(case, plan.num_experts)
    if case.chance(0.3):
        dead = [gpu for gpu in range(topology.num_gpus) if case.chance(0.2)]
        changed = case.attempt(lambda: topology.with_dead(dead), topology=topology, dead=dead)
        if changed is None:
            return
        made = Planner(changed, **options)
    limits: dict[str, Any] = {
        "max_moves": None if case.chance(0.4) else number(case, case.upto(20) - 1),
        "min_balance": None if case.chance(0.8) else case.random.random(),
        "repeats": case.pick([None, False, True]),
    }
    new = case.attempt(
        lambda: made.plan(other, previous=plan, **limits),
        planner=made,
        load=other,
        previous=plan,
        limits=limits,
    )
    if new is None:
        return
    if plain is None:
        raise FuzzError("what is no load was planned")
    if rule == "strict" and groups < made.topology.num_nodes:
        return  # a node that joins may have no group, and nothing to hold
    testing.check_plan(new, keeps_groups=False)
    transfers = new.transfers(plan)
    come = transfers.source != transfers.target
    # An expert that arrives in two slots of a rank is one move.
    moves = len(np.unique(transfers.table[come][:, [0, 1, 5]], axis=0))
    # What moves whatever the limits: what GPUs that died or joined held, and repeats that are no more.
    forced = made.topology.dead or topology.dead or (plan.duplicates and not limits["repeats"])
    most = limits["max_moves"]
    if most is not None and not forced and moves > most:
        raise FuzzError(f"{moves} moves, at most {most} were allowed")


def machines(case: Case) -> Topology:
    """A topology, at times of GPUs that are not alike."""
    topology = Topology(*sizes(case))
    gpus = range(topology.num_gpus)
    if case.chance(0.2):
        topology = topology.with_slots([case.upto(4) for _ in gpus])
    if case.chance(0.2):
        topology = topology.with_speeds([0.5 + case.random.random() for _ in gpus])
    dead = [gpu for gpu in gpus if case.chance(0.2)]
    if case.chance(0.2) and len(dead) < len(gpus):
        topology = topology.with_dead(dead)
    return topology


def fuzz_from_phy2log(case: Case) -> None:
    """`Plan.from_phy2log`."""
    topology = Topology(*sizes(case))
    num_slots = topology.num_slots
    num_experts = case.upto(num_slots)
    array, plain = load(case, num_experts)
    num_layers = case.upto(3) if plain is None else len(plain)
    rows: list[list[Any]] = []
    for _ in range(num_layers):
        row = [
            *range(num_experts),
            *(case.upto(num_experts) - 1 for _ in range(num_slots - num_experts)),
        ]
        case.random.shuffle(row)
        rows.append(row)
    sound = True
    if case.chance(0.3):
        sound = False
        row = case.pick(rows)
        row[case.upto(num_slots) - 1] = case.pick(
            [-1, num_experts, 2**40, 2**70, 0, 1.5, None, "0"]
        )
        if case.chance(0.1):
            row.pop()
        if case.chance(0.1):
            rows.append(rows[0])
    phy2log: Any = rows
    if case.chance(0.5) and all(
        type(slot) is int and abs(slot) < 2**62 for r in rows for slot in r
    ):
        lengths = {len(row) for row in rows}
        if len(lengths) == 1:
            phy2log = np.array(rows).astype(case.pick(["i8", "i8", "i4", "i2", ">i8", "f8"]))
            sound = sound and phy2log.dtype.kind == "i"
    options = {} if case.chance(0.9) else {"num_groups": number(case, 1, odd=0.5)}
    given = topology if case.chance(0.98) else case.pick(ODD_NUMBERS)
    if case.chance(0.02):
        phy2log = case.pick(ODD_LOADS)
        sound = False
    plan = case.attempt(
        lambda: Plan.from_phy2log(given, phy2log, array, **options),
        topology=given,
        phy2log=phy2log,
        load=array,
        options=options,
    )
    if plan is None:
        if sound and plain is not None and given is topology and not options:
            raise FuzzError(f"a sound placement was refused: {case.outcome}")
        return
    check_answer(case, (plan.phy2log, plan.log2phy, plan.logcnt), plain, None)
    if case.chance(0.1):
        check_whole_plan(case, plan)


@cache
def texts() -> tuple[str, ...]:
    """A few plans as text, the same in every run."""
    result = []
    for seed in range(40):
        case = Case(seed, 0, Summary())
        topology = Topology(*sizes(case))
        rows = values(case, case.upto(2), case.upto(topology.num_slots))
        result.append(Planner(topology).plan(rows).to_json())
    return tuple(result)


ODD_JSON: list[Any] = [
    None, True, 0, -1, 1, 2, 3, 1.5, 1e308, math.nan, math.inf, 10**30, 2**31, 2**63, "", "x", "1",
    [], [[]], [[[]]], [[[0]]], {}, {"num_nodes": 1}, [0, 1], [[0, 1]], [None],
]  # fmt: skip


def fuzz_from_json(case: Case) -> None:
    """`Plan.from_json` on a plan's text with faults."""
    text: Any = case.pick(texts())
    if case.chance(0.5):
        for _ in range(case.upto(3)):
            text = edited(case, text)
    else:
        fields = json.loads(text)
        for _ in range(case.upto(2)):
            replace_somewhere(case, fields)
        text = json.dumps(fields)
    if case.chance(0.01):
        text = case.pick(
            [None, 1, b"{}", b"\xff", object(), [], "", "null", "[" * 5000, "9" * 5000]
        )
    plan = case.attempt(lambda: Plan.from_json(text), text=text)
    if plan is not None:
        check_answer(case, (plan.phy2log, plan.log2phy, plan.logcnt), plan.expert_load, None)
        if case.chance(0.2):  # a text may claim any policy
            check_whole_plan(case, plan, keeps_groups=False)


def edited(case: Case, text: str) -> str:
    """A text with a piece taken out, doubled, or overwritten."""
    at = int(case.random.random() * (len(text) + 1))
    length = case.upto(6) if case.chance(0.9) else case.upto(len(text) + 1)
    kind = case.upto(4)
    if kind == 1:
        return text[:at] + text[at + length :]
    if kind == 2:
        return text[: at + length] + text[at:]
    replacement = "".join(
        case.pick('0123456789[]{},:".-eE \n\0nulltrueNaNInfinity') for _ in range(length % 4)
    )
    return text[:at] + replacement + text[at + (length if kind == 3 else 0) :]


def replace_somewhere(case: Case, value: Any) -> None:
    """Replaces, takes out or doubles something in nested lists and objects."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = case.pick(keys)
        if isinstance(value[key], list | dict) and value[key] and case.chance(0.75):
            value = value[key]
            continue
        if case.chance(0.6):
            value[key] = copy.deepcopy(case.pick(ODD_JSON))
        elif case.chance(0.5):
            del value[key]
        elif isinstance(value, list):
            value.append(copy.deepcopy(value[key]))
        return


TARGETS: dict[str, tuple[int, Callable[[Case], None]]] = {
    "rebalance_experts": (25, fuzz_rebalance),
    "Planner.plan": (15, fuzz_plan),
    "Planner.plan from a plan": (15, fuzz_replan),
    "Planner.plan_into": (15, fuzz_plan_into),
    "Plan.from_phy2log": (15, fuzz_from_phy2log),
    "Plan.from_json": (15, fuzz_from_json),
}
"""By name: how often of a hundred, and how."""
