"""How even plans are on the load they are made for, and how long they take.

For each shape, load and number of steps: the balance, the mean gap to the lower bound, how often
an expert is twice on a rank, and the time of `plan_into`. `wanted_balance` within `wanted_ms` is
what the policy aims at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import eplb_rs
from cases import check, loads
from measuring import timed

if TYPE_CHECKING:
    from measuring import Load


class Aim(NamedTuple):
    """Within how long which balance is to be reached, and in how many steps a layer: for each load."""

    ms: float
    iterations: tuple[int, int, int]
    balance: tuple[float, float, float]


# By slots and ranks.
AIMS = {
    (288, 32): [
        Aim(1, (28, 33, 33), (0.9998, 0.9997, 0.9997)),
        Aim(3, (1000, 1000, 1000), (0.9999, 0.9999, 0.9999)),
    ],
    (320, 64): [
        Aim(3, (140, 140, 140), (0.997, 0.9995, 0.9997)),
        Aim(10, (800, 800, 800), (0.9993, 0.9997, 0.9998)),
    ],
    (288, 144): [
        Aim(3, (12, 25, 25), (0.537, 0.765, 0.964)),
        Aim(500, (6000, 6000, 6000), (0.537, 0.765, 0.969)),
    ],
}


def measured(planner: eplb_rs.Planner, load: Load, seconds: float) -> dict[str, Any]:
    """The plan's figures, and the time it takes."""
    plan = planner.plan(load)
    check(plan, load)
    out = planner.allocate(*load.shape, 0)
    return {
        "balance": plan.balance,
        "gap": plan.gap,
        "duplicates": plan.duplicates,
        **timed(lambda: planner.plan_into(load, out), seconds),
    }


def rows(seconds: float) -> list[dict[str, Any]]:
    """One row for the reference policy and one for each aim, by shape and load."""
    rows = []
    for (slots, gpus), aims in AIMS.items():
        topology = eplb_rs.Topology(1, gpus, slots // gpus)
        for index, (name, load) in enumerate(loads().items()):
            case = {"slots": slots, "ranks": gpus, "load": name}
            planner = eplb_rs.Planner(topology, policy="deepseek", release_gil=False)
            rows.append({**case, "policy": "deepseek", **measured(planner, load, seconds)})
            for aim in aims:
                steps = aim.iterations[index]
                planner = eplb_rs.Planner(topology, iterations=steps, release_gil=False)
                row = {**case, "policy": "balanced", "iterations": steps}
                row |= {"wanted_balance": aim.balance[index], "wanted_ms": aim.ms}
                rows.append({**row, **measured(planner, load, seconds)})
    return rows
