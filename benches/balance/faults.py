"""A rank or a node of two dies: what has to move, and what it takes to be even again."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import eplb_rs
import numpy as np
from measuring import log_normal, timed

if TYPE_CHECKING:
    from eplb_rs import Plan

# Nodes and ranks a node of 288 slots, and who dies.
CASES = {"one of 32 ranks": ((4, 8), [13]), "one of 16 nodes": ((16, 2), [6, 7])}

# How near a plan comes to the balance of one from scratch.
NEAR = 0.99

# What is asked of the time of a plan, in milliseconds.
LIMIT_MS = 3.0


def arrivals(plan: Plan, previous: Plan) -> int:
    """How many slots hold an expert that their rank did not hold before."""
    now, then = (p.phy2log.reshape(p.num_layers, 32, 9) for p in (plan, previous))
    return int((~(now[..., :, None] == then[..., None, :]).any(axis=-1) & (now >= 0)).sum())


def rows(seconds: float) -> list[dict[str, Any]]:
    """For each case, a row for the fewest moves, for a tenth more, and for a balance near scratch."""
    rows: list[dict[str, Any]] = []
    load = log_normal(1.0)
    for name, (shape, dead) in CASES.items():
        topology = eplb_rs.Topology(*shape, 9)
        previous = eplb_rs.Planner(topology, policy="balanced").plan(load)
        planner = eplb_rs.Planner(topology.with_dead(dead), policy="balanced", release_gil=False)
        scratch = planner.plan(load).balance
        least = arrivals(planner.plan(load, previous=previous, max_moves=0), previous)
        for aim, limit in (
            ("fewest moves", {"max_moves": 0}),
            ("a tenth more", {"max_moves": least * 11 // 10}),
            ("within 1 % of scratch", {"min_balance": NEAR * scratch}),
        ):
            call = partial(planner.plan, load, previous=previous, **limit)
            plan = call()
            assert all(set(row[row >= 0].tolist()) == set(range(256)) for row in plan.phy2log)
            assert not np.isin(np.flatnonzero((plan.phy2log >= 0).any(axis=0)) // 9, dead).any()
            figures = {
                "case": name,
                "aim": aim,
                "moves": arrivals(plan, previous),
                "balance": plan.balance,
                "from_scratch": scratch,
                "limit_ms": LIMIT_MS,
            }
            rows.append({**figures, **timed(call, seconds)})
    return rows
