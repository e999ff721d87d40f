"""A new plan for the load to come, and whether it is worth its moves."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from eplb_rs.moe.rebalance.side import Vote, digest

if TYPE_CHECKING:
    from collections.abc import Callable

    from eplb_rs._inputs import Load
    from eplb_rs.moe.rebalance.settings import RebalancerSettings
    from eplb_rs.plan import Plan
    from eplb_rs.planner import Planner

__all__ = ["Job", "Proposal", "balance_of", "predicted_balance", "propose"]


@dataclass(frozen=True, slots=True)
class Proposal:
    """What might take the place of the plan in force.

    Attributes:
        plan: The plan.
        worth: Whether it is worth its moves.
        balance_before: The balance of the plan in force for the load to come, as predicted.
        balance: The balance of this plan for it.
        moves: How many experts go from rank to rank, or come from storage.
        num_bytes: The bytes that go from rank to rank.
        seconds: How long it took to plan.
    """

    plan: Plan
    worth: bool
    balance_before: float
    balance: float
    moves: int
    num_bytes: int
    seconds: float


def propose(
    planner: Planner,
    settings: RebalancerSettings,
    in_force: Plan,
    estimate: Load,
    windows: Load,
    expert_bytes: int,
) -> Proposal:
    """Plans as the settings say. The same arguments give the same plan, on every rank.

    Args:
        planner: Plans.
        settings: Say how.
        in_force: What moves start from.
        estimate: `[L, E]`, the load to come.
        windows: `[T, L, E]`, those that have been.
        expert_bytes: Of one expert of one layer.

    Raises:
        PlanError: As the planner's methods.
    """
    begun = time.perf_counter()
    cost, worth, plan = settings.cost, True, None
    if settings.outlook is not None:
        plan = planner.plan_windows(
            windows,
            previous=in_force,
            max_moves=settings.max_moves,
            split="shares" if settings.routing == "shares" else "uniform",
            outlook=settings.outlook,
            layer_ids=in_force.layer_ids,
        )
    elif planner.policy != "balanced":
        plan = planner.plan(estimate, layer_ids=in_force.layer_ids)
    elif cost is None or settings.max_moves is not None:
        plan = planner.plan(
            estimate,
            previous=in_force,
            max_moves=settings.max_moves,
            layer_ids=in_force.layer_ids,
        )
    if cost is not None:
        judged = planner.worth_it(
            estimate,
            in_force,
            plan,
            horizon=settings.horizon_windows,
            us_per_token=cost.us_per_token,
            expert_bytes=expert_bytes,
            intra_node_gb_s=cost.intra_node_gb_s,
            inter_node_gb_s=cost.inter_node_gb_s,
            latency_us=cost.latency_us,
            hidden=cost.hidden,
        )
        plan, worth = judged.plan, bool(judged)
    assert plan is not None, "planned, or chosen by worth_it"
    plan = plan.with_load(estimate)
    return judged_by_balance(
        plan, in_force, estimate, settings, expert_bytes, worth=worth, begun=begun
    )


def judged_by_balance(
    plan: Plan,
    in_force: Plan,
    estimate: Load,
    settings: RebalancerSettings,
    expert_bytes: int,
    *,
    worth: bool,
    begun: float,
) -> Proposal:
    """The proposal of a plan, worth it only if it also raises the balance by enough."""
    transfers = plan.transfers(in_force)
    before = predicted_balance(in_force, estimate, settings)
    balance = predicted_balance(plan, estimate, settings)
    return Proposal(
        plan=plan,
        worth=worth and len(transfers) > 0 and balance >= before + settings.min_gain,
        balance_before=before,
        balance=balance,
        moves=int((transfers.source != transfers.target).sum()),
        num_bytes=int(transfers.num_bytes(expert_bytes)),
        seconds=time.perf_counter() - begun,
    )


def predicted_balance(plan: Plan, load: Load, settings: RebalancerSettings) -> float:
    """The balance of a plan for a load: with shares made for it, or with even splits."""
    if settings.routing == "shares":
        return plan.with_shares(load).balance
    return plan.with_load(load).balance


def balance_of(slot_load: npt.NDArray[np.int64], plan: Plan) -> float:
    """The balance of tokens `[L, R]` that slots have computed, as :class:`~eplb_rs.Plan` has it."""
    topology = plan.topology
    ends = np.cumsum(topology.slots)[:-1]
    by_rank = np.stack([part.sum(axis=1) for part in np.split(slot_load, ends, axis=1)], axis=1)
    live = [rank for rank in range(topology.num_gpus) if rank not in topology.dead]
    speeds = np.array(topology.speeds)[live]
    largest = (by_rank[:, live] * (speeds.mean() / speeds)).max(axis=1).sum()
    mean = by_rank.sum(axis=1).sum() / len(live)
    return min(float(mean / largest), 1.0) if largest > 0 else 1.0


class Job:
    """A proposal in the making, in a thread of its own or at once.

    Args:
        make: Makes it.
        in_force: What it starts from.
        background: Whether in a thread.
    """

    def __init__(self, make: Callable[[], Proposal], in_force: Plan, *, background: bool) -> None:
        self._make, self._in_force = make, in_force
        self._done = threading.Event()
        self.proposal: Proposal | None = None
        self.error: Exception | None = None
        if background:
            threading.Thread(target=self._run, name="eplb-plan").start()
        else:
            self._run()

    def vote(self) -> Vote:
        """What this rank has to say about it by now."""
        if not self._done.is_set():
            return Vote(ready=False)
        if self.proposal is None:
            return Vote(good=False)
        # Ranks that differ in what is or in what is to be must not move together.
        slots = (self._in_force.phy2log, self.proposal.plan.phy2log)
        return Vote(worth=self.proposal.worth, digest=digest(*(part.tobytes() for part in slots)))

    def _run(self) -> None:
        try:
            self.proposal = self._make()
        except Exception as error:  # whatever it is, the placement in force stays
            self.error = error
        finally:
            self._done.set()
