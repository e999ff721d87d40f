"""A trace replayed: each window met by the plans that were made before it came.

Letters: T windows replayed, L layers, E logical experts.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np

from eplb_rs._inputs import as_count
from eplb_rs.errors import InvalidInputError
from eplb_rs.forecast import SHIFT_THRESHOLD, Forecaster
from eplb_rs.planner import Planner
from eplb_rs.scenarios import Outlook
from eplb_rs.simulate.links import check_links
from eplb_rs.simulate.outcome import Simulation
from eplb_rs.simulate.track import Track
from eplb_rs.simulate.windows import Windows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from eplb_rs import _core
    from eplb_rs._inputs import Load
    from eplb_rs.loads import LoadTrace
    from eplb_rs.planner import GroupRule
    from eplb_rs.simulate.links import Links

__all__ = ["simulate"]

SimulatedPolicy: TypeAlias = Literal["trivial", "deepseek", "balanced", "scenarios", "oracle"]
SplitName: TypeAlias = Literal["uniform", "past", "arriving"]


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
            ``empty`` for policies and shares; ``wrong_type``, ``out_of_range`` or
            ``inconsistent`` for the links; ``wrong_type``, ``wrong_shape``, ``empty`` and what
            :meth:`eplb_rs.Planner.plan` says of a load, for the trace; for the others as
            :class:`eplb_rs.Planner` and :class:`eplb_rs.forecast.Forecaster`.

    Cost: 58 layers of 256 experts on 288 slots take about 20 ms a window for the default policies,
    most of it for planning. Memory for the trace and a few plans.
    """
    windows = Windows(trace, as_count(merge, "merge"))
    planned = _names(policies, "policies", get_args(SimulatedPolicy))
    splits = _names(shares, "shares", get_args(SplitName))
    interval = as_count(interval, "interval")
    check_links(links)
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
            tracks.append(Track(policy, planner(policy), names, limit, links))
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
