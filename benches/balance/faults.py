"""A rank or a node of two dies: what has to move, and what it takes to be even again; and the worst
of all ranks, and of all nodes, that may die."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import eplb_rs
import numpy as np
from measuring import ROUNDS, log_normal, quantiles, quietest, samples, timed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from eplb_rs import Plan

# Nodes and ranks a node of 288 slots, and who dies.
CASES = {"one of 32 ranks": ((4, 8), [13]), "one of 16 nodes": ((16, 2), [6, 7])}

# The same for each rank and each node that may die.
EVERY = {
    "the worst of 32 ranks": ((4, 8), [[rank] for rank in range(32)]),
    "the worst of 16 nodes": ((16, 2), [[2 * node, 2 * node + 1] for node in range(16)]),
}

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


class After(NamedTuple):
    """How a plan was made after a loss."""

    figures: dict[str, Any]
    call: Callable[[], Plan]


def after_loss(topology: eplb_rs.Topology, dead: list[int]) -> list[After]:
    """Plans of the fewest moves, of a tenth more, and of a balance near that from scratch."""
    load = log_normal(1.0)
    previous = eplb_rs.Planner(topology).plan(load)
    planner = eplb_rs.Planner(topology.with_dead(dead), release_gil=False)
    scratch = planner.plan(load).balance
    least = arrivals(planner.plan(load, previous=previous, max_moves=0), previous)
    plans: list[After] = []
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
        plans.append(After(figures, call))
    return plans


def worst(deaths: list[list[After]], seconds: float) -> Iterator[dict[str, Any]]:
    """Three rows for the worst of all that may die, figure by figure. Rounds go over all of them,
    so that what disturbs some seconds disturbs one round of each."""
    calls = [after.call for plans in deaths for after in plans]
    rounds = [
        [quantiles(samples(call, seconds=seconds / ROUNDS, warm_up=2)) for call in calls]
        for _ in range(ROUNDS)
    ]
    times = [quietest(of_call) for of_call in zip(*rounds, strict=True)]
    aims = len(deaths[0])
    for aim in range(aims):
        plans = [plans[aim].figures for plans in deaths]
        rows = [{**figures, **time} for figures, time in zip(plans, times[aim::aims], strict=True)]
        row = {key: max(row[key] for row in rows) for key in rows[0]}
        yield {**row, "balance": min(row["balance"] for row in rows)}


def rows(seconds: float) -> list[dict[str, Any]]:
    """Three rows for each case, and three for the worst of all ranks and of all nodes."""
    table: list[dict[str, Any]] = []
    for name, (shape, dead) in CASES.items():
        for figures, call in after_loss(eplb_rs.Topology(*shape, 9), dead):
            proved = AT_MOST.get(figures["aim"]) if dead == [13] else None
            row = {"case": name, **figures, **timed(call, seconds), "balance_at_most": proved}
            table.append(row)
    for name, (shape, deaths) in EVERY.items():
        topology = eplb_rs.Topology(*shape, 9)
        plans = [after_loss(topology, dead) for dead in deaths]
        table += [{"case": name, **row} for row in worst(plans, seconds / 10)]
    return table
