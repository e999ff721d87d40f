"""What ranks must agree on before a step, found out before anything is sent."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from dualpipe.errors import MismatchError, PipelineError, ScheduleError
from dualpipe.executor.groups import make_group, waiting

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Agreement"]


class Agreement:
    """Exchanges what ranks are about to do, over a gloo group of the same members.

    Cost: where no rank does anything new, 24 bytes from every rank to the first and back (0.3 ms
    for 2 ranks that share one core, 0.8 to 3 ms for 4); where one does, two all-gathers more.
    """

    def __init__(self, group: dist.ProcessGroup, limit_s: float) -> None:
        self._limit_s = limit_s
        self._group = make_group(dist.get_process_group_ranks(group), limit_s, "gloo")
        self._last = ""
        self._found: list[Any] = []
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
        told = {name: repr(value) for name, value in equal.items()}
        mine = repr((told, own)) if told else ""
        agreed = _number(repr(told))
        news = not told or mine != self._last or isinstance(own, BaseException)
        # The largest of x and the largest of -x: equal everywhere if they are opposite.
        summary = torch.tensor([agreed, -agreed, news])
        largest, opposite, news = self._largest(summary).tolist()
        if not news and largest == -opposite:
            return self._found
        self._last = ""
        every: list[Any] = [None] * self._group.size()
        with waiting(self._limit_s):
            dist.all_gather_object(every, (told, own), group=self._group)
        self._refuse([own for _, own in every])
        self._compare([told for told, _ in every])
        self._found = [own for _, own in every]
        self._last = mine
        return self._found

    def _largest(self, mine: torch.Tensor) -> torch.Tensor:
        """The largest of every rank's numbers, by way of the first rank."""
        if self._group.rank():
            answer = torch.empty_like(mine)
            self._start("recv", answer, 0)
            self._start("send", mine, 0)
            self._wait()
            return answer
        others = range(1, self._group.size())
        parts = [torch.empty_like(mine) for _ in others]
        for rank, part in zip(others, parts, strict=True):
            self._start("recv", part, rank)
        self._wait()
        answer = torch.stack([mine, *parts]).amax(0)
        for rank in others:
            self._start("send", answer, rank)
        self._wait()
        return answer

    def _start(self, way: str, tensor: torch.Tensor, rank: int) -> None:
        with waiting(self._limit_s, rank):
            self._works.append((rank, getattr(self._group, way)([tensor], rank, 0)))

    def _wait(self) -> None:
        while self._works:
            rank, work = self._works[-1]
            with waiting(self._limit_s, rank):
                work.wait(timedelta(seconds=self._limit_s))
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
                    hint=f"rank {rank} of the group refused the step",
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


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
