"""How near plans are to what no plan can beat, and what the bounds cost.

For each shape and load: the mean gap to the cheap bound, which every plan carries, and to the dear
one, which is made on request; and the time of each beside that of the plan. `wanted_gap` is what
the dear one aims at.
"""

from __future__ import annotations

from typing import Any

import eplb_rs
import numpy as np
from cases import check, loads
from eplb_rs import _core
from measuring import timed

# By slots and ranks: steps a layer, and the gap that is wanted for each load.
SHAPES = {
    (288, 32): (1000, (2e-4, 2e-4, 2e-4)),
    (320, 64): (1000, (3e-3, 5e-4, 5e-4)),
    (288, 144): (6000, (0.01, 0.01, 0.01)),
    (320, 320): (10, (0.01, 0.01, 0.01)),
}


def rows(seconds: float) -> list[dict[str, Any]]:
    """One row for each shape and load."""
    rows = []
    for (slots, gpus), (iterations, wanted) in SHAPES.items():
        topology = eplb_rs.Topology(1, gpus, slots // gpus)
        planner = eplb_rs.Planner(
            topology, policy="balanced", iterations=iterations, release_gil=False
        )
        for (name, load), gap in zip(loads().items(), wanted, strict=True):
            plan = planner.plan(load)
            check(plan, load)
            largest = plan.rank_load.max(axis=1)
            tight = plan.tight_lower_bound()
            assert (plan.lower_bound <= tight).all(), "the dear bound is below the cheap one"
            assert (tight <= largest * (1 + 1e-9)).all(), "a plan is below the bound"
            out = planner.allocate(*load.shape, 0)
            times = {
                "plan_us": timed(lambda: planner.plan_into(load, out), seconds),  # noqa: B023
                "bound_us": timed(lambda: _core.bounds(load, topology, 1), seconds),  # noqa: B023
                "tight_us": timed(plan.tight_lower_bound, seconds),
            }
            rows.append(
                {
                    "slots": slots,
                    "ranks": gpus,
                    "load": name,
                    "iterations": iterations,
                    "gap": plan.gap,
                    "tight_gap": float(np.mean(largest / tight - 1)),
                    "wanted_gap": gap,
                    **{key: time["median_us"] for key, time in times.items()},
                }
            )
    return rows
