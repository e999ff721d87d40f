"""What the tables share: the loads, the check of a plan, and timing."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from eplb_rs.loads import read_loads

if TYPE_CHECKING:
    from collections.abc import Callable

    from eplb_rs import Plan

DEEPSEEK_R1 = Path(__file__).parents[2] / "examples" / "data" / "deepseek_r1_1k1k.json"

Load = npt.NDArray[np.float32]


def lognormal(sigma: float) -> npt.NDArray[np.float64]:
    """The random loads of the tables, in float64."""
    return np.round(np.random.default_rng(0).lognormal(0, sigma, (58, 256)) * 1000)


def loads() -> dict[str, Load]:
    """The loads of the tables, by name, `[58, 256]`."""
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


def check(plan: Plan, load: Load) -> None:
    """Fails unless each expert has a slot, and the rank loads reported are those of `phy2log`."""
    layers, experts = load.shape
    counts = np.stack([np.bincount(row, minlength=experts) for row in plan.phy2log])
    assert (counts >= 1).all(), "an expert has no slot"
    shares = np.take_along_axis(load.astype(np.float64) / counts, plan.phy2log, axis=1)
    ranks = shares.reshape(layers, plan.topology.num_gpus, -1).sum(axis=2)
    np.testing.assert_allclose(ranks, plan.rank_load, rtol=1e-9)
    assert (ranks.max(axis=1) >= plan.lower_bound * (1 - 1e-9)).all(), "below the bound"
