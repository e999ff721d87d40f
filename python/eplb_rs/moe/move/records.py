"""What ranks leave in a store about a move, so that all come to the same end without each other.

For each layer there is a count of the ranks that have all of it beside what they held, and its
fate: new from some step on, as the last of them writes, or old, as the first writes that gives up.
Whoever writes first decides; nobody can write a second time.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from torch.distributed.distributed_c10d import PrefixStore

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta

    from torch.distributed.distributed_c10d import Store

__all__ = ["GaveUpError", "MoveRecords"]

_NEW, _OLD = "new", "old"
_DELETED_AT_ONCE = 4


class GaveUpError(RuntimeError):
    """Another rank has given a layer up."""


class MoveRecords:
    """The records of one mover.

    Args:
        store: Where they are kept.
        ranks: The mover's ranks, as torch.distributed counts; all make their records at once.
        rank: This one among them.
    """

    def __init__(self, store: Store, ranks: Sequence[int], rank: int) -> None:
        self._rank, self._num_ranks = rank, len(ranks)
        name = f"eplb-mover/{'-'.join(map(str, ranks))}"
        # Each mover of these ranks is joined by all of them: whatever else a process has made.
        before = (store.add(f"{name}/joined", 1) - 1) // len(ranks)
        self._store = PrefixStore(f"{name}/{before}", store)
        self._epoch = -1
        self._written: list[str] = []
        self._before: list[str] = []
        self._stale: deque[str] = deque()

    def begin(self) -> None:
        """Begins the records of a move, by the same count on all ranks."""
        self._epoch += 1
        # Some may still read the records of the last move, but of the one before that none.
        self._stale += self._before
        self._before, self._written = self._written, []

    def tidy(self) -> None:
        """Deletes a few records that nobody reads any more."""
        for _ in range(min(_DELETED_AT_ONCE, len(self._stale))):
            self._store.delete_key(self._stale.popleft())

    def commit(self, layer: int, switch_at: int) -> None:
        """Says that this rank has a layer; the last to say so decides when all switch."""
        commits, fate = self._key(layer, "commits"), self._key(layer, "fate")
        if self._rank == 0:
            self._written += [commits, fate]
        if self._store.add(commits, 1) == self._num_ranks:
            self._store.compare_set(fate, "", f"{_NEW} {switch_at}")

    def switch_step(self, layer: int, *, wait: timedelta | None = None) -> int | None:
        """From which step on a layer is new; ``None`` while that is open.

        Args:
            layer: One that this rank has committed.
            wait: How long to wait for it.

        Raises:
            GaveUpError: It stays old.
        """
        key = self._key(layer, "fate")
        if wait is not None:
            self._store.wait([key], wait)
        elif not self._store.check([key]):
            return None
        fate, _, step = self._store.get(key).decode().partition(" ")
        if fate != _NEW:
            raise GaveUpError("another rank gave up")
        return int(step)

    def settle(self, layer: int) -> bool:
        """Gives a layer up unless it is decided; says whether it is new."""
        fate = self._store.compare_set(self._key(layer, "fate"), "", _OLD)
        return fate.decode().startswith(_NEW)

    def sign(self, layer: int, slot: int, checksum: int) -> None:
        """Leaves the checksum of what a slot was sent with."""
        key = self._key(layer, f"crc/{slot}")
        self._store.set(key, str(checksum))
        self._written.append(key)

    def signed(self, layer: int, slot: int) -> int:
        """The checksum that was left for a slot."""
        return int(self._store.get(self._key(layer, f"crc/{slot}")))

    def leave_word(self) -> None:
        """Says that this rank lives, and will not go on with this mover."""
        self._store.set(f"word/{self._rank}", "")

    def lost(self, grace_s: float) -> tuple[int, ...]:
        """The ranks that leave no word for so long; the first to have waited decides for all."""
        words = [f"word/{rank}" for rank in range(self._num_ranks)]
        until = time.monotonic() + grace_s
        while time.monotonic() < until:
            if self._store.check(words) or self._store.check(["lost"]):
                break
            time.sleep(0.01)
        silent = [str(rank) for rank, word in enumerate(words) if not self._store.check([word])]
        lost = self._store.compare_set("lost", "", f"[{','.join(silent)}]").decode()
        return tuple(int(rank) for rank in lost.strip("[]").split(",") if rank)

    def _key(self, layer: int, what: str) -> str:
        return f"{self._epoch}/{layer}/{what}"
