"""Costs of the stages of one cut of a model, from those measured under another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from dualpipe import Costs, Kind

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["alike", "spread"]


def alike(num_stages: int) -> dict[Kind, Sequence[int]]:
    """Stages of the same layers that do the same work: all but the last have no loss, and a
    weight part is the same everywhere. The first has no gradient of its input to compute."""
    return {
        Kind.F: range(num_stages - 1),
        Kind.B: range(1, num_stages - 1),
        Kind.I: range(1, num_stages - 1),
        Kind.W: range(num_stages),
    }


def spread(measured: Sequence[Costs], num_stages: int) -> Costs:
    """The medians of several steps' costs, with neighbouring stages put together.

    Args:
        measured: Costs of the same stages, in several steps.
        num_stages: How many stages to make of them; divides their number.
    """

    def together(values: Sequence[object]) -> np.ndarray:
        middle = np.median(np.array(values, dtype=np.float64), axis=0)
        return middle.reshape(num_stages, -1).sum(axis=1)

    return Costs(
        forward=together([costs.forward for costs in measured]),
        backward=together([costs.backward for costs in measured]),
        backward_input=together([costs.backward_input for costs in measured]),
        backward_weight=together([costs.backward_weight for costs in measured]),
        latency=np.median([costs.latency for costs in measured], axis=0),
        rank_factor=np.median([costs.rank_factor for costs in measured], axis=0),
    )
