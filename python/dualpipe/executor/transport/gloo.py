"""Messages between processes on CPUs, by gloo."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from dualpipe.errors import PeerLostError, PipelineError
from dualpipe.executor.groups import make_group
from dualpipe.executor.pool import Pool
from dualpipe.executor.transport.base import Arrival, Departure, Transport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dualpipe.executor.transport.base import Envelope, Message, TensorSpec

__all__ = ["GlooTransport"]


class _Pending:
    """Works of one message."""

    __slots__ = ("_limit", "_peer", "_tensors", "_works")

    def __init__(
        self, tensors: list[torch.Tensor], works: list[dist.Work], peer: int, limit: timedelta
    ) -> None:
        self._tensors = tensors
        self._works = works
        self._peer = peer
        self._limit = limit

    def _wait(self) -> list[torch.Tensor]:
        try:
            for work in self._works:
                work.wait(self._limit)
        except RuntimeError as error:
            raise PeerLostError(
                code="lost",
                got=str(error).partition("\n")[0],
                expected=f"an answer within {self._limit.total_seconds():g} s",
                peer=self._peer,
            ) from error
        tensors, self._works, self._tensors = self._tensors, [], []
        return tensors


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
        self._limit = timedelta(seconds=limit_s)
        self._channel = make_group(dist.get_process_group_ranks(group), limit_s, "gloo")
        self.pool = Pool(device)

    def prepare(self, envelopes: Sequence[Envelope]) -> None:
        self.pool.keep(spec for e in envelopes if not e.outgoing for spec in e.specs)

    def post_receive(self, peer: int, message: Message, specs: Sequence[TensorSpec]) -> Arrival:
        tensors = [self.pool.take(spec) for spec in specs]
        # An empty message is none: both ends know its shape.
        works = [self._channel.recv([t], peer, 0) for t in tensors if t.numel()]
        return _GlooArrival(tensors, works, peer, self._limit)

    def send(self, peer: int, message: Message, tensors: Sequence[torch.Tensor]) -> Departure:
        held = [tensor.detach().contiguous() for tensor in tensors]
        works = [self._channel.send([t], peer, 0) for t in held if t.numel()]
        return _GlooDeparture(held, works, peer, self._limit)

    def close(self, *, drop: bool = False) -> None:
        dist.destroy_process_group(self._channel)
