"""Times the balanced policy through Python beside the reference policy, and checks its answers.

    python benches/balance.py [--seconds 0.5] [--output benches/results/balance.json]

One thread. For each shape and load: the balance, the mean gap to the lower bound, how often an
expert is twice on a rank, and the median and least time of `plan_into`, for several budgets; then
balance against moves from a plan in force. Every plan is checked: each expert has a slot, and the
rank loads that the planner reports are those of its `phy2log`.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import eplb_rs
import numpy as np
import numpy.typing as npt
from eplb_rs.loads import read_loads

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[1]
DEEPSEEK_R1 = ROOT / "examples" / "data" / "deepseek_r1_1k1k.json"

Load = npt.NDArray[np.float32]

# Slots, ranks, and the steps a layer that are tried.
SHAPES = [
    (288, 32, (30, 80, 1000)),
    (320, 64, (100, 200, 1000)),
    (288, 144, (10, 30, 1000, 6000)),
    (320, 320, (1000,)),
]
MOVES = (0, 60, 400, 800, 1600)


def lognormal(sigma: float) -> npt.NDArray[np.float64]:
    return np.round(np.random.default_rng(0).lognormal(0, sigma, (58, 256)) * 1000)


def loads() -> dict[str, Load]:
    return {
        "DeepSeek-R1 1k1k": read_loads(DEEPSEEK_R1).total.astype(np.float32),
        "log-normal s=1": lognormal(1.0).astype(np.float32),
        "log-normal s=0.5": lognormal(0.5).astype(np.float32),
    }


def timed(call: Callable[[], object], seconds: float) -> dict[str, float]:
    """Median, 99.9th percentile and least time, in milliseconds."""
    times = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    low, tail = np.percentile(times, [50, 99.9])
    return {"median_ms": float(low), "p999_ms": float(tail), "least_ms": min(times)}


def check(plan: eplb_rs.Plan, load: Load) -> None:
    counts = np.stack([np.bincount(row, minlength=256) for row in plan.phy2log])
    assert (counts >= 1).all(), "an expert has no slot"
    shares = np.take_along_axis(load.astype(np.float64) / counts, plan.phy2log, axis=1)
    ranks = shares.reshape(len(load), plan.topology.num_gpus, -1).sum(axis=2)
    np.testing.assert_allclose(ranks, plan.rank_load, rtol=1e-9)
    assert (ranks.max(axis=1) >= plan.lower_bound * (1 - 1e-9)).all(), "below the bound"


def measured(planner: eplb_rs.Planner, load: Load, seconds: float) -> dict[str, Any]:
    plan = planner.plan(load)
    check(plan, load)
    out = planner.allocate(*load.shape, 0)
    return {
        "balance": plan.balance,
        "gap": plan.gap,
        "duplicates": plan.duplicates,
        **timed(lambda: planner.plan_into(load, out), seconds),
    }


def balance_rows(seconds: float) -> list[dict[str, Any]]:
    rows = []
    for slots, gpus, steps in SHAPES:
        topology = eplb_rs.Topology(1, gpus, slots // gpus)
        for name, load in loads().items():
            case = {"slots": slots, "ranks": gpus, "load": name}
            planner = eplb_rs.Planner(topology, policy="deepseek", release_gil=False)
            rows.append({**case, "policy": "deepseek", **measured(planner, load, seconds)})
            for iterations in steps:
                planner = eplb_rs.Planner(
                    topology, policy="balanced", iterations=iterations, release_gil=False
                )
                figures = measured(planner, load, seconds)
                rows.append({**case, "policy": "balanced", "iterations": iterations, **figures})
    return rows


def movement_rows(seconds: float) -> list[dict[str, Any]]:
    planner = eplb_rs.Planner(eplb_rs.Topology(4, 8, 9), policy="balanced", release_gil=False)
    before = lognormal(1.0)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each measurement")
    parser.add_argument("--output", type=Path, help="where to write the figures as JSON")
    arguments = parser.parse_args()
    results = {
        "machine": platform.processor() or platform.machine(),
        "version": eplb_rs.__version__,
        "balance": balance_rows(arguments.seconds),
        "movement": movement_rows(arguments.seconds),
    }
    for row in [*results["balance"], *results["movement"]]:
        print(
            "  ".join(
                f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()
            )
        )
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
