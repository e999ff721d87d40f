"""Balance against moves, from a plan in force."""

from __future__ import annotations

from typing import Any

import eplb_rs
import numpy as np
from cases import check
from measuring import log_normal, timed

MOVES = (0, 60, 400, 800, 1600)


def rows(seconds: float) -> list[dict[str, Any]]:
    """One row for each limit of moves, and one for the frontier."""
    planner = eplb_rs.Planner(eplb_rs.Topology(4, 8, 9), policy="balanced", release_gil=False)
    before = log_normal(1.0).astype(np.float64)
    after = (before * np.random.default_rng(1).lognormal(0, 0.1, before.shape)).astype(np.float32)
    previous = planner.plan(before)
    rows: list[dict[str, Any]] = []
    for moves in MOVES:
        plan = planner.plan(after, previous=previous, max_moves=moves)
        check(plan, after)
        now, then = (p.phy2log.reshape(58, 32, 9) for p in (plan, previous))
        made = int((~(now[..., :, None] == then[..., None, :]).any(axis=-1)).sum())
        assert made <= moves

        def call(moves: int = moves) -> object:
            return planner.plan(after, previous=previous, max_moves=moves)

        rows.append(
            {"max_moves": moves, "moves": made, "balance": plan.balance, **timed(call, seconds)}
        )
    rows.append({"frontier": True, **timed(lambda: planner.frontier(after, previous), seconds)})
    return rows
