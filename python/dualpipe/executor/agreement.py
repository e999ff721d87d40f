"""What ranks must agree on before a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from dualpipe.errors import MismatchError, PipelineError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Agreement"]


class Agreement:
    """Exchanges what ranks are about to do, over a gloo group of the same members."""

    def __init__(self, group: dist.ProcessGroup, limit_s: float) -> None:
        from datetime import timedelta

        self._group: dist.ProcessGroup = dist.new_group(
            dist.get_process_group_ranks(group),
            backend="gloo",
            timeout=timedelta(seconds=limit_s),
            use_local_synchronization=True,
        )

    def exchange(self, equal: Mapping[str, Any], own: Any) -> list[Any]:
        """What every rank of the group gave as ``own``, once all have given the same ``equal``.

        Raises:
            MismatchError: ``mismatch``, where they have not.
            PipelineError: A rank gave an exception as ``own``.
        """
        every: list[Any] = [None] * self._group.size()
        dist.all_gather_object(every, (dict(equal), own), group=self._group)
        for rank, (_, value) in enumerate(every):
            if isinstance(value, PipelineError):
                raise value if rank == self._group.rank() else _refused_by(rank, value)
        for name, value in equal.items():
            for rank, (other, _) in enumerate(every):
                if other.get(name) != value:
                    raise MismatchError(
                        code="mismatch",
                        argument=name,
                        got=f"{value!r} here, {other.get(name)!r} on rank {rank} of the group",
                        expected="the same on every rank",
                    )
        return [value for _, value in every]

    def close(self, *, drop: bool = False) -> None:
        """Ends the group."""
        dist.destroy_process_group(self._group)


def _refused_by(rank: int, error: PipelineError) -> PipelineError:
    return PipelineError(
        code=error.code,
        argument=error.argument,
        got=error.got,
        expected=error.expected,
        hint=f"rank {rank} of the group refused the step",
    )
