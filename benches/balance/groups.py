"""What rules for groups cost: balance against tokens that cross, 8 groups on 4 nodes of 8 GPUs.

For each load and rule: the balance, the part of all tokens that is expected to cross to another
node, the mean gap to the bound under the rule, and the time of a plan.
"""

from __future__ import annotations

from typing import Any

import eplb_rs
from cases import check, loads
from measuring import timed

RULES: list[tuple[str, float | None]] = [
    ("strict", None),
    ("priced", 1.0),
    ("priced", 0.3),
    ("priced", 0.1),
    ("free", None),
]


def rows(seconds: float) -> list[dict[str, Any]]:
    """One row for each load and rule."""
    rows = []
    for name, load in loads().items():
        for rule, cost in RULES:
            planner = eplb_rs.Planner(
                eplb_rs.Topology(4, 8, 9),
                8,
                "balanced",
                group_rule=rule,  # type: ignore[arg-type]
                crossing_cost=cost,
                release_gil=False,
            )
            plan = planner.plan(load)
            check(plan, load)
            assert rule != "strict" or not plan.crossing_tokens.any(), "a group left its node"
            out = planner.allocate(*load.shape, 0)
            rows.append(
                {
                    "load": name,
                    "group_rule": rule,
                    "crossing_cost": cost,
                    "balance": plan.balance,
                    "crossing_share": plan.crossing_share,
                    "gap": plan.gap,
                    **timed(lambda: planner.plan_into(load, out), seconds),  # noqa: B023
                }
            )
    return rows
