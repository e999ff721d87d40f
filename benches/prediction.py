"""Costs of the stages of one cut of a model, from those measured under another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from dualpipe import Costs

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["spread"]


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
    )
