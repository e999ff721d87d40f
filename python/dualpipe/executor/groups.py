"""Process groups of the executor's own."""

from __future__ import annotations

import hashlib
import re
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

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
    with _name_of_its_own(ranks):
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
def _name_of_its_own(ranks: Sequence[int]) -> Iterator[None]:
    """Lets a new group have a name, and so a place in the store, that no group had before.

    PyTorch names a group that its members make alone after their ranks and the number of groups
    that each of them has made. Members of other groups have made other numbers, and would wait for
    one another in different places; and a group that follows one that was destroyed would meet the
    addresses of that one.
    """
    c10d: Any = dist.distributed_c10d
    made = f"dualpipe/groups/{'_'.join(map(str, sorted(ranks)))}/made by {dist.get_rank()}"
    # Every member counts for itself: they make the groups of these ranks in the same order.
    number = c10d._get_default_store().add(made, 1)
    name = hashlib.sha1(f"dualpipe {sorted(ranks)} {number}".encode(), usedforsecurity=False)
    theirs = c10d._process_group_name
    c10d._process_group_name = lambda *_, **__: name.hexdigest()
    try:
        yield
    finally:
        c10d._process_group_name = theirs


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
