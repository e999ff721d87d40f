"""What if: a recorded trace replayed, and what each way of planning would have made of it.

Each window is met by a plan that was made before it came. It is then scored: the *balance* of a
window is the sum over layers of the mean rank load, divided by the sum over layers of the largest;
1 is perfect, and expert layers take 1 / balance of the time they would take then.

>>> import eplb_rs
>>> from eplb_rs.simulate import simulate
>>> trace = [[[10, 10, 60, 20]], [[10, 10, 50, 30]], [[20, 10, 60, 10]]]
>>> topology = eplb_rs.Topology(num_nodes=1, gpus_per_node=2, slots_per_gpu=3)
>>> result = simulate(trace, topology, policies=["trivial", "balanced"], estimator="last")
>>> for outcome in result.outcomes:
...     print(outcome.policy, outcome.shares, outcome.balance.round(2))
trivial uniform [0.83 0.67]
trivial arriving [1.   0.83]
balanced uniform [1.   0.91]
balanced arriving [1. 1.]

Letters: T windows replayed, W windows scored, S plans made, L layers, E logical experts.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from eplb_rs._inputs import as_count, as_load
from eplb_rs.errors import InvalidInputError
from eplb_rs.forecast import SHIFT_THRESHOLD, Forecaster
from eplb_rs.loads import LoadTrace
from eplb_rs.planner import Planner
from eplb_rs.scenarios import Outlook

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from eplb_rs import _core
    from eplb_rs._inputs import Load
    from eplb_rs.plan import Plan
    from eplb_rs.planner import GroupRule

__all__ = ["Links", "Outcome", "PlanSteps", "Simulation", "simulate"]

SimulatedPolicy: TypeAlias = Literal["trivial", "deepseek", "balanced", "scenarios", "oracle"]
SplitName: TypeAlias = Literal["uniform", "past", "arriving"]

_Floats: TypeAlias = npt.NDArray[np.float64]
_Flags: TypeAlias = npt.NDArray[np.bool_]


class Links(NamedTuple):
    """What moving weights costs."""

    expert_bytes: float
    """The bytes of one expert of one layer."""
    intra_node_gb_s: float | None = None
    """What a rank sends to another of its node, in 1e9 bytes a second; ``None`` if not known."""
    inter_node_gb_s: float | None = None
    """What it sends to one of another node."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlanSteps:
    """The plans that a policy made, one after the other.

    The first is taken to be loaded with the model: what it moves is not counted.

    Attributes:
        windows: `[S]` int64, the first window that each plan served, as a number of the replay.
        moves: `[S]` int64, slots that got their expert from another rank, over all layers. 0 for
            the first.
        plan_us: `[S]` float64, planning in native code, in microseconds.
        transfer_s: `[S]` float64, how long its moves take, in seconds; ``None`` where the links
            or their speeds are not known.
    """

    windows: npt.NDArray[np.int64]
    moves: npt.NDArray[np.int64]
    plan_us: _Floats
    transfer_s: _Floats | None

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
    largest: _Floats
    mean: _Floats
    layer_balance: _Floats
    split_us: _Floats | None
    steps: PlanSteps

    @property
    def balance(self) -> _Floats:
        """`[W]` float64, the balance of each window; 1 for one without load."""
        balance: _Floats = _ratio(self.mean, self.largest)
        return balance

    @property
    def mean_balance(self) -> float:
        """The mean of :attr:`balance` over the windows."""
        return float(self.balance.mean())

    @property
    def total_balance(self) -> float:
        """The balance over all windows at once: mean over largest rank loads, both summed over
        windows and layers. Windows that were missed weigh more than in the mean."""
        return float(_ratio(self.mean.sum(), self.largest.sum()))

    def balance_of(self, windows: _Flags) -> float | None:
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
    distance: _Floats
    shifted: _Flags
    stale: _Flags
    links: Links | None
    estimate_us: _Floats

    def __repr__(self) -> str:
        names = ", ".join(f"{one.policy}/{one.shares}" for one in self.outcomes)
        return f"<Simulation of {len(self.distance)} windows: {names}>"


def simulate(
    trace: LoadTrace | npt.ArrayLike,
    topology: _core.Topology,
    *,
    policies: Sequence[SimulatedPolicy] = ("trivial", "deepseek", "balanced", "oracle"),
    shares: Sequence[SplitName] = ("uniform", "arriving"),
    estimator: str = "backtest",
    shift_threshold: float | None = SHIFT_THRESHOLD,
    interval: int = 1,
    merge: int = 1,
    num_groups: int = 1,
    group_rule: GroupRule = "strict",
    max_moves: int | None = None,
    iterations: int | None = None,
    threads: int = 1,
    links: Links | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Simulation:
    """Replays a trace: each window after the first is met by a plan made from those before it.

    Args:
        trace: `[T, L, E]`, tokens per window, layer and expert, oldest first.
        topology: The machines.
        policies: ``"trivial"``, what engines start from, and never a move; ``"deepseek"``, the
            reference algorithm, which does not look at the placement in force; ``"balanced"``,
            planned from the placement in force; ``"scenarios"``, planned from the placement in force
            for all windows since the last shift at once (:meth:`eplb_rs.Planner.plan_windows`), with
            the way of splitting in mind: often the best, and by far the slowest, so it has to be
            asked for; ``"oracle"``, planned anew on each window itself:
            what no one can do, for comparison. The oracle is heuristic too.
        shares: How an expert's tokens are split over its replicas: ``"uniform"``, evenly, as engines
            do; ``"past"``, as suits the estimate that the plan was made for; ``"arriving"``, as
            suits the window itself best, without moving a weight.
        estimator: What the plans are made for: see :mod:`eplb_rs.forecast`.
        shift_threshold: See :class:`eplb_rs.forecast.Forecaster`.
        interval: After how many windows a new plan is made; the first comes after one.
        merge: How many windows of the trace are summed to make one of the replay; those left over
            at its end are dropped.
        num_groups: In how many groups the model's experts are.
        group_rule: As for :class:`eplb_rs.Planner`.
        max_moves: The most moves of a ``"balanced"`` or ``"scenarios"`` plan after the first, over
            all layers.
        iterations: As for :class:`eplb_rs.Planner`.
        threads: As for :class:`eplb_rs.Planner`.
        links: What moving weights costs; without it moves are counted only, without speeds bytes
            too.
        progress: Called with the windows done and all there are, after each.

    Raises:
        InvalidInputError: ``too_small`` for a trace of fewer than two windows; ``unknown`` or
            ``empty`` for policies and shares; ``out_of_range`` or ``inconsistent`` for the links;
            ``wrong_type``, ``wrong_shape`` and what
            :meth:`eplb_rs.Planner.plan` says of a load, for the trace; for the others as
            :class:`eplb_rs.Planner` and :class:`eplb_rs.forecast.Forecaster`.

    Cost: 58 layers of 256 experts on 288 slots take about 20 ms a window for the default policies,
    most of it for planning. Memory for the trace and a few plans.
    """
    windows = _Windows(trace, as_count(merge, "merge"))
    planned = _names(policies, "policies", get_args(SimulatedPolicy))
    splits = _names(shares, "shares", get_args(SplitName))
    interval = as_count(interval, "interval")
    _check_links(links)
    forecaster = Forecaster(
        num_layers=windows.shape[0],
        num_experts=windows.shape[1],
        estimator=estimator,
        shift_threshold=shift_threshold,
    )

    def planner(policy: Any) -> Planner:
        return Planner(
            topology,
            num_groups,
            policy="balanced" if policy in ("scenarios", "oracle") else policy,
            threads=threads,
            group_rule=group_rule,
            iterations=iterations,
        )

    limit = None if max_moves is None else as_count(max_moves, "max_moves", least=0)
    tracks = []
    for policy in planned:
        # Scenarios make other plans for each way of splitting.
        for names in [[name] for name in splits] if policy == "scenarios" else [splits]:
            tracks.append(_Track(policy, planner(policy), names, limit, links))
    recent: deque[Load] = deque(maxlen=Outlook().most_windows)
    num_scored = len(windows) - 1
    distance, shifted = np.zeros(num_scored), np.zeros(num_scored, dtype=np.bool_)
    stale = np.zeros(num_scored, dtype=np.bool_)
    estimate_us: list[float] = []
    estimate = np.empty(windows.shape, dtype=np.float32)
    spent_us = 0.0
    for number, window in enumerate(windows):
        started = time.perf_counter()
        new_domain = _observed(forecaster, number, window)
        spent_us += 1e6 * (time.perf_counter() - started)
        if new_domain:
            recent.clear()
        if window.any():
            recent.append(window)
        if number:
            for track in tracks:
                track.meet(window)
            distance[number - 1] = forecaster.distance.mean()
            shifted[number - 1] = new_domain
            # Until the next plan, those in force know nothing of the new domain.
            planned_since = number > 1 and (number - 1) % interval == 0
            stale[number - 1] = new_domain or (stale[number - 2] and not planned_since)
        if number % interval == 0 and number < num_scored:
            started = time.perf_counter()
            if forecaster.num_windows:
                forecaster.estimate(estimate)
            else:
                estimate[:] = 0.0  # nothing but idle windows yet
            estimate_us.append(spent_us + 1e6 * (time.perf_counter() - started))
            spent_us = 0.0
            for track in tracks:
                track.replan(number + 1, estimate, recent)
        if progress is not None:
            progress(number + 1, len(windows))
    return Simulation(
        outcomes=tuple(outcome for track in tracks for outcome in track.outcomes()),
        topology=topology,
        num_layers=windows.shape[0],
        num_experts=windows.shape[1],
        num_groups=tracks[0].planner.num_groups,
        interval=interval,
        estimator=forecaster.estimator,
        max_moves=limit,
        merge=windows.merge,
        num_windows=len(windows),
        labels=windows.labels,
        distance=distance,
        shifted=shifted,
        stale=stale,
        links=links,
        estimate_us=np.array(estimate_us),
    )


def _observed(forecaster: Forecaster, number: int, window: Load) -> bool:
    """Whether the domain shifted with a window; refuses one that is no load."""
    try:
        return forecaster.observe(window)
    except InvalidInputError as error:
        raise InvalidInputError(
            code=error.code,
            argument="trace",
            got=f"window {number}: {error.got}",
            expected=error.expected,
            hint=error.hint,
        ) from None


class _Windows:
    """The windows of a trace as they are replayed: merged, float32, one at a time."""

    def __init__(self, trace: LoadTrace | npt.ArrayLike, merge: int) -> None:
        labels = trace.labels if isinstance(trace, LoadTrace) else None
        loads = trace.loads if isinstance(trace, LoadTrace) else _as_array(trace)
        if loads.ndim != 3:
            raise InvalidInputError(
                code="wrong_shape",
                argument="trace",
                got=f"{loads.ndim} dimensions, shape {loads.shape}",
                expected="of 3 dimensions, [windows, layers, experts]",
            )
        if len(loads) // merge < 2:
            merged = f", of which {merge} make one" if merge > 1 else ""
            raise InvalidInputError(
                code="too_small",
                argument="trace",
                got=f"{len(loads)} windows{merged}",
                expected="at least 2: one to plan from, one to meet",
                hint="a recording in windows, or fewer merged into one",
            )
        self.merge = merge
        self.shape: tuple[int, int] = loads.shape[1:]
        self._loads = loads
        self.labels = None
        if labels is not None:
            starts = range(merge, len(self) * merge, merge)
            self.labels = tuple(_joined(labels[start : start + merge]) for start in starts)

    def __len__(self) -> int:
        return len(self._loads) // self.merge

    def __iter__(self) -> Iterator[Load]:
        for start in range(0, len(self) * self.merge, self.merge):
            window = self._loads[start]
            if self.merge > 1:
                window = self._loads[start : start + self.merge].sum(axis=0, dtype=np.float64)
            yield as_load(window, "trace")


class _Track:
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
        split = "shares" if "arriving" in self._scores else "uniform"
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
                layer_balance=_ratio(score.layer_mean, score.layer_largest),
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

    def add(self, mean: _Floats, largest: _Floats) -> None:
        self.largest.append(float(largest.sum()))
        self.mean.append(float(mean.sum()))
        self.layer_largest = self.layer_largest + largest
        self.layer_mean = self.layer_mean + mean


def _ratio(mean: Any, largest: Any) -> Any:
    """Mean over largest rank load; 1 where there is none."""
    mean, largest = np.asarray(mean, dtype=np.float64), np.asarray(largest, dtype=np.float64)
    return np.divide(mean, largest, out=np.ones_like(mean), where=largest > 0)


def _as_array(trace: Any) -> npt.NDArray[Any]:
    try:
        return np.asarray(trace)
    except Exception as error:  # whatever an object's own conversion raises
        raise InvalidInputError(
            code="wrong_type",
            argument="trace",
            got=type(trace).__name__,
            expected="an array [windows, layers, experts], or what read_loads returns",
        ) from error


def _joined(labels: Sequence[str]) -> str:
    return "/".join(dict.fromkeys(labels))


def _names(given: Sequence[str], argument: str, known: tuple[str, ...]) -> list[str]:
    """Names that are known, each once, in the order given."""
    if isinstance(given, str):
        given = [given]
    try:
        names = list(dict.fromkeys(given))
    except TypeError:
        names = [repr(given)[:100]]
    for name in names:
        if name not in known:
            raise InvalidInputError(
                code="unknown", argument=argument, got=repr(name), expected=" or ".join(known)
            )
    if not names:
        raise InvalidInputError(
            code="empty", argument=argument, got="none", expected="at least one"
        )
    return names


def _check_links(links: Links | None) -> None:
    if links is None:
        return
    # The speed between nodes first: it may stand for both.
    for name in ("expert_bytes", "inter_node_gb_s", "intra_node_gb_s"):
        value = getattr(links, name)
        if value is None and name != "expert_bytes":
            continue
        if not isinstance(value, int | float | np.number) or not 0 < value < float("inf"):
            raise InvalidInputError(
                code="out_of_range", argument=name, got=repr(value), expected="finite and above 0"
            )
    if (links.intra_node_gb_s is None) != (links.inter_node_gb_s is None):
        missing = "intra" if links.intra_node_gb_s is None else "inter"
        raise InvalidInputError(
            code="inconsistent",
            argument=f"{missing}_node_gb_s",
            got="None",
            expected="given where the other speed is",
        )
