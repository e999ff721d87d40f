"""Process groups of the executor's own."""

from __future__ import annotations

import re
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist

from dualpipe.errors import PeerLostError, PipelineError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["SET_UP_S", "given_group", "make_group", "waiting"]

SET_UP_S = 60.0
"""How far apart the members of a group may come to make it."""

# The place in its source, and advice for those who know no more than it does.
_GLOO = re.compile(r"^\[\S+\] |\. This is typically .*")

# Without an underscore since PyTorch 2.15.
_set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout


def make_group(
    ranks: Sequence[int], limit_s: float, backend: str | None = None
) -> dist.ProcessGroup:
    """A new group of these ranks of the default group, made by them alone.

    Args:
        ranks: Its members, this rank among them. They may come up to a minute apart.
        limit_s: How long a wait in it may last.
        backend: By default the default group's.
    """
    limit = timedelta(seconds=limit_s)
    with _place_of_its_own(ranks):
        group = dist.new_group(
            list(ranks),
            timeout=max(limit, timedelta(seconds=SET_UP_S)),
            backend=backend,
            use_local_synchronization=True,
        )
    assert isinstance(group, dist.ProcessGroup)
    _set_timeout(limit, group)
    return group


@contextmanager
def _place_of_its_own(ranks: Sequence[int]) -> Iterator[None]:
    """Lets a new group have a place in the store that no group had before.

    PyTorch names a group after its ranks and the number of groups that there are, so a group that
    follows one that was destroyed would meet the addresses of that one.
    """
    groups = dist.distributed_c10d._world.pg_map
    default = dist.group.WORLD
    assert default is not None
    backend, store = groups[default]
    name = f"dualpipe/groups/{'_'.join(map(str, sorted(ranks)))}"
    # Every member counts for itself: they make the groups of these ranks in the same order.
    number = store.add(f"{name}/made by {dist.get_rank()}", 1)
    groups[default] = backend, dist.distributed_c10d.PrefixStore(f"{name}/{number}", store)
    try:
        yield
    finally:
        groups[default] = backend, store


def given_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The group, or the default group for None.

    Raises:
        PipelineError: ``no_group`` where there is none, or this rank is not in it.
    """
    if group is None and not dist.is_initialized():
        raise PipelineError(
            code="no_group",
            argument="group",
            got="None",
            expected="a process group",
            hint="call torch.distributed.init_process_group first",
        )
    if group is None:
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        outside = group is dist.GroupMember.NON_GROUP_MEMBER
        raise PipelineError(
            code="no_group",
            argument="group",
            got="a group without this rank" if outside else type(group).__name__,
            expected="a process group that this rank is in",
            hint="make executors on the group's members alone" if outside else "",
        )
    return group


@contextmanager
def waiting(limit_s: float, peer: int | None = None) -> Iterator[None]:
    """Around what is done in a group: a failure of it means that a rank is gone or late.

    Raises:
        PeerLostError: ``limit`` or ``closed``.
    """
    try:
        yield
    except (RuntimeError, TimeoutError) as error:
        if isinstance(error, PipelineError):
            raise
        text = _GLOO.sub("", str(error).partition("\n")[0]) or "timed out"
        late = "timed out" in text.lower() or "timeout" in text.lower()
        raise PeerLostError(
            code="limit" if late else "closed",
            got=text,
            expected=f"an answer within {limit_s:g} s",
            peer=peer,
        ) from error
