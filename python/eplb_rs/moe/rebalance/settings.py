"""How a loop is set: how often it looks, what it takes for worth a move, and how it moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from eplb_rs._inputs import as_count, as_number, wrong_type
from eplb_rs.errors import InvalidInputError
from eplb_rs.forecast import Forecaster
from eplb_rs.scenarios import Outlook

__all__ = ["MoveCost", "RebalancerSettings"]

PlanOn: TypeAlias = Literal["all", "rank 0"]
Mode: TypeAlias = Literal["step", "layer", "synchronous"]
Routing: TypeAlias = Literal["uniform", "nearest", "shares"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveCost:
    """What tokens and moves take, for :meth:`eplb_rs.Planner.worth_it`.

    Attributes:
        us_per_token: What a rank of mean speed takes for a token of an expert, in microseconds.
        intra_node_gb_s: What a rank sends to another of its node, in 1e9 bytes a second.
        inter_node_gb_s: What it sends to one of another node.
        latency_us: What each round of transfers takes besides, in microseconds.
        hidden: Which part of the time of the transfers hides behind computation, 0 to 1.
        horizon_passes: For how many passes a plan is expected to serve; by default until the next
            is due.

    Raises:
        InvalidInputError: ``wrong_type`` or ``out_of_range`` for a number; ``not_integer`` or
            ``not_positive`` for the horizon.
    """

    us_per_token: float
    intra_node_gb_s: float
    inter_node_gb_s: float
    latency_us: float = 0.0
    hidden: float = 0.0
    horizon_passes: int | None = None

    def __post_init__(self) -> None:
        for name in ("us_per_token", "intra_node_gb_s", "inter_node_gb_s"):
            as_number(getattr(self, name), name, above=True)
        as_number(self.latency_us, "latency_us")
        if as_number(self.hidden, "hidden") > 1:
            raise InvalidInputError(
                code="out_of_range", argument="hidden", got=repr(self.hidden), expected="at most 1"
            )
        if self.horizon_passes is not None:
            as_count(self.horizon_passes, "horizon_passes")


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalancerSettings:
    """How a :class:`~eplb_rs.moe.Rebalancer` goes about it; the same on all ranks.

    Attributes:
        window_passes: How many forward passes make a window, whose load is added up over the ranks.
        interval_passes: After how many passes a new plan is considered; whole windows.
        replan_on_shift: Whether one is also considered as soon as the domain of the load shifts.
        estimator: What the next window is taken to be; see :mod:`eplb_rs.forecast`.
        outlook: Plans for scenarios made of the windows (:meth:`eplb_rs.Planner.plan_windows`)
            instead of the estimate alone.
        routing: How tokens are split over replicas. ``"shares"`` splits them anew after each
            window, for the load that is estimated then, without a move.
        max_moves: How many experts may arrive on a rank that did not hold them in one replan, over
            all layers; by default as many as help.
        min_gain: A plan is worth its moves if it is predicted to raise the balance by at least
            this.
        cost: If given, a plan must also gain more time than its moves take. Without ``max_moves``
            and an outlook, as many moves are made as gain most.
        plan_on: ``"all"`` plans on every rank: the same bytes on each. ``"rank 0"`` plans there and
            broadcasts the placement.
        background: Whether planning runs in a thread while passes go on; the plan is adopted at the
            first pass before which it was ready on all ranks. Otherwise the pass waits for it.
        mode: ``"step"`` moves layer by layer while passes go on; ``"layer"`` one layer between two
            passes, which waits for it; ``"synchronous"`` all at once. In training one of the latter
            two: weights must not change on their way.
        max_bytes_in_flight: As for :class:`~eplb_rs.moe.ExpertMover`.
        max_extra_bytes: As for :class:`~eplb_rs.moe.ExpertMover`.
        checksums: As for :class:`~eplb_rs.moe.ExpertMover`.
        limit_s: How long any wait for another rank may take, in seconds.
        grace_s: As for :class:`~eplb_rs.moe.ExpertMover`.

    Raises:
        InvalidInputError: ``not_integer``, ``not_positive`` or ``negative`` for a count,
            ``not_multiple`` for an interval that is not whole windows, ``unknown`` for a name,
            ``out_of_range`` or ``wrong_type`` for a number or an object.
    """

    window_passes: int = 1000
    interval_passes: int = 3000
    replan_on_shift: bool = True
    estimator: str = "backtest"
    outlook: Outlook | None = None
    routing: Routing = "uniform"
    max_moves: int | None = None
    min_gain: float = 0.01
    cost: MoveCost | None = None
    plan_on: PlanOn = "all"
    background: bool = True
    mode: Mode = "step"
    max_bytes_in_flight: int = 1 << 28
    max_extra_bytes: int | None = None
    checksums: bool = False
    limit_s: float = 300.0
    grace_s: float = 5.0

    def __post_init__(self) -> None:
        window = as_count(self.window_passes, "window_passes", least=_SHORTEST_WINDOW)
        interval = as_count(self.interval_passes, "interval_passes")
        if interval % window:
            nearest = sorted(
                {max(interval // window, 1) * window, (interval // window + 1) * window}
            )
            raise InvalidInputError(
                code="not_multiple",
                argument="interval_passes",
                got=str(interval),
                expected=f"a multiple of `window_passes` ({window})",
                hint=f"nearest: {', '.join(map(str, nearest))}",
            )
        Forecaster(num_layers=1, num_experts=1, estimator=self.estimator)  # refuses other names
        _check_kind(self.outlook, "outlook", Outlook)
        _check_kind(self.cost, "cost", MoveCost)
        _check_name(self.routing, "routing", Routing)
        _check_name(self.plan_on, "plan_on", PlanOn)
        _check_name(self.mode, "mode", Mode)
        if self.max_moves is not None:
            as_count(self.max_moves, "max_moves", least=0)
        as_number(self.min_gain, "min_gain")
        as_count(self.max_bytes_in_flight, "max_bytes_in_flight")
        if self.max_extra_bytes is not None:
            as_count(self.max_extra_bytes, "max_extra_bytes")
        as_number(self.limit_s, "limit_s", above=True)
        as_number(self.grace_s, "grace_s", above=True)

    @property
    def horizon_windows(self) -> float:
        """For how many windows a plan is expected to serve."""
        passes = self.cost.horizon_passes if self.cost is not None else None
        return (passes or self.interval_passes) / self.window_passes


_SHORTEST_WINDOW = 4
"""Passes: a window's load takes two to be known, and must be before the next one ends."""


def _check_kind(value: object, argument: str, kind: type) -> None:
    if value is not None and not isinstance(value, kind):
        raise wrong_type(argument, value, f"{kind.__name__} or None")


def _check_name(value: object, argument: str, names: Any) -> None:
    if value not in get_args(names):
        raise InvalidInputError(
            code="unknown",
            argument=argument,
            got=repr(value),
            expected=" or ".join(map(repr, get_args(names))),
        )
