"""What instructions and links cost, for :meth:`Schedule.simulate`.

Letters: P ranks, S stages. Times are in any one unit, the same throughout; bytes are bytes per
micro-batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from dualpipe._arguments import link_numbers, numbers
from dualpipe._values import ByValue

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Times = npt.NDArray[np.float64]

__all__ = ["Costs", "arrays_of"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Costs(ByValue):
    """How long instructions take, and what links cost.

    A single number stands for all stages, ranks or links.
    """

    forward: npt.ArrayLike = 1.0
    """F of every stage, `[S]`."""
    backward_input: npt.ArrayLike = 1.0
    """I of every stage, `[S]`."""
    backward_weight: npt.ArrayLike = 1.0
    """W of every stage, `[S]`."""
    backward: npt.ArrayLike | None = None
    """B of every stage, `[S]`; by default I + W."""
    overlap_factor: float = 1.0
    """What an overlapped pair takes, as a part of its forward and backward one after the other."""
    pair: npt.ArrayLike | None = None
    """Or what it takes outright, by the stage of its forward, `[S]`."""
    rank_factor: npt.ArrayLike = 1.0
    """How many times slower each rank is, `[P]`."""
    latency: npt.ArrayLike = 0.0
    """Time from a message's last byte leaving to its being there, `[P, P]`, from and to."""
    bandwidth: npt.ArrayLike = math.inf
    """Bytes a unit of time, `[P, P]`, from and to."""
    message_bytes: npt.ArrayLike = 0.0
    """The output of a stage, and so its gradient, `[S]`."""


class Arrays(NamedTuple):
    """Costs as the core takes them, in its order."""

    times: tuple[Times, Times, Times, Times]
    """F, B, I, W, each `[S]`."""
    rank_factor: Times
    overlap_factor: float
    pair: Times | None
    latency: Times
    bandwidth: Times
    message_bytes: Times


def arrays_of(costs: Costs, num_stages: int, num_ranks: int) -> Arrays:
    """The costs of a schedule with so many stages and ranks.

    Raises:
        ScheduleError: ``length``, ``not_a_number``.
    """

    def per_stage(value: npt.ArrayLike, argument: str) -> Times:
        return numbers(value, argument, (num_stages,))

    forward = per_stage(costs.forward, "forward")
    backward_input = per_stage(costs.backward_input, "backward_input")
    backward_weight = per_stage(costs.backward_weight, "backward_weight")
    backward = (
        backward_input + backward_weight
        if costs.backward is None
        else per_stage(costs.backward, "backward")
    )
    return Arrays(
        (forward, backward, backward_input, backward_weight),
        numbers(costs.rank_factor, "rank_factor", (num_ranks,)),
        float(numbers(costs.overlap_factor, "overlap_factor", ())[0]),
        None if costs.pair is None else per_stage(costs.pair, "pair"),
        link_numbers(costs.latency, "latency", num_ranks),
        link_numbers(costs.bandwidth, "bandwidth", num_ranks),
        per_stage(costs.message_bytes, "message_bytes"),
    )
