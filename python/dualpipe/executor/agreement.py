"""What ranks must agree on before a step, found out before anything is sent."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from dualpipe.errors import MismatchError, PipelineError, ScheduleError
from dualpipe.executor.groups import SET_UP_S, make_group, waiting

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["Agreement"]


class Agreement:
    """Exchanges what ranks are about to do, over a gloo group of the same members.

    Ranks that do what they did last time have agreed on it then, so they tell one another no more
    than that.

    Cost: where no rank does anything new, 8 bytes from every rank to one of them and back, begun
    by :meth:`start` and awaited by :meth:`finish`; where one does, two all-gathers more.
    """

    root: int = 0
    """The rank of the group by way of which the others agree."""

    def __init__(self, group: dist.ProcessGroup, limit_s: float) -> None:
        self._limit_s = limit_s
        with waiting(max(limit_s, SET_UP_S)):
            self._group = make_group(dist.get_process_group_ranks(group), limit_s, "gloo")
        self._last: tuple[dict[str, Any], Any] | None = None
        self._found: list[Any] = []
        self._asked: tuple[dict[str, Any], Any] = ({}, None)
        # On the CPU, whatever the caller's default device is: gloo reads them there.
        self._news = torch.zeros(self._group.size(), 1, dtype=torch.int64, device="cpu")
        self._answer = torch.zeros(1, dtype=torch.int64, device="cpu")
        self._works: list[tuple[int, dist.Work]] = []

    def exchange(self, equal: Mapping[str, Any], own: Any) -> list[Any]:
        """What every rank of the group gave as ``own``, once all have given the same ``equal``.

        Args:
            equal: By name, what must be the same everywhere; its ``repr`` is compared.
            own: What others are to know; an exception refuses what was about to be done.

        Raises:
            MismatchError: ``mismatch``, where ``equal`` differs, on every rank alike.
            PipelineError: A rank gave an exception as ``own``; there, that exception.
            PeerLostError: ``closed`` or ``limit``: a rank is gone, or did not come.
        """
        self.start(equal, own)
        return self.finish()

    def start(self, equal: Mapping[str, Any], own: Any) -> list[Any] | None:
        """Begins an exchange. :meth:`finish` must follow, whatever happens in between.

        Returns:
            What it will give if no rank has anything new to say; None where this one has.

        Raises:
            PeerLostError: ``closed``.
        """
        asked = self._asked = dict(equal), own
        news = asked != self._last
        mine = self._news[self._group.rank()].fill_(news)
        if self._group.rank() == self.root:
            for rank in self._others():
                self._post("recv", self._news[rank], rank)
        else:
            self._post("recv", self._answer, self.root)
            self._post("send", mine, self.root)
        return None if news else self._found

    def finish(self) -> list[Any]:
        """Ends an exchange: as :meth:`exchange`."""
        self._wait()
        if self._group.rank() == self.root:
            torch.amax(self._news, 0, out=self._answer)
            for rank in self._others():
                self._post("send", self._answer, rank)
            self._wait()
        if not self._answer.item():
            return self._found
        asked = self._asked
        told = {name: repr(value) for name, value in asked[0].items()}
        every: list[Any] = [None] * self._group.size()
        with waiting(self._limit_s):
            dist.all_gather_object(every, (told, asked[1]), group=self._group)
        found = [own for _, own in every]
        self._refuse(found)
        self._compare([told for told, _ in every])
        # What need not be equal is asked in between, and is news every time.
        if told:
            self._last, self._found = asked, found
        return found

    def _others(self) -> Iterator[int]:
        return (rank for rank in range(self._group.size()) if rank != self.root)

    def _post(self, way: str, tensor: torch.Tensor, rank: int) -> None:
        with waiting(self._limit_s, rank):
            self._works.append((rank, getattr(self._group, way)([tensor], rank, 0)))

    def _wait(self) -> None:
        limit = timedelta(seconds=self._limit_s)
        while self._works:
            rank, work = self._works[-1]
            with waiting(self._limit_s, rank):
                work.wait(limit)
            del work, self._works[-1]

    def _refuse(self, every: list[Any]) -> None:
        for rank, value in enumerate(every):
            if isinstance(value, (PipelineError, ScheduleError)):
                if rank == self._group.rank():
                    raise value
                kind = MismatchError if isinstance(value, MismatchError) else PipelineError
                raise kind(
                    code=value.code,
                    argument=value.argument,
                    got=value.got,
                    expected=value.expected,
                    hint=f"{value.hint}{'; ' * bool(value.hint)}rank {rank} of the group refused it",
                )

    def _compare(self, every: list[dict[str, str]]) -> None:
        for name in sorted(set().union(*every)):
            ranks: dict[str | None, list[int]] = {}
            for rank, told in enumerate(every):
                ranks.setdefault(told.get(name), []).append(rank)
            if len(ranks) > 1:
                parts = (
                    f"{value or 'nothing'} on {'rank' if len(at) == 1 else 'ranks'} "
                    f"{', '.join(map(str, at))}"
                    for value, at in ranks.items()
                )
                raise MismatchError(
                    code="mismatch",
                    argument=name,
                    got="; ".join(parts),
                    expected="the same on every rank of the group",
                )

    def close(self) -> None:
        """Ends the group, which wakes ranks that wait in it."""
        self._works = []
        dist.destroy_process_group(self._group)
        del self._group
