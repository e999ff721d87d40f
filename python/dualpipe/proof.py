"""What :meth:`Schedule.verify` has shown to hold.

Letters: P ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dualpipe._values import ByValue

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Peaks", "Proof"]


@dataclass(frozen=True, eq=False)
class Peaks(ByValue):
    """The most that each rank holds at once, all `[P]`."""

    activations: npt.NDArray[np.int64]
    """Micro-batches times stages whose activations are alive: F done, B or W not."""
    kept: npt.NDArray[np.int64]
    """Of those, the most at once between I and W. I frees nothing."""
    receive_buffers: npt.NDArray[np.int64]
    """Receive buffers, from the post to the end of the instruction that uses them."""
    send_buffers: npt.NDArray[np.int64]
    """Send buffers, from the send to its wait."""
    bytes: npt.NDArray[np.uint64]
    """All of it together in bytes; 0 where no sizes were given."""


@dataclass(frozen=True, eq=False)
class Proof(ByValue):
    """What :meth:`Schedule.verify` has shown to hold."""

    peaks: Peaks
    """What each rank holds at most."""
    transports: tuple[str, ...]
    """The transports under which the schedule cannot deadlock."""
    num_messages: int
    """Messages between ranks."""
