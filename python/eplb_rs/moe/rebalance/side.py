"""What ranks tell each other about load and plans, beside the passes.

Messages are small and go over gloo from the host, whatever the model's own backend is: they take
no time of a GPU and cannot come between its collectives. Each is begun at one pass and taken at a
later one, by when it has long arrived.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta

__all__ = ["HostCopy", "Message", "Side", "Verdict", "Vote", "digest"]

_NO_DIGEST = 1 << 62


@dataclass(frozen=True, slots=True)
class Vote:
    """What a rank has to say about a plan that is being made.

    Attributes:
        ready: Whether it is done.
        good: Whether it has not failed.
        worth: Whether it is worth its moves.
        digest: Stands for the plan, below 2^62; ``None`` on ranks that make none.
    """

    ready: bool = True
    good: bool = True
    worth: bool = True
    digest: int | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What all ranks have said; the same on all."""

    ready: bool
    good: bool
    worth: bool
    same: bool
    """Whether all that have made a plan have made the same."""


class Message:
    """A collective under way; :meth:`take` waits for it."""

    def __init__(self, work: Any, tensor: Tensor, limit: timedelta) -> None:
        self._work, self._tensor, self._limit = work, tensor, limit

    def take(self) -> Tensor:
        """What has come.

        Raises:
            RuntimeError: A rank was lost, or the limit has passed.
        """
        self._work.wait(self._limit)
        self._work = None  # held works keep others waiting when the group is closed
        return self._tensor


class HostCopy:
    """Tensors of the device on their way to the host, without waiting for them."""

    def __init__(self, tensors: Sequence[Tensor], limit: timedelta) -> None:
        stacked = torch.stack(tuple(tensors))
        self._limit = limit
        self._event: Any = None
        if not stacked.is_cuda:
            self._host = stacked
            return
        self._host = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True)
        self._host.copy_(stacked, non_blocking=True)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record()

    def take(self) -> Tensor:
        """What has come. Polls, so that a pass that never ends cannot hold the host for ever.

        Raises:
            TimeoutError: The device did not come so far within the limit.
        """
        until = time.monotonic() + self._limit.total_seconds()
        while self._event is not None and not self._event.query():
            if time.monotonic() > until:
                raise TimeoutError("the recorded load did not come from the device in time")
            time.sleep(50e-6)
        return self._host


class Side:
    """A gloo group of the ranks.

    Args:
        group: The ranks.
        limit: How long any wait may take.

    Attributes:
        group: The gloo group.
    """

    def __init__(self, group: distributed.ProcessGroup, limit: timedelta) -> None:
        made: Any = distributed.new_group(
            distributed.get_process_group_ranks(group),
            timeout=limit,
            backend="gloo",
            use_local_synchronization=True,
        )
        self.group: distributed.ProcessGroup = made
        self._limit = limit
        self._closed = False

    @property
    def rank(self) -> int:
        """This rank."""
        return self.group.rank()

    def begin_sum(self, tensor: Tensor) -> Message:
        """Adds a tensor of the host up over all ranks, in place."""
        work = distributed.all_reduce(tensor, group=self.group, async_op=True)
        return Message(work, tensor, self._limit)

    def begin_vote(self, vote: Vote) -> Message:
        """Tells all ranks; :meth:`verdict` reads what comes."""
        low = high = _NO_DIGEST
        if vote.digest is not None:
            low, high = vote.digest, -vote.digest
        cast = torch.tensor([vote.ready, vote.good, vote.worth, low, high], dtype=torch.int64)
        least = distributed.ReduceOp.MIN
        work = distributed.all_reduce(cast, op=least, group=self.group, async_op=True)
        return Message(work, cast, self._limit)

    @staticmethod
    def verdict(message: Message) -> Verdict:
        """What all ranks have said.

        Raises:
            RuntimeError: As :meth:`Message.take`.
        """
        ready, good, worth, low, high = message.take().tolist()
        return Verdict(bool(ready), bool(good), bool(worth), same=low == -high)

    def begin_broadcast(self, tensor: Tensor) -> Message:
        """Sends rank 0's tensor to all, in place."""
        work = distributed.broadcast(tensor, group=self.group, group_src=0, async_op=True)
        return Message(work, tensor, self._limit)

    def close(self) -> None:
        """Closes the group: that wakes those who wait for this rank."""
        if not self._closed:
            self._closed = True
            distributed.destroy_process_group(self.group)


def digest(*parts: bytes) -> int:
    """A number below 2^62 that stands for these bytes."""
    content = hashlib.blake2b(digest_size=8)
    for part in parts:
        content.update(part)
    return int.from_bytes(content.digest(), "little") >> 2
