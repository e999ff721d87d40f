"""Who is lost, when a step breaks off: notes in a store that lives in no rank.

A rank whose peer is gone learns of it from its connection; a rank that waits for a living one
does not. So whoever breaks off leaves a note of what it was doing, drops what it waits for and
closes its groups, which wakes its neighbours, and so on. A thread in each rank looks every
quarter of a second whether any rank has left a note, and then leaves one for its own rank, which
may be computing for a while yet. Who has left none after 1.5 seconds is lost; or at once, if a
connection to it broke, since notes are left before connections are closed.

The first rank that knows writes the verdict; all others take that one, so that the survivors
agree on who they are. A rank that was stopped and goes on later finds itself named there.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import weakref
from typing import TYPE_CHECKING, NamedTuple

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from dualpipe.errors import PeerLostError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed.distributed_c10d import Store

__all__ = ["Doing", "Watch", "find_store"]

_LOOK_S = 0.25
"""How often a rank looks for notes of others."""

_ANSWER_S = 1.5
"""How long a rank has to leave its own after the first."""

_POLL_S = 0.01

_NO_STORE = "give the executor a store that lives in no rank, to know which rank is lost"
_MENDS = {
    "lost": "close the executor, and make another with a group of the ranks that are left",
    "limit": "close the executor, and make another; a longer `limit_s` waits for slow ranks",
}


class Doing(NamedTuple):
    """What a rank is at."""

    instruction: str | None
    """A word of the schedule's text; None between steps."""
    peer: int | None = None
    """The pipeline rank that it waits for; None while it computes."""


class _Note(NamedTuple):
    instruction: str | None
    peer: int | None
    """Whom it waits for, or waited for when it broke off."""
    cause: str
    """``runs``, or what broke it off: ``closed``, ``limit`` or ``failed``."""
    error: str
    """The error that the rank itself raised."""

    def __str__(self) -> str:
        place = "between steps" if self.instruction is None else f"at {self.instruction}"
        wait = "" if self.peer is None else f", waiting for rank {self.peer}"
        end = f": {self.error}" if self.error else ""
        verb = {"runs": "was", "limit": "gave up"}.get(self.cause, "broke off")
        return f"{verb} {place}{wait}{end}"


class _Verdict(NamedTuple):
    code: str
    lost: list[int]
    """The ranks at fault."""
    missing: list[int]
    """The ranks that left no note."""


class Watch:
    """One rank's part in finding out who is lost.

    Args:
        store: Lives in no rank; None for none.
        token: The same on all ranks of this executor, and no other.
        rank: The pipeline rank.
        num_ranks: P.
        limit_s: How long a wait may last, for the text.
        doing: The executor's method that says what the rank is at just now, called from another
            thread. It is held weakly: an executor that nobody uses any more is not kept by this.

    Cost: a look into the store every quarter of a second, from a thread of its own; nothing in
    the step.
    """

    def __init__(
        self,
        store: Store | None,
        token: str,
        rank: int,
        num_ranks: int,
        limit_s: float,
        doing: Callable[[], Doing],
    ) -> None:
        self._store = None if store is None else PrefixStore(f"dualpipe/{token}", _connect(store))
        self._rank = rank
        self._num_ranks = num_ranks
        self._limit_s = limit_s
        self._doing = weakref.WeakMethod(doing)
        self._noted = False
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        if self._store is not None:
            self._thread = threading.Thread(target=self._look, name="dualpipe watch", daemon=True)
            self._thread.start()

    def broke_off(self, error: BaseException, doing: Doing) -> None:
        """Leaves the note of a step that has broken off. The groups are closed after it."""
        if isinstance(error, PeerLostError):
            note = _Note(doing.instruction, doing.peer, error.code, "")
        else:
            text = ": ".join(filter(None, [type(error).__name__, str(error)]))
            text = text.partition("\n")[0][:300]
            note = _Note(doing.instruction, None, "failed", text)
        self._leave(note, again=True)

    def judge(self, error: PeerLostError, doing: Doing) -> PeerLostError:
        """The error to raise instead: with the ranks at fault, and what every rank was doing.

        Cost: until all ranks have left notes, at most 1.5 s.
        """
        verdict = _Verdict(error.code, [], [])
        notes: dict[int, _Note] = {}
        hint = _NO_STORE
        if self._store is not None:
            try:
                verdict, notes = self._verdict()
                hint = _MENDS.get(verdict.code, "close the executor, and make another")
            except RuntimeError as fault:  # DistError: the store is gone
                hint = f"the store is gone too ({str(fault).partition(chr(10))[0]})"
        lost = tuple(verdict.lost)
        code = "expelled" if verdict.code == "lost" and self._rank in lost else verdict.code
        return PeerLostError(
            code=code,
            got=self._met(code, lost, notes) if notes else error.got,
            expected=f"an answer within {self._limit_s:g} s",
            hint=hint,
            rank=self._rank,
            instruction=doing.instruction,
            peer=lost[0] if lost else doing.peer,
            lost=lost,
            notes={rank: str(note) for rank, note in notes.items()},
        )

    def poll(self) -> None:
        """Raises if another rank has broken off.

        For waits that a closed group does not end.

        Raises:
            PeerLostError: ``closed``.
        """
        if self._noted:
            raise PeerLostError(
                code="closed",
                got="another rank has broken off",
                expected=f"an answer within {self._limit_s:g} s",
            )

    def close(self) -> None:
        """Ends the thread."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=2)

    # Notes

    def _look(self) -> None:
        assert self._store is not None
        with contextlib.suppress(RuntimeError):  # the store is gone: nobody will look here
            while not self._ended.wait(_LOOK_S):
                found = self._store.check(["any"])
                doing = self._doing()
                if found and doing is not None:
                    self._leave(_Note(*doing(), "runs", ""), again=False)
                if found or doing is None:
                    return
                del doing

    def _leave(self, note: _Note, *, again: bool) -> None:
        """Writes this rank's note; a second time only if ``again``."""
        with self._lock:
            if self._store is None or (self._noted and not again):
                return
            self._noted = True
            with contextlib.suppress(RuntimeError):
                self._store.set(f"note/{self._rank}", json.dumps(note))
                self._store.set("any", "1")

    def _verdict(self) -> tuple[_Verdict, dict[int, _Note]]:
        """What all survivors agree on."""
        assert self._store is not None
        keys = {rank: f"note/{rank}" for rank in range(self._num_ranks)}
        deadline = time.monotonic() + _ANSWER_S
        while not self._store.check(["verdict"]):
            missing = [rank for rank, key in keys.items() if not self._store.check([key])]
            notes = self._read(keys, missing)
            gone = {note.peer for note in notes.values() if note.cause == "closed"}
            if gone.issuperset(missing) or time.monotonic() > deadline:
                self._store.compare_set("verdict", "", json.dumps(self._find(missing, notes)))
                break
            time.sleep(_POLL_S)
        verdict = _Verdict(*json.loads(self._store.get("verdict")))
        return verdict, self._read(keys, verdict.missing)

    def _read(self, keys: dict[int, str], missing: list[int]) -> dict[int, _Note]:
        assert self._store is not None
        return {
            rank: _Note(*json.loads(self._store.get(key)))
            for rank, key in keys.items()
            if rank not in missing
        }

    def _find(self, missing: list[int], notes: dict[int, _Note]) -> _Verdict:
        failed = [rank for rank, note in notes.items() if note.cause == "failed"]
        if failed:
            return _Verdict("failed", sorted({*failed, *missing}), missing)
        if missing:
            return _Verdict("lost", missing, missing)
        late = {_end_of_waits(rank, notes) for rank, note in notes.items() if note.cause == "limit"}
        ranks = sorted(rank for rank in late if rank is not None)
        return _Verdict("limit" if ranks else "closed", ranks, [])

    def _met(self, code: str, lost: tuple[int, ...], notes: dict[int, _Note]) -> str:
        names = f"{'rank' if len(lost) == 1 else 'ranks'} {', '.join(map(str, lost))}"
        if code == "expelled":
            return "this rank left no note in time and was taken for lost"
        if code == "lost":
            return f"{names} left no note: killed, stopped or cut off"
        if code == "failed":
            return f"{names} raised {notes[lost[0]].error}"
        if code == "limit":
            return f"{names} did not answer"
        return "a connection broke, though every rank lives"


def _end_of_waits(rank: int, notes: dict[int, _Note]) -> int | None:
    """Whom a rank waited for in the end: one that waited for no other."""
    seen: list[int] = []
    peer = notes[rank].peer
    while peer is not None and peer not in seen:
        seen.append(peer)
        peer = notes[peer].peer
    return seen[-1] if seen else None


def _connect(store: Store) -> Store:
    """A connection of the watch's own: nothing that others wait for in the store is in its way."""
    clone = getattr(store, "clone", None)  # since PyTorch 2.8
    return store if clone is None else clone()


def find_store(given: Store | None) -> Store | None:
    """The store given, or torchrun's, which lives in its agent; None where there is neither."""
    if given is not None:
        return given
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return dist.distributed_c10d._get_default_store()
    return None
