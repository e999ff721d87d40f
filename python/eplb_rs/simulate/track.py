"""One policy on its way through a trace.

Letters: L layers.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from eplb_rs.scenarios import Outlook
from eplb_rs.simulate.outcome import Outcome, PlanSteps, ratio

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from eplb_rs._inputs import Load
    from eplb_rs.plan import Plan
    from eplb_rs.planner import Planner, Split
    from eplb_rs.simulate.links import Links
    from eplb_rs.simulate.outcome import Floats

__all__ = ["Track"]


class Track:
    """One policy on its way through the trace, under each way of splitting."""

    def __init__(
        self,
        policy: str,
        planner: Planner,
        shares: list[str],
        max_moves: int | None,
        links: Links | None,
    ) -> None:
        self.policy = policy
        self.planner = planner
        self._max_moves = max_moves
        self._links = None if links is None or links.inter_node_gb_s is None else links._asdict()
        self._plan: Plan | None = None
        self._fixed: Any = None
        self._scores = {name: _Score() for name in shares}
        self._steps: list[tuple[int, int, float, float]] = []

    def meet(self, window: Load) -> None:
        """Scores the plan in force on the window that has come."""
        if self.policy == "oracle":
            self._plan = self.planner.plan(window)
            self._fixed = None
        assert self._plan is not None
        plan = self._plan
        for name, score in self._scores.items():
            if name == "uniform":
                largest = plan.with_load(window).rank_time.max(axis=1)
            elif name == "past" and self.policy != "oracle":
                if self._fixed is None:
                    self._fixed = plan.with_shares()
                largest = self._fixed.applied_to(window).rank_time.max(axis=1)
            else:
                by_slot = np.empty((plan.num_layers, plan.topology.num_slots))
                largest = np.empty(plan.num_layers)
                splitter = plan._splitter
                started = time.perf_counter()
                splitter.split_into(window, by_slot, largest)
                score.split_us.append(1e6 * (time.perf_counter() - started))
            topology = plan.topology
            mean = window.sum(axis=1, dtype=np.float64)
            mean /= topology.num_gpus - len(topology.dead)
            score.add(np.minimum(mean, largest), largest)

    def replan(self, window: int, estimate: Load, recent: Sequence[Load]) -> None:
        """Plans for an estimate, or for the windows since the last shift; the plan serves from this
        window on."""
        if self.policy == "oracle" or (self.policy == "trivial" and self._plan is not None):
            return
        before = self._plan
        plan_us = None
        if self.policy == "scenarios" and recent:
            started = time.perf_counter()
            plan = self._for_scenarios(np.stack(recent), before)
            plan_us = 1e6 * (time.perf_counter() - started)
        elif self.policy in ("balanced", "scenarios") and before is not None:
            plan = self.planner.plan(estimate, previous=before, max_moves=self._max_moves)
        else:
            plan = self.planner.plan(estimate)
        self._plan, self._fixed = plan, None
        if self.policy == "trivial":
            return
        if plan_us is None:
            plan_us = self.planner.last_timing.native_us
        moves, seconds = 0, 0.0
        if before is not None:
            transfers = plan.transfers(before)
            moves = int((transfers.source != transfers.target).sum())
            if self._links is not None:
                seconds = transfers.predicted_s(**self._links)
        self._steps.append((window, moves, plan_us, seconds))

    def _for_scenarios(self, windows: npt.NDArray[np.float32], before: Plan | None) -> Plan:
        split: Split = "shares" if "arriving" in self._scores else "uniform"
        # The windows given are those since the last shift already.
        outlook = replace(Outlook.for_split(split), shift_threshold=None)
        return self.planner.plan_windows(
            windows,
            previous=before,
            max_moves=None if before is None else self._max_moves,
            split=split,
            outlook=outlook,
        )

    def outcomes(self) -> Iterator[Outcome]:
        """What came of it, for each way of splitting."""
        columns = list(zip(*self._steps, strict=True)) or [()] * 4
        steps = PlanSteps(
            windows=np.array(columns[0], dtype=np.int64),
            moves=np.array(columns[1], dtype=np.int64),
            plan_us=np.array(columns[2], dtype=np.float64),
            transfer_s=None if self._links is None else np.array(columns[3], dtype=np.float64),
        )
        for name, score in self._scores.items():
            yield Outcome(
                policy=self.policy,
                shares=name,
                largest=np.array(score.largest),
                mean=np.array(score.mean),
                layer_balance=ratio(score.layer_mean, score.layer_largest),
                split_us=np.array(score.split_us) if score.split_us else None,
                steps=steps,
            )


class _Score:
    """Rank loads of the windows so far."""

    def __init__(self) -> None:
        self.largest: list[float] = []
        self.mean: list[float] = []
        self.layer_largest: Any = 0.0
        self.layer_mean: Any = 0.0
        self.split_us: list[float] = []

    def add(self, mean: Floats, largest: Floats) -> None:
        self.largest.append(float(largest.sum()))
        self.mean.append(float(mean.sum()))
        self.layer_largest = self.layer_largest + largest
        self.layer_mean = self.layer_mean + mean
