"""Random input, valid and not, through the Python face of the planner.

    python tests/fuzz.py --count 1000000 --seed 0
    python tests/fuzz.py --seconds 60
    python tests/fuzz.py --seed 0 --only 4711     # one case again, with all that it was given

Whatever comes in, a call answers or refuses with a `PlanError`, within a time limit. Every answer
passes the checks of `eplb_rs.testing`; some are compared with the plain NumPy reference. Each case
has random numbers of its own, so that it can be run alone.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import json
import math
import pickle
import random
import sys
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import eplb_rs
import numpy as np
import numpy.typing as npt
import reference
from eplb_rs import Plan, PlanBuffers, PlanError, Planner, Topology, testing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["TARGETS", "Case", "FuzzError", "Summary", "run"]

Floats = npt.NDArray[np.float32]
T = TypeVar("T")

LIMIT_SECONDS = 5.0
"""How long a single call may take; a thousand times what the slowest takes on an idle machine."""

HANG_SECONDS = 120.0
"""When a call is given up: the stack is printed and the program ends."""

BATCH = 1000
"""How many cases run between two looks at the clock."""

ANSWERED = "answered"


class FuzzError(Exception):
    """A case in which the planner did something that it must not do."""


@dataclass
class Summary:
    """What came out, counted: by target, and there by answer or code of refusal."""

    cases: int = 0
    seconds: float = 0.0
    slowest_seconds: float = 0.0
    compared: int = 0
    outcomes: dict[str, Counter[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"{self.cases:,} cases in {self.seconds:.1f} s, the slowest call "
            f"{self.slowest_seconds * 1e3:.1f} ms; {self.compared:,} answers equal the reference"
        ]
        for target, outcomes in self.outcomes.items():
            counts = ", ".join(f"{name} {count:,}" for name, count in outcomes.most_common())
            lines.append(f"  {target}: {counts}")
        return "\n".join(lines)


class Case:
    """One case: its random numbers, and what it was given and what came out."""

    def __init__(self, seed: int, index: int, summary: Summary) -> None:
        self.random = random.Random(seed * 2**40 + index)
        self.summary = summary
        self.outcome = ANSWERED
        self.given: dict[str, Any] = {}
        # The caller's settings of NumPy are no business of the planner.
        self.numpy: Literal["raise", "warn"] = "raise" if self.chance(0.1) else "warn"

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.random.random() * len(options))]

    def upto(self, largest: int) -> int:
        """A number from 1 to `largest`."""
        return 1 + int(self.random.random() * largest)

    def attempt(self, call: Callable[[], T], **given: Any) -> T | None:
        """The answer of a call, or None where it was refused as it should be."""
        self.given = given
        start = time.perf_counter()
        try:
            with np.errstate(all=self.numpy):
                return call()
        except PlanError as error:
            self.outcome = error.code
            parts: list[Any] = [error.code, error.argument, error.got, error.expected, str(error)]
            for part in parts:
                if not isinstance(part, str) or not part:
                    raise FuzzError(f"a refusal with a part missing: {error!r}") from error
            return None
        finally:
            seconds = time.perf_counter() - start
            self.summary.slowest_seconds = max(self.summary.slowest_seconds, seconds)
            if seconds > LIMIT_SECONDS:
                raise FuzzError(f"the call took {seconds:.1f} s")


# What comes in

ODD_NUMBERS: list[Any] = [
    0, -1, 1, 2, 3, 5, 7, 2**20 + 1, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**30, 10**400,
    True, False, None, "8", b"8", 8.0, 1.5, math.nan, math.inf, 8j, [8], (8,), {}, object(), int,
    Decimal(8), Fraction(8), np.float32(8), np.int8(-3), np.array(2), np.array([2, 2]), np.array([]),
]  # fmt: skip

ODD_LOADS: list[Any] = [
    None, 0, 1.5, "load", b"load", [], [[]], [[], []], {}, {"a": [1]}, set(), object(), int, True,
    [1, 2, 3], [[1, 2], [3]], [[1], 2], [[None]], [["1"]], [[1j]], [[True]], [[10**30, 1]],
    [[Decimal(1)]], [[[1.0]]], np.array(1.0), np.ones(3), np.ones((2, 2, 2)), np.ones((0, 3)),
    np.ones((3, 0)), np.ones((2, 2), dtype=object), np.ones((2, 2), dtype="S1"),
    np.ones((2, 2), dtype="M8[s]"), np.ones((2, 2), dtype=complex), np.ones((2, 2), dtype=bool),
    np.zeros((2, 2), dtype=[("a", "f4")]), np.ma.masked_equal([[1, 2], [3, 4]], 3),
]  # fmt: skip

ODD_VALUES = [math.nan, math.inf, -math.inf, -1.0, -1e-45, -3e38, 1e39, 1e300]

DTYPES = ["f2", "f4", "f8", "g", ">f4", ">f8", "i1", "i2", "i4", "i8", ">i4", "u1", "u4", "u8"]


def number(case: Case, sound: int, odd: float = 0.03) -> Any:
    """A count: mostly the sound one, at times as another type, at times one that is not."""
    if not case.chance(odd):
        return sound if case.chance(0.97) else np.int64(sound)
    return case.pick(ODD_NUMBERS) if case.chance(0.7) else sound + case.pick([-2, -1, 1, 2])


def sizes(case: Case) -> tuple[int, int, int]:
    """Nodes, GPUs per node and slots per GPU: mostly few."""
    most = 4 if case.chance(0.98) else 9
    return case.upto(most), case.upto(most), case.upto(most)


def num_experts_for(case: Case, num_slots: int, num_groups: int) -> int:
    """Experts that fit the slots and divide into the groups; at times that do not."""
    if case.chance(0.03):
        return case.upto(num_slots + 3)
    return num_groups * case.upto(max(num_slots // num_groups, 1))


def values(case: Case, num_layers: int, num_experts: int) -> list[list[float]]:
    """Loads of one of many kinds, as numbers that are exact in float32."""
    draw = case.random.random
    kind = case.upto(8)

    def value() -> float:
        match kind:
            case 1:
                return float(int(draw() * 4))  # ties
            case 2:
                return float(int(draw() * 120))
            case 3:
                return float(int(math.exp(draw() * 12)))  # skewed
            case 4:
                return 0.0 if draw() < 0.7 else float(int(draw() * 9))
            case 5:
                return -0.0 if draw() < 0.5 else 0.0
            case 6:
                return math.ldexp(int(draw() * 2**24), 80)  # huge
            case 7:
                return math.ldexp(int(draw() * 2**10), -149)  # denormal
            case _:
                return math.ldexp(int(draw() * 2**24), -10)

    return [[value() for _ in range(num_experts)] for _ in range(num_layers)]


def load(case: Case, num_experts: int) -> tuple[Any, Floats | None]:
    """A load as a caller might hand it over, and what it is in float32 if it is one."""
    if case.chance(0.04):
        return case.pick(ODD_LOADS), None
    rows = values(case, case.upto(3) if case.chance(0.98) else 9, num_experts)
    if case.chance(0.05):
        case.pick(rows)[case.upto(num_experts) - 1] = case.pick(ODD_VALUES)
        if case.chance(0.2):
            return rows, None
        with np.errstate(over="ignore"):
            return np.array(rows, dtype=case.pick(["f4", "f8"])), None
    plain = np.array(rows, dtype=np.float32)
    form = case.upto(10)
    if form == 1:
        return rows, plain
    if form == 2:
        with np.errstate(all="ignore"):
            given = plain.astype(case.pick(DTYPES))
            plain = given.astype(np.float32)
        return given, plain if (plain >= 0).all() and np.isfinite(plain).all() else None
    if form == 3:
        return np.asfortranarray(plain), plain
    if form == 4:
        return np.repeat(plain, 2, axis=1)[:, ::2], plain
    if form == 5 and case.chance(0.2):
        return plain[::-1], plain[::-1]
    if form == 6 and case.chance(0.2) and sys.modules.get("torch"):
        return tensor(case, plain), plain
    return plain, plain


def tensor(case: Case, plain: Floats) -> Any:
    import torch

    result = torch.from_numpy(plain.copy())
    form = case.upto(5)
    if form == 1:
        return result.double()
    if form == 2:
        return result.T.contiguous().T
    return result.requires_grad_() if form == 3 else result


def buffer(case: Case, shape: tuple[int, ...]) -> Any:
    """An array to write into, at times one that cannot be."""
    if not case.chance(0.05):
        return np.full(shape, -7)
    kind = case.upto(8)
    if kind == 1:
        return np.full(shape, -7).astype(case.pick(["i4", "f8", ">i8", "O", "u8", "?"]))
    if kind == 2:
        array = np.full(shape, -7)
        array.flags.writeable = False
        return array
    if kind == 3:
        return np.full(shape[::-1], -7).T
    if kind == 4:
        return np.full((*shape[:-1], shape[-1] * 2), -7)[..., ::2]
    if kind == 5:
        return np.full(tuple(max(size + case.pick([-1, 0, 1]), 0) for size in shape), -7)
    if kind == 6:
        return np.full(math.prod(shape), -7)
    if kind == 7:
        return np.full((1, *shape), -7)
    return case.pick([None, [], "x", object(), 3, [[0] * shape[-1]] * shape[0]])


# What is asked for

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


# The run


def run_case(seed: int, index: int, summary: Summary) -> None:
    """Runs one case.

    Raises:
        FuzzError: With the case, what it was given, and the traceback of what went wrong.
    """
    case = Case(seed, index, summary)
    name = case.random.choices(list(TARGETS), [weight for weight, _ in TARGETS.values()])[0]
    try:
        TARGETS[name][1](case)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic is no Exception
        given = "".join(f"\n  {key} = {value!r}" for key, value in case.given.items())
        raise FuzzError(
            f"case {index} of seed {seed}, {name}:{given}\n{traceback.format_exc()}"
        ) from error
    summary.outcomes.setdefault(name, Counter())[case.outcome] += 1
    summary.cases += 1


def run(
    *, count: int | None = None, seed: int = 0, seconds: float | None = None, alone: bool = False
) -> Summary:
    """Runs cases until there were `count`, or for so many seconds.

    `alone` says that this is all the process is there for: progress is written to stderr, and a
    call that hangs ends the process.

    Raises:
        FuzzError: For the first case in which something went wrong.
    """
    summary = Summary()
    start = said = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for first in range(0, sys.maxsize if count is None else count, BATCH):
            if alone:
                stderr = sys.__stderr__ or 2
                faulthandler.dump_traceback_later(HANG_SECONDS, exit=True, file=stderr)
            last = first + BATCH if count is None else min(first + BATCH, count)
            for index in range(first, last):
                run_case(seed, index, summary)
            now = time.monotonic()
            summary.seconds = now - start
            if alone and now - said > 5:
                said = now
                share = f" of {count:,}" if count else ""
                say(f"{last:,}{share} cases, {summary.seconds:.0f} s")
            if seconds is not None and summary.seconds >= seconds:
                break
    if alone:
        faulthandler.cancel_dump_traceback_later()
    return summary


def say(text: str) -> None:
    """Writes a line that is no result."""
    sys.stderr.write(text + "\n")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, help="how many cases (default: 100,000)")
    parser.add_argument("--seed", type=int, default=0, help="where random numbers start")
    parser.add_argument("--seconds", type=float, help="for how long, instead of --count")
    parser.add_argument("--only", type=int, metavar="CASE", help="run this case alone")
    parser.add_argument("--without-torch", action="store_true", help="no tensors among the input")
    arguments = parser.parse_args()
    if not arguments.without_torch:
        try:
            import torch  # noqa: F401 - its being there is what is asked for
        except ImportError:
            say("no torch, so no tensors among the input")
    count = arguments.count
    if count is None and arguments.seconds is None:
        count = 100_000
    try:
        if arguments.only is not None:
            summary = Summary()
            run_case(arguments.seed, arguments.only, summary)
        else:
            summary = run(count=count, seed=arguments.seed, seconds=arguments.seconds, alone=True)
    except FuzzError as found:
        say(str(found))
        return 1
    sys.stdout.write(f"{summary}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
