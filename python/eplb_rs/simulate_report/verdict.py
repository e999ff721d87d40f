"""Which outcome of a replay to choose, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from eplb_rs._words import duration, quantity
from eplb_rs.simulate_report.words import balance_text, bytes_text, every, outcome_name

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from eplb_rs.simulate import Outcome, Simulation

__all__ = ["Verdict", "mean_after_first", "verdict_on", "window_seconds"]

_AS_GOOD = 0.005
"""Balances that are no farther apart count as equal: then the one with fewer moves is better."""

_SIMPLER = ("uniform", "past", "arriving")


class Verdict(NamedTuple):
    """Which of the outcomes to choose, and why."""

    outcome: Outcome
    """The one that is recommended."""
    baseline: Outcome
    """What it is compared with: the trivial policy, or else the first."""
    headline: str
    """What to do, in a sentence."""
    reasons: tuple[str, ...]
    """Why, in sentences."""


def verdict_on(simulation: Simulation, window_s: float | None) -> Verdict:
    """Which outcome to choose, where expert layers take so long for a window now, if known."""
    able = [one for one in simulation.outcomes if one.policy != "oracle"]
    able = able or list(simulation.outcomes)
    baseline = next((one for one in able if one.policy == "trivial"), able[0])
    if window_s is None:
        best = max(one.mean_balance for one in able)
        good = [one for one in able if one.mean_balance >= best - _AS_GOOD]
    else:
        seconds = [window_seconds(simulation, window_s, one, baseline) or 0.0 for one in able]
        most = min(seconds) * (1 + _AS_GOOD)
        good = [one for one, taken in zip(able, seconds, strict=True) if taken <= most]
    chosen = min(good, key=lambda one: (one.steps.moves_per_step, _SIMPLER.index(one.shares)))
    return Verdict(
        chosen,
        baseline,
        _headline(simulation, chosen),
        _reasons(simulation, window_s, chosen, baseline),
    )


def window_seconds(
    simulation: Simulation, window_s: float | None, outcome: Outcome, baseline: Outcome
) -> float | None:
    """How long a window takes, its part of a plan's moves included."""
    moves_s = mean_after_first(outcome.steps.transfer_s)
    if window_s is None or outcome.policy == "oracle" or moves_s is None:
        return None
    computed = window_s * baseline.mean_balance / outcome.mean_balance
    return computed + moves_s / simulation.interval


def _headline(simulation: Simulation, chosen: Outcome) -> str:
    split = {
        "uniform": "",
        "past": ", and split tokens over replicas as suits the estimate",
        "arriving": ", and split tokens over replicas as they arrive",
    }[chosen.shares]
    if chosen.policy == "trivial":
        return f"Leave the experts where they are{split}."
    return f"Use {chosen.policy}: plan anew {every(simulation.interval)}{split}."


def _reasons(
    simulation: Simulation, window_s: float | None, chosen: Outcome, baseline: Outcome
) -> tuple[str, ...]:
    reasons = []
    if chosen is not baseline:
        saved = 1.0 - baseline.mean_balance / chosen.mean_balance
        reasons.append(
            f"Balance in the next window: {balance_text(chosen.mean_balance)}, against "
            f"{balance_text(baseline.mean_balance)} {_of(baseline)}. The expert layers take "
            f"{100 * saved:.0f} % less time."
        )
    else:
        reasons.append(
            f"Balance in the next window: {balance_text(chosen.mean_balance)}. Nothing that was "
            + (
                "tried does better by more than 0.005."
                if window_s is None
                else "tried takes less time, moves included."
            )
        )
    if chosen.steps.moves_per_step > 0:
        moved = f"Each plan moves {_moved(simulation, chosen)}"
        seconds = mean_after_first(chosen.steps.transfer_s)
        saved = 1.0 - baseline.mean_balance / chosen.mean_balance
        if seconds is not None and saved > 0:
            pays = seconds / saved / simulation.interval
            moved += (
                f", which takes {duration(1e6 * seconds)}: worth it where the expert layers "
                f"now take more than {duration(1e6 * pays)} a window"
            )
        reasons.append(f"{moved}.")
    taken = window_seconds(simulation, window_s, chosen, baseline)
    if taken is not None and window_s is not None and chosen is not baseline:
        reasons.append(
            f"A window takes {duration(1e6 * taken)}, moves included, where it now takes "
            f"{duration(1e6 * window_s)}."
        )
    cheaper = _cheaper(simulation, chosen, baseline)
    if cheaper is not None:
        reasons.append(
            f"Cheaper: {outcome_name(cheaper)} reaches {balance_text(cheaper.mean_balance)} and changes "
            f"{_changed(simulation, cheaper):.1f} % of all slots."
        )
    plain = _best_with(simulation, chosen.policy, "uniform")
    if chosen.shares != "uniform" and plain is not None:
        reasons.append(
            f"With an engine that can only split evenly: {balance_text(plain.mean_balance)}."
        )
    after = chosen.balance_of(simulation.stale)
    if after is not None and len(chosen.steps):
        num = int(simulation.shifted.sum())
        reasons.append(
            f"The domain shifted {num} time{'s' * (num > 1)}; until the next plan the balance "
            f"is then {balance_text(after)}."
        )
    oracle = _best_with(simulation, "oracle", chosen.shares) or _best_with(
        simulation, "oracle", "uniform"
    )
    if oracle is not None and chosen.policy != "oracle":
        reasons.append(
            f"Had each window been known before it came: {balance_text(oracle.mean_balance)}."
        )
    return tuple(reasons)


def _of(baseline: Outcome) -> str:
    if (baseline.policy, baseline.shares) == ("trivial", "uniform"):
        return "for the placement that engines start with"
    return f"for {outcome_name(baseline)}"


def _cheaper(simulation: Simulation, chosen: Outcome, baseline: Outcome) -> Outcome | None:
    """The best of those that reach half the gain with at most half the moves, if there are
    moves to save."""
    enough = (chosen.mean_balance + baseline.mean_balance) / 2
    most = chosen.steps.moves_per_step / 2
    found = [
        one
        for one in simulation.outcomes
        if one.policy != "oracle"
        and one.steps.moves_per_step <= most
        and enough <= one.mean_balance < chosen.mean_balance
    ]
    return max(found, key=lambda one: one.mean_balance, default=None) if most else None


def _best_with(simulation: Simulation, policy: str, shares: str) -> Outcome | None:
    outcomes = simulation.outcomes
    return next((one for one in outcomes if (one.policy, one.shares) == (policy, shares)), None)


def _moved(simulation: Simulation, outcome: Outcome) -> str:
    """What a plan moves, in words."""
    text = f"{quantity(round(outcome.steps.moves_per_step))} experts"
    text += f" ({_changed(simulation, outcome):.1f} % of all slots)"
    links = simulation.links
    if links is not None:
        text += f", {bytes_text(links.expert_bytes * outcome.steps.moves_per_step)}"
    return text


def _changed(simulation: Simulation, outcome: Outcome) -> float:
    """Which part of all slots a plan changes, in per cent."""
    num_slots = simulation.num_layers * simulation.topology.num_slots
    return 100 * outcome.steps.moves_per_step / num_slots


def mean_after_first(values: npt.NDArray[np.float64] | None) -> float | None:
    """The mean of what plans after the first have; 0 if there are none."""
    if values is None:
        return None
    return float(values[1:].mean()) if len(values) > 1 else 0.0
