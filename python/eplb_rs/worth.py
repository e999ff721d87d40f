"""Whether a new plan is worth its moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from eplb_rs._inputs import as_number, as_part

if TYPE_CHECKING:
    import numpy.typing as npt

    from eplb_rs.plan import Plan

__all__ = ["Worth"]


@dataclass(frozen=True, eq=False)
class Worth:
    """What a plan gains and costs, from :meth:`eplb_rs.Planner.worth_it`. True where it gains more.

    Attributes:
        plan: The plan.
        moves: How many experts have to be sent from rank to rank, or loaded from storage.
        balance_before: The balance of the plan in force for the load.
        balance: The balance of the plan for it.
        gain_s: What the heaviest ranks are predicted to save over the horizon, in seconds.
        cost_s: What the transfers are predicted to take that computation does not hide, in seconds.
    """

    plan: Plan
    moves: int
    balance_before: float
    balance: float
    gain_s: float
    cost_s: float

    def __bool__(self) -> bool:
        return self.gain_s > self.cost_s

    @property
    def net_s(self) -> float:
        """What is gained beyond the cost, in seconds; below 0 where the plan is not worth it."""
        return self.gain_s - self.cost_s


def worth_of(
    plan: Plan,
    before: Plan,
    *,
    horizon: float,
    us_per_token: float,
    expert_bytes: npt.ArrayLike,
    intra_node_gb_s: float,
    inter_node_gb_s: float,
    latency_us: float,
    hidden: float,
) -> Worth:
    """What a plan gains over ``before``, the plan in force, both for the load to come."""
    transfers = plan.transfers(before)
    seconds = transfers.predicted_s(
        expert_bytes,
        intra_node_gb_s=intra_node_gb_s,
        inter_node_gb_s=inter_node_gb_s,
        latency_us=latency_us,
    )
    saved = float((before.rank_time.max(axis=1) - plan.rank_time.max(axis=1)).sum())
    s_per_token = as_number(us_per_token, "us_per_token", above=True) * 1e-6
    shown = 1.0 - as_part(hidden, "hidden")
    return Worth(
        plan=plan,
        moves=int((transfers.source != transfers.target).sum()),
        balance_before=before.balance,
        balance=plan.balance,
        gain_s=saved * s_per_token * as_number(horizon, "horizon", above=True),
        cost_s=seconds * shown,
    )
