"""Where arriving messages are put: places shared by messages that are never there together."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dualpipe.executor.transport.base import Envelope, TensorSpec

__all__ = ["Place", "lay_out", "tensor_offsets"]

_ALIGNMENT = 512


class Place(NamedTuple):
    """Where a message is put."""

    number: int
    """Which slot, counted for each sender."""
    offset: int
    """Where the slot starts, in bytes."""


def tensor_offsets(specs: Sequence[TensorSpec]) -> list[int]:
    """Where each tensor of a message starts in its slot, and last the size of the slot."""
    offsets = [0]
    for spec in specs:
        size = math.prod(spec.shape) * spec.dtype.itemsize
        offsets.append(offsets[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    return offsets


def lay_out(envelopes: Sequence[Envelope]) -> tuple[list[Place], int]:
    """Places for the arriving messages of a step, and the bytes that they need in all.

    Two messages of one sender share a slot if their sizes are equal and the one has been released
    before the receive of the other is posted, so no sender ever waits for a slot that the receiver
    would free only later. That is the least number of slots for each size.
    """
    places = []
    slots: dict[tuple[int, int], list[tuple[int, Place]]] = {}
    counts: dict[int, int] = {}
    end = 0
    for envelope in envelopes:
        size = tensor_offsets(envelope.specs)[-1]
        taken = slots.setdefault((envelope.peer, size), [])
        free = next((i for i, (until, _) in enumerate(taken) if until < envelope.posted), None)
        if free is None:
            number = counts.get(envelope.peer, 0)
            counts[envelope.peer] = number + 1
            place = Place(number, end)
            end += size
        else:
            place = taken.pop(free)[1]
        taken.append((envelope.released, place))
        places.append(place)
    return places, end
