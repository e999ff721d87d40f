"""What the tables share: the loads, and the check of a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import measuring
import numpy as np

if TYPE_CHECKING:
    from eplb_rs import Plan
    from measuring import Load


def loads() -> dict[str, Load]:
    """The loads of the tables, by name, `[58, 256]`."""
    return {
        "DeepSeek-R1 1k1k": measuring.deepseek_r1(),
        "log-normal s=1": measuring.log_normal(1.0),
        "log-normal s=0.5": measuring.log_normal(0.5),
    }


def check(plan: Plan, load: Load) -> None:
    """Fails unless each expert has a slot, and the rank loads reported are those of `phy2log`."""
    layers, experts = load.shape
    counts = np.stack([np.bincount(row, minlength=experts) for row in plan.phy2log])
    assert (counts >= 1).all(), "an expert has no slot"
    shares = np.take_along_axis(load.astype(np.float64) / counts, plan.phy2log, axis=1)
    ranks = shares.reshape(layers, plan.topology.num_gpus, -1).sum(axis=2)
    np.testing.assert_allclose(ranks, plan.rank_load, rtol=1e-9)
    assert (ranks.max(axis=1) >= plan.lower_bound * (1 - 1e-9)).all(), "below the bound"
