"""Waits of a CUDA stream for another rank, watched from the host without blocking it."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

import torch

from dualpipe.errors import PeerLostError

if TYPE_CHECKING:
    from dualpipe.executor.transport.base import Message

__all__ = ["PolledWaits"]


class _Wait:
    __slots__ = ("after", "before", "message", "peer", "since")

    def __init__(self, peer: int, message: Message | str, before: torch.cuda.Event) -> None:
        self.peer = peer
        self.message = message
        self.before = before
        self.after: torch.cuda.Event | None = None
        self.since: float | None = None


class PolledWaits:
    """What a stream waits for, and since when.

    The host is ahead of its stream by up to a step, so the limit counts from when the stream has
    come to a wait, not from when the wait was put there: an event before it, and one after it.

    Cost: 4 us a wait, 1 us a look.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._waits: deque[_Wait] = deque()
        self._events: list[torch.cuda.Event] = []

    def enter(self, peer: int, message: Message | str) -> _Wait:
        """Says that the current stream is about to wait."""
        return _Wait(peer, message, self._recorded())

    def leave(self, wait: _Wait) -> None:
        """Says that what comes next in the current stream comes after the wait."""
        wait.after = self._recorded()
        self._waits.append(wait)

    def look(self) -> None:
        """Raises for a wait that has lasted too long.

        Raises:
            PeerLostError: ``limit``, with the peer.
        """
        waits = self._waits
        while waits:
            first = waits[0]
            assert first.after is not None
            if first.after.query():  # type: ignore[no-untyped-call]
                waits.popleft()
                self._events += (first.before, first.after)
                continue
            if first.since is None and first.before.query():  # type: ignore[no-untyped-call]
                first.since = time.monotonic()
            if first.since is not None and time.monotonic() - first.since > self._limit_s:
                raise PeerLostError(
                    code="limit",
                    got=f"nothing for {self._limit_s:g} s where {first.message} was due",
                    expected=f"an answer within {self._limit_s:g} s",
                    peer=first.peer,
                )
            return

    def clear(self) -> None:
        """Forgets all waits."""
        self._waits.clear()
        self._events.clear()

    def _recorded(self) -> torch.cuda.Event:
        event = self._events.pop() if self._events else torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event
