"""Experts on their way between ranks, beside the weights that serve.

All ranks post the same batches in the same order, layer after layer: a batch holds the same rounds
on every rank, and posted otherwise two batches could wait for each other. At most two are under
way, so that the next begins the moment one is done.

On a GPU they run on a stream of their own and the host only asks whether they are done; on a CPU it
waits for those it has begun.
"""

from __future__ import annotations

import time
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

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
        self._under_way = 0

    @property
    def here(self) -> bool:
        """Whether all that other ranks send has come, and all that they want has gone."""
        return not self._ahead and not self._under_way


class _Batch(NamedTuple):
    """Rounds of one layer under way."""

    cargo: Cargo
    works: list[distributed.Work]
    """What the host waits for, on a CPU."""
    done: Any
    """The CUDA event behind it, on a GPU."""


class Transit:
    """Carries the experts of one rank.

    Args:
        weights: Where they come from, and where they go in the end.
        group: The ranks; of its own, so that nobody else's messages come between.
        limit: How long any wait may take.
        max_bytes_in_flight: How many bytes may be under way to this rank at once; the same on all
            ranks.
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
        self._rounds = max(1, max_bytes_in_flight // 2 // max(1, weights.expert_bytes))
        self._most = 2 if max_bytes_in_flight >= 2 * weights.expert_bytes else 1
        self._before_send = before_send
        self._stream: Any = None
        if weights.device.type == "cuda":
            self._stream = torch.cuda.Stream(weights.device)  # type: ignore[no-untyped-call]
            # Under NCCL the first call of a group takes all its ranks, and the first message to a
            # rank takes long.
            sent = torch.zeros(group.size(), device=weights.device)
            distributed.all_to_all_single(torch.empty_like(sent), sent, group=group)
        self._loaded: deque[Cargo] = deque()
        self._batches: deque[_Batch] = deque()
        self._passed: Any = None
        self._free: list[tuple[dict[str, Tensor], Any]] = []
        """Rooms, and the CUDA event behind which each is free."""

    def reserve(self, num_experts: int) -> None:
        """Takes memory for so many experts beside the weights, before any pass has to wait for
        it."""
        self._free = [(self._made(), None) for _ in range(num_experts)]

    def begin_step(self) -> None:
        """What is begun from now on waits for all that this rank has computed so far, and not for
        what :meth:`unload` copies."""
        if self._stream is not None:
            self._passed = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._passed.record(torch.cuda.current_stream(self._weights.device))

    def take(self, cargo: Cargo) -> None:
        """A layer that comes after those taken before it."""
        self._loaded.append(cargo)

    def advance(self, *, block: bool) -> None:
        """Sees what has come, and begins what may be begun.

        Args:
            block: Whether to wait until the first layer that is not here is.

        Raises:
            RuntimeError: A peer was lost.
            TimeoutError: A wait has passed its limit.
        """
        first = self._batches[0].cargo if self._batches else None
        first = first or (self._loaded[0] if self._loaded else None)
        while self._batches and self._landed(self._batches[0], block=self._stream is None):
            self._batches.popleft().cargo._under_way -= 1
        self._post()
        while block and first is not None and not first.here:
            self._landed(self._batches[0], block=True)
            self._batches.popleft().cargo._under_way -= 1
            self._post()

    @torch.no_grad()
    def unload(self, cargo: Cargo) -> None:
        """Puts what has come, and copies within the rank, in place of what was there.

        The host knows that it has come: no stream waits for those that carry what comes next.
        """
        tensors = self._weights[cargo.task.layer]
        for source, slot in cargo.task.copies:  # out of the way before any slot is overwritten
            cargo.staged[slot] = self.room()
            for name, part in cargo.staged[slot].items():
                part.copy_(tensors[name][source])
        for slot, parts in cargo.staged.items():
            for name, part in parts.items():
                tensors[name][slot].copy_(part)
        for source, slot in cargo.task.repeats:
            for name, part in cargo.staged[source].items():
                tensors[name][slot].copy_(part)
        event: Any = None
        if self._stream is not None:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._weights.device))
        self._free += [(parts, event) for parts in cargo.staged.values()]
        cargo.staged = {}

    def room(self) -> dict[str, Tensor]:
        """Room for one expert beside the weights, for who writes on the current stream."""
        return self._free.pop()[0] if self._free else self._made()

    def free(self) -> None:
        """Gives the room back."""
        if self._stream is not None:  # whose memory it is
            self._stream.wait_stream(torch.cuda.current_stream(self._weights.device))
        self._free.clear()

    def close(self) -> None:
        """Closes the group: that wakes those who wait for this rank."""
        self._loaded.clear()
        self._batches.clear()  # held works would keep them waiting
        self.free()
        if self._stream is not None:
            self._group.abort()
        distributed.destroy_process_group(self._group)

    def _landed(self, batch: _Batch, *, block: bool) -> bool:
        """Whether a batch is done; waits for it, polling on a GPU, so that a lost peer cannot hold
        the host for ever."""
        for work in batch.works:
            work.wait(self._limit)
        if batch.done is None:
            return True
        until = time.monotonic() + self._limit.total_seconds()
        while not batch.done.query():
            if not block:
                return False
            if time.monotonic() > until:
                raise TimeoutError("a transfer passed its limit")
            time.sleep(20e-6)
        return True

    def _post(self) -> None:
        """Begins as many batches as may be under way, in order."""
        while self._loaded and len(self._batches) < self._most:
            cargo = self._loaded[0]
            rounds = list(islice(cargo._ahead, self._rounds))
            for _ in rounds:
                cargo._ahead.popleft()
            if not cargo._ahead:
                self._loaded.popleft()
            # One without hops counts as well: at any step all ranks have posted as many batches,
            # so that none waits for what a peer posts only after the next pass.
            self._batches.append(self._posted(cargo, [hop for hops in rounds for hop in hops]))
            cargo._under_way += 1

    def _posted(self, cargo: Cargo, hops: list[Hop]) -> _Batch:
        if not hops:
            return _Batch(cargo, [], None)
        operations: list[distributed.P2POp] = []
        if self._stream is not None:
            self._stream.wait_event(self._passed)
        for way, slot, peer in hops:
            call: Any
            if way == "send":
                if self._before_send is not None:
                    self._before_send(cargo.task.layer, slot)
                parts, call = self._weights.slot(cargo.task.layer, slot), distributed.isend
            else:
                (parts, event), call = self._free.pop(), distributed.irecv
                if event is not None:
                    self._stream.wait_event(event)
                cargo.staged[slot] = parts
            operations += [
                distributed.P2POp(call, part, group=self._group, group_peer=peer)
                for part in _as_bytes(parts)
            ]
        if self._stream is None:
            return _Batch(cargo, distributed.batch_isend_irecv(operations), None)
        with torch.cuda.stream(self._stream):
            for work in distributed.batch_isend_irecv(operations):
                work.wait()
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        return _Batch(cargo, [], done)

    def _made(self) -> dict[str, Tensor]:
        """New room for one expert; on a GPU of the stream on which it is received."""
        with torch.cuda.stream(self._stream):  # which does nothing for None
            return {
                field.name: torch.empty(field.shape, dtype=field.dtype, device=self._weights.device)
                for field in self._weights.fields
            }


def _as_bytes(parts: dict[str, Tensor]) -> list[Tensor]:
    """What is not empty, as bytes: those go through every backend, whatever they stand for."""
    return [part.reshape(-1).view(torch.uint8) for part in parts.values() if part.numel()]
