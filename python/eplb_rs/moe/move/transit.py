"""Experts on their way between ranks, beside the weights that serve.

On a GPU transfers run on a stream of their own and the host only asks whether they are done; on a
CPU it waits for those it has begun.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import timedelta

    from eplb_rs.moe.move.tasks import Hop, LayerTask
    from eplb_rs.moe.weights import ExpertWeights

__all__ = ["Cargo", "Transit"]


class Cargo:
    """What comes to this rank for one layer.

    Attributes:
        task: What there is to do.
        staged: What has come or is coming, by the slot it is for.
    """

    def __init__(self, task: LayerTask) -> None:
        self.task = task
        self.staged: dict[int, dict[str, Tensor]] = {}
        self._ahead: deque[list[Hop]] = deque(task.rounds)
        self._works: list[distributed.Work] = []
        self._event: Any = None


class Transit:
    """Carries the experts of one rank.

    Args:
        weights: Where they come from, and where they go in the end.
        group: The ranks; of its own, so that nobody else's messages come between.
        limit: How long any wait may take.
        max_bytes_in_flight: How many bytes may be under way to this rank at once.
        before_send: Called with layer and slot before an expert is sent.
    """

    def __init__(
        self,
        weights: ExpertWeights,
        group: distributed.ProcessGroup,
        *,
        limit: timedelta,
        max_bytes_in_flight: int,
        before_send: Callable[[int, int], None] | None = None,
    ) -> None:
        self._weights, self._group, self._limit = weights, group, limit
        self._in_flight = max_bytes_in_flight
        self._before_send = before_send
        self._stream: Any = None
        if weights.device.type == "cuda":
            self._stream = torch.cuda.Stream(weights.device)  # type: ignore[no-untyped-call]
        self._free: list[dict[str, Tensor]] = []

    def arrived(self, cargo: Cargo, *, block: bool) -> bool:
        """Begins what may be begun, and says whether all that other ranks send is here.

        Args:
            cargo: Of a layer.
            block: Whether to wait for it.

        Raises:
            RuntimeError: A peer was lost.
            TimeoutError: A wait has passed its limit.
        """
        while True:
            if cargo._event is not None:
                if not block and not cargo._event.query():
                    return False
                self._wait_for(cargo._event)
                cargo._event = None
            for work in cargo._works:
                work.wait(self._limit)
            cargo._works.clear()
            if not cargo._ahead:
                return True
            self._begin_rounds(cargo)
            if not block:
                return False

    def room(self) -> dict[str, Tensor]:
        """Room for one expert beside the weights."""
        if self._free:
            return self._free.pop()
        return {
            field.name: torch.empty(field.shape, dtype=field.dtype, device=self._weights.device)
            for field in self._weights.fields
        }

    @torch.no_grad()
    def unload(self, cargo: Cargo) -> None:
        """Puts what has come, and copies within the rank, in place of what was there."""
        tensors = self._weights[cargo.task.layer]
        if self._stream is not None:
            torch.cuda.current_stream(self._weights.device).wait_stream(self._stream)
        for source, slot in cargo.task.copies:  # out of the way before any slot is overwritten
            cargo.staged[slot] = self.room()
            for name, part in cargo.staged[slot].items():
                part.copy_(tensors[name][source])
        for slot, parts in cargo.staged.items():
            for name, part in parts.items():
                tensors[name][slot].copy_(part)
        self._free += cargo.staged.values()
        cargo.staged = {}

    def free(self) -> None:
        """Gives the room back."""
        self._free.clear()

    def close(self, under_way: list[Cargo]) -> None:
        """Closes the group: that wakes those who wait for this rank."""
        for cargo in under_way:
            cargo._works.clear()  # held works would keep them waiting
        self.free()
        if self._stream is not None:
            self._group.abort()
        distributed.destroy_process_group(self._group)

    def _begin_rounds(self, cargo: Cargo) -> None:
        """Begins as many rounds as may be in flight."""
        layer = cargo.task.layer
        operations: list[distributed.P2POp] = []
        room = self._in_flight
        while cargo._ahead and (not operations or room >= self._weights.expert_bytes):
            for way, slot, peer in cargo._ahead.popleft():
                call: Any
                if way == "send":
                    if self._before_send is not None:
                        self._before_send(layer, slot)
                    parts, call = self._weights.slot(layer, slot), distributed.isend
                else:
                    parts, call = self.room(), distributed.irecv
                    cargo.staged[slot] = parts
                    room -= self._weights.expert_bytes
                operations += [
                    distributed.P2POp(call, part, group=self._group, group_peer=peer)
                    for part in _as_bytes(parts)
                ]
        if not operations:
            return
        if self._stream is None:
            cargo._works = distributed.batch_isend_irecv(operations)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._weights.device))
        with torch.cuda.stream(self._stream):
            for work in distributed.batch_isend_irecv(operations):
                work.wait()
            cargo._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            cargo._event.record(self._stream)

    def _wait_for(self, event: Any) -> None:
        """Polls, so that a lost peer cannot hold the host for ever."""
        until = time.monotonic() + self._limit.total_seconds()
        while not event.query():
            if time.monotonic() > until:
                raise TimeoutError("a transfer passed its limit")
            time.sleep(50e-6)


def _as_bytes(parts: dict[str, Tensor]) -> list[Tensor]:
    """What is not empty, as bytes: those go through every backend, whatever they stand for."""
    return [part.reshape(-1).view(torch.uint8) for part in parts.values() if part.numel()]
