"""A rank or a node of two dies: what has to move, and what it takes to be even again; and the worst
of all ranks that may die."""

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

# What no plan can beat after rank 13 has died, by the moves it makes: an integer program for each
# layer, solved by HiGHS, and for a tenth more moves a layer that gets one of them counted as even.
AT_MOST = {"fewest moves": 0.9176, "a tenth more": 0.9862}


def arrivals(plan: Plan, previous: Plan) -> int:
    """How many slots hold an expert that their rank did not hold before."""
    now, then = (p.phy2log.reshape(p.num_layers, 32, 9) for p in (plan, previous))
    return int((~(now[..., :, None] == then[..., None, :]).any(axis=-1) & (now >= 0)).sum())


def after_loss(topology: eplb_rs.Topology, dead: list[int], seconds: float) -> list[dict[str, Any]]:
    """A row for the fewest moves, for a tenth more, and for a balance near that from scratch."""
    load = log_normal(1.0)
    previous = eplb_rs.Planner(topology).plan(load)
    planner = eplb_rs.Planner(topology.with_dead(dead), release_gil=False)
    scratch = planner.plan(load).balance
    least = arrivals(planner.plan(load, previous=previous, max_moves=0), previous)
    rows: list[dict[str, Any]] = []
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
            "aim": aim,
            "least_moves": least,
            "moves": arrivals(plan, previous),
            "balance": plan.balance,
            "from_scratch": scratch,
            "limit_ms": LIMIT_MS,
        }
        rows.append({**figures, **timed(call, seconds)})
    return rows


def rows(seconds: float) -> list[dict[str, Any]]:
    """Three rows for each case, and three for the worst of all ranks: figure by figure."""
    table: list[dict[str, Any]] = []
    for name, (shape, dead) in CASES.items():
        for row in after_loss(eplb_rs.Topology(*shape, 9), dead, seconds):
            proved = AT_MOST.get(row["aim"]) if dead == [13] else None
            table.append({"case": name, **row, "balance_at_most": proved})
    every = [after_loss(eplb_rs.Topology(4, 8, 9), [rank], seconds / 10) for rank in range(32)]
    for same in zip(*every, strict=True):
        worst = {key: max(row[key] for row in same) for key in same[0]}
        worst["balance"] = min(row["balance"] for row in same)
        table.append({"case": "the worst of 32 ranks", **worst})
    return table
