"""What :meth:`Schedule.simulate` predicts.

Letters: P ranks, S stages, N computations of all ranks (a pair is one). Times are in the unit of
the costs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dualpipe._values import ByValue

if TYPE_CHECKING:
    import os

    import numpy as np
    import numpy.typing as npt

    from dualpipe.proof import Peaks
    from dualpipe.schedule import Schedule

__all__ = ["Timeline"]


@dataclass(frozen=True, eq=False)
class Timeline(ByValue):
    """A schedule's predicted timeline.

    Not modelled: launch overhead, the time of reductions and of the optimizer, interference
    between computation and transfers, links shared by several pairs of ranks, and variation from
    one micro-batch to the next.
    """

    schedule: Schedule = field(repr=False)
    """The schedule."""
    makespan: float
    """When the last rank ends."""
    busy: npt.NDArray[np.float64] = field(repr=False)
    """Time that each rank computes, `[P]`."""
    bubble_ratio: float
    """The part of all ranks' time in which no one computes."""
    peaks: Peaks = field(repr=False)
    """What each rank holds at most."""
    op: npt.NDArray[np.int64] = field(repr=False)
    """Which instruction each computation is, of all ranks' instructions in a row, `[N]`."""
    start: npt.NDArray[np.float64] = field(repr=False)
    """When it starts, `[N]`."""
    end: npt.NDArray[np.float64] = field(repr=False)
    """When it ends, `[N]`."""
    bounds: npt.NDArray[np.int64] = field(repr=False)
    """Rank r's computations are `bounds[r]` to `bounds[r + 1]`, `[P + 1]`."""
    halves: npt.NDArray[np.float64] = field(repr=False)
    """What F and the whole backward of each stage take alone, `[2, S]`: where pictures cut pairs."""

    @property
    def idle(self) -> npt.NDArray[np.float64]:
        """Time that each rank does not compute, from 0 to the makespan, `[P]`."""
        return self.makespan - self.busy

    @property
    def bubble(self) -> float:
        """The least idle time of any rank: what the schedule itself costs, in units of time."""
        return float(self.idle.min())

    def plot(self, path: str | os.PathLike[str] | None = None, **options: Any) -> Any:
        """Draws it; see :func:`dualpipe.draw.plot`."""
        from dualpipe.draw import plot

        return plot(self, path, **options)

    def to_perfetto(self, path: str | os.PathLike[str] | None = None, **options: Any) -> str:
        """A trace for ui.perfetto.dev; see :func:`dualpipe.draw.to_perfetto`."""
        from dualpipe.draw import to_perfetto

        return to_perfetto(self, path, **options)
