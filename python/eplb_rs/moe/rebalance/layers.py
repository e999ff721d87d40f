"""What the loop asks of a layer, ours or an engine's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from eplb_rs.moe.layer import Recorded
    from eplb_rs.moe.routing import RoutingRule
    from eplb_rs.plan import Plan

__all__ = ["RebalancedLayer"]


@runtime_checkable
class RebalancedLayer(Protocol):
    """What the loop asks of a layer: :class:`~eplb_rs.moe.ExpertParallelMoE` or an engine's own."""

    @property
    def max_replicas(self) -> int:
        """The most replicas of an expert that a plan to follow may have."""
        ...

    def record(self) -> Recorded:
        """The load since it was last asked for, which begins anew. Waits for nothing."""
        ...

    def follow(self, plan: Plan, routing: RoutingRule = "uniform") -> None:
        """Routes by another plan from the next forward on; its weights are in place."""
        ...
