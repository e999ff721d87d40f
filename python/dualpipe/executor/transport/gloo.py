"""Messages between processes on CPUs, by gloo."""

from __future__ import annotations

import weakref
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from dualpipe.errors import PipelineError
from dualpipe.executor.groups import make_group, waiting
from dualpipe.executor.pool import Pool
from dualpipe.executor.transport.base import Arrival, Departure, Transport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dualpipe.executor.transport.base import Envelope, Message, TensorSpec

__all__ = ["GlooTransport"]


class _Pending:
    """Works of one message."""

    __slots__ = ("__weakref__", "_peer", "_tensors", "_transport", "_works")

    def __init__(
        self,
        tensors: list[torch.Tensor],
        works: list[dist.Work],
        peer: int,
        transport: GlooTransport,
    ) -> None:
        self._tensors = tensors
        self._works = works
        self._peer = peer
        self._transport = transport
        transport.under_way.add(self)

    def _wait(self) -> list[torch.Tensor]:
        transport = self._transport
        transport.waiting_for = self._peer
        with waiting(transport.limit_s, self._peer):
            while self._works:
                self._works[0].wait(transport.limit)
                del self._works[0]
        transport.waiting_for = None
        tensors, self._tensors = self._tensors, []
        return tensors

    def drop(self) -> None:
        self._works = []
        self._tensors = []


class _GlooArrival(_Pending, Arrival):
    __slots__ = ()

    def ready(self) -> list[torch.Tensor]:
        return self._wait()


class _GlooDeparture(_Pending, Departure):
    __slots__ = ()

    def done(self) -> None:
        self._wait()


class GlooTransport(Transport):
    """Unbuffered sends and receives of a gloo group of its own, whose threads move the bytes."""

    name = "gloo"

    def __init__(self, group: dist.ProcessGroup, device: torch.device, limit_s: float) -> None:
        super().__init__(group, device, limit_s)
        if device.type != "cpu":
            raise PipelineError(
                code="transport",
                argument="transport",
                got=f"gloo for tensors on {device}",
                expected='"nccl" or "push" there',
            )
        self.limit = timedelta(seconds=limit_s)
        self.under_way: weakref.WeakSet[_Pending] = weakref.WeakSet()
        self._channel = make_group(dist.get_process_group_ranks(group), limit_s, "gloo")
        self.pool = Pool(device)

    def prepare(self, envelopes: Sequence[Envelope]) -> None:
        self.pool.keep(spec for e in envelopes if not e.outgoing for spec in e.specs)

    def post_receive(self, peer: int, message: Message, specs: Sequence[TensorSpec]) -> Arrival:
        tensors = [self.pool.take(spec) for spec in specs]
        # An empty message is none: both ends know its shape.
        with waiting(self.limit_s, peer):
            works = [self._channel.recv([t], peer, 0) for t in tensors if t.numel()]
        return _GlooArrival(tensors, works, peer, self)

    def send(self, peer: int, message: Message, tensors: Sequence[torch.Tensor]) -> Departure:
        held = [tensor.detach().contiguous() for tensor in tensors]
        with waiting(self.limit_s, peer):
            works = [self._channel.send([t], peer, 0) for t in held if t.numel()]
        return _GlooDeparture(held, works, peer, self)

    def close(self, *, drop: bool = False) -> None:
        # A group closes its connections, which wakes its peers, when no work holds it any more.
        for pending in self.under_way:
            pending.drop()
        dist.destroy_process_group(self._channel)
        del self._channel
