"""What came of a replay.

Letters: T windows replayed, W windows scored, S plans made, L layers, E logical experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from eplb_rs import _core
    from eplb_rs.simulate.links import Links

__all__ = ["Flags", "Floats", "Outcome", "PlanSteps", "Simulation", "ratio"]

Floats: TypeAlias = npt.NDArray[np.float64]
Flags: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlanSteps:
    """The plans that a policy made, one after the other.

    The first is taken to be loaded with the model: what it moves is not counted.

    Attributes:
        windows: `[S]` int64, the first window that each plan served, as a number of the replay.
        moves: `[S]` int64, experts that arrived on a rank that did not hold them, over all
            layers. 0 for the first.
        plan_us: `[S]` float64, planning in native code, in microseconds.
        transfer_s: `[S]` float64, how long its moves take, in seconds; ``None`` where the links
            or their speeds are not known.
    """

    windows: npt.NDArray[np.int64]
    moves: npt.NDArray[np.int64]
    plan_us: Floats
    transfer_s: Floats | None

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def moves_per_step(self) -> float:
        """Mean moves of the plans after the first; 0 if there are none."""
        return float(self.moves[1:].mean()) if len(self) > 1 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """What one policy, with one way of splitting tokens over replicas, made of the trace.

    Attributes:
        policy: ``"trivial"``, ``"deepseek"``, ``"balanced"``, ``"scenarios"`` or ``"oracle"``.
        shares: How each expert's tokens are split over its replicas: ``"uniform"``, ``"past"`` or
            ``"arriving"``.
        largest: `[W]` float64, the largest rank loads of each window, summed over layers.
        mean: `[W]` float64, the mean rank loads of each window, summed over layers.
        layer_balance: `[L]` float64, the balance of each layer over all windows.
        split_us: `[W]` float64, splitting the window's load over the replicas, in microseconds;
            ``None`` where that is not done for each window.
        steps: The plans; empty for the trivial policy and the oracle.
    """

    policy: str
    shares: str
    largest: Floats
    mean: Floats
    layer_balance: Floats
    split_us: Floats | None
    steps: PlanSteps

    @property
    def balance(self) -> Floats:
        """`[W]` float64, the balance of each window; 1 for one without load."""
        balance: Floats = ratio(self.mean, self.largest)
        return balance

    @property
    def mean_balance(self) -> float:
        """The mean of :attr:`balance` over the windows."""
        return float(self.balance.mean())

    @property
    def total_balance(self) -> float:
        """The balance over all windows at once: mean over largest rank loads, both summed over
        windows and layers. Windows that were missed weigh more than in the mean."""
        return float(ratio(self.mean.sum(), self.largest.sum()))

    def balance_of(self, windows: Flags) -> float | None:
        """The mean balance of some windows, `[W]`; ``None`` if there are none."""
        return float(self.balance[windows].mean()) if windows.any() else None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Simulation:
    """A trace replayed.

    Attributes:
        outcomes: One for each policy and each way of splitting, in the order asked for.
        topology: The machines.
        num_layers: L.
        num_experts: E.
        num_groups: In how many groups the experts are.
        interval: After how many windows a new plan is made.
        estimator: How the load to come was estimated.
        max_moves: The most moves of a plan after the first, over all layers; ``None`` for as many
            as help.
        merge: How many windows of the trace make one of the replay.
        num_windows: T.
        labels: `[W]`, what the trace calls each scored window; ``None`` where it names none.
        distance: `[W]` float64, how far each scored window was from the mean of those since the
            last shift: see :class:`eplb_rs.forecast.Forecaster`.
        shifted: `[W]` bool, whether the domain shifted with the window.
        stale: `[W]` bool, whether the plan in force was made before the last shift: the windows
            right after one.
        links: What moving weights costs, if known.
        estimate_us: `[S]` float64, making the estimate, in microseconds, for each plan.
    """

    outcomes: tuple[Outcome, ...]
    topology: _core.Topology
    num_layers: int
    num_experts: int
    num_groups: int
    interval: int
    estimator: str
    max_moves: int | None
    merge: int
    num_windows: int
    labels: tuple[str, ...] | None
    distance: Floats
    shifted: Flags
    stale: Flags
    links: Links | None
    estimate_us: Floats

    def __repr__(self) -> str:
        names = ", ".join(f"{one.policy}/{one.shares}" for one in self.outcomes)
        return f"<Simulation of {len(self.distance)} windows: {names}>"


def ratio(mean: Any, largest: Any) -> Any:
    """Mean over largest rank load; 1 where there is none."""
    mean, largest = np.asarray(mean, dtype=np.float64), np.asarray(largest, dtype=np.float64)
    return np.divide(mean, largest, out=np.ones_like(mean), where=largest > 0)
