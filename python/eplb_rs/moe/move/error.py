"""What is left when ranks are lost while experts move."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from eplb_rs.moe.weights import slots_of
from eplb_rs.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["MoveError", "StoreLostError", "account"]


class MoveError(RuntimeError):
    """A move that could not be ended; every surviving rank raises one, with the same placement.

    Attributes:
        reason: What this rank noticed first.
        plan: The placement now: each layer wholly as it was, or wholly as it was to be.
        moved: The layers that are as they were to be.
        lost_ranks: The ranks that left no word in time; the same on all ranks.
        lost_experts: `(layer, expert)` of which no surviving rank has a replica.
    """

    def __init__(
        self,
        reason: str,
        *,
        plan: Plan,
        moved: tuple[int, ...],
        lost_ranks: tuple[int, ...],
        lost_experts: tuple[tuple[int, int], ...],
    ) -> None:
        self.reason = reason
        self.plan = plan
        self.moved = moved
        self.lost_ranks = lost_ranks
        self.lost_experts = lost_experts
        lost = f"lost: rank {', '.join(map(str, lost_ranks))}; " if lost_ranks else ""
        gone = f"; {len(lost_experts)} experts have no replica left" if lost_experts else ""
        super().__init__(
            f"the move failed: {reason}; {lost}{len(moved)} layers are as planned, the others as "
            f"they were{gone}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (
            self.reason,
            self.plan,
            self.moved,
            self.lost_ranks,
            self.lost_experts,
        )


def _rebuilt(reason: str, plan: Plan, *rest: tuple[Any, ...]) -> MoveError:
    moved, ranks, experts = rest
    return MoveError(reason, plan=plan, moved=moved, lost_ranks=ranks, lost_experts=experts)


class StoreLostError(RuntimeError):
    """A move failed, and the store that could have said how far it had come failed with it.

    Attributes:
        reason: What this rank noticed first.
        layers: Those of which nobody can say whether they are old or new on other ranks.
    """

    def __init__(self, reason: str, layers: tuple[int, ...]) -> None:
        self.reason = reason
        self.layers = layers
        super().__init__(
            f"the move failed, and so did the store ({reason}): whether layers {list(layers)} are "
            f"old or new on other ranks is unknown; keep the store outside of all ranks"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return StoreLostError, (self.reason, self.layers)


def account(
    reason: str,
    old: Plan,
    new: Plan,
    moved: Sequence[int],
    *,
    lost: tuple[int, ...],
    alive: Sequence[int],
) -> MoveError:
    """The error for a move of which these layers were made, and these ranks lived on."""
    slots = np.array(old.phy2log)
    slots[list(moved)] = new.phy2log[list(moved)]
    held = [slot for rank in alive for slot in slots_of(old, rank)]
    experts = np.arange(old.num_experts)
    gone = tuple(
        (layer, int(expert))
        for layer, row in enumerate(slots)
        for expert in np.setdiff1d(experts, row[held])
    )
    plan = Plan.from_phy2log(
        new.topology,
        slots,
        new.expert_load,
        num_groups=new.num_groups,
        policy=new.policy,
        layer_ids=new.layer_ids,
    )
    return MoveError(reason, plan=plan, moved=tuple(moved), lost_ranks=lost, lost_experts=gone)
