"""What tests ask of plans."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from eplb_rs import Plan


def check(plan: Plan) -> None:
    """What every plan holds to: each expert somewhere, none twice on a rank, dead slots empty."""
    topology = plan.topology
    starts = np.cumsum([0, *topology.slots])
    for row in plan.phy2log:
        for gpu, (first, end) in enumerate(itertools.pairwise(starts)):
            held = row[first:end]
            if gpu in topology.dead:
                assert (held == -1).all()
            else:
                assert (held >= 0).all()
                assert len(set(held.tolist())) == min(len(held), plan.num_experts)
        assert set(row[row >= 0].tolist()) == set(range(plan.num_experts))
    assert (plan.rank_time.max(axis=1) >= plan.lower_bound * (1 - 1e-9)).all()
    total = plan.expert_load.sum(axis=1, dtype=np.float64)
    np.testing.assert_allclose(plan.rank_load.sum(axis=1), total, rtol=1e-9)


def arrivals(plan: Plan, previous: Plan) -> int:
    """How many slots hold an expert that their rank did not hold before."""
    shape = (plan.num_layers, plan.topology.num_gpus, -1)
    now, then = plan.phy2log.reshape(shape), previous.phy2log.reshape(shape)
    return int((~(now[..., :, None] == then[..., None, :]).any(axis=-1) & (now >= 0)).sum())
