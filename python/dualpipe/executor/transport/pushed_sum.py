"""Sums of two ranks' tensors: each is pushed to the other rank by a copy engine, and added there.

A push goes into a few places in turn; the receiver adds what has arrived to its own, once its own
has left, and gives the place back. Both ranks add the same two numbers, so the sums are equal bit
for bit. Every byte crosses the link once each way, which is the least for two ranks.

Nothing of it is done in the computing stream, which meets it again in :meth:`PushedSum.wait`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dualpipe.executor.transport.base import PairSum
from dualpipe.executor.transport.polled import PolledWaits

if TYPE_CHECKING:
    from dualpipe.executor.transport.push import PushTransport

__all__ = ["PushedSum"]

_PLACE_BYTES = 1 << 25
_NUM_PLACES = 3


class PushedSum(PairSum):
    """The sums with one peer.

    Args:
        transport: What pushes.
        peer: The other rank.
        slot: Whose counters go with the places.
        places: Where the peer's tensors arrive, `num_bytes` bytes.
        target: Where this rank's go to, in the peer's memory.

    Cost: 15 us of the host's time for every 32 MiB.
    """

    num_bytes = _PLACE_BYTES * _NUM_PLACES

    def __init__(
        self,
        transport: PushTransport,
        peer: int,
        slot: int,
        places: torch.Tensor,
        target: int,
    ) -> None:
        self._transport = transport
        self._peer = peer
        self._slot = slot
        self._places = places
        self._target = target
        self._count = 0
        # Additions go first: what waits for them are copies, and the other rank.
        self._pushing = torch.cuda.Stream(transport.device)  # type: ignore[no-untyped-call]
        self._adding = torch.cuda.Stream(transport.device, priority=-1)  # type: ignore[no-untyped-call]
        self.waits = PolledWaits(transport.limit_s)
        """What the adding stream waits for."""

    def add(self, tensor: torch.Tensor) -> None:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._pushing.wait_event(event)
        flat = tensor.detach().view(-1)
        for part in torch.split(flat, _PLACE_BYTES // flat.element_size()):
            start = self._count % _NUM_PLACES * _PLACE_BYTES
            self._count += 1
            parts = [(part, self._target + start)]
            self._transport.push(self._peer, self._slot, parts, self._pushing, _NUM_PLACES)
            # What is sent must have left before it is added to.
            event.record(self._pushing)
            self._adding.wait_event(event)
            theirs = self._places[start : start + part.nbytes].view(part.dtype)
            with torch.cuda.stream(self._adding):
                what = "a gradient's other copy"
                self._transport.await_arrival(self._peer, what, self._slot, self.waits)
                part.add_(theirs)
                self._transport.give_credit(self._peer, self._slot)

    def wait(self) -> None:
        torch.cuda.current_stream(self._transport.device).wait_stream(self._adding)
