"""Pictures of a replayed trace: what it costs to be in balance, and how that goes over time.

Drawn with Matplotlib, as those of :mod:`eplb_rs.draw`. Each picture comes wide, for screens, and
narrow, for phones.

Letters: W windows scored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from eplb_rs.draw.look import LIGHT, Palette, calm
from eplb_rs.simulate_report.words import outcome_name

if TYPE_CHECKING:
    from collections.abc import Iterable

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from eplb_rs.simulate import Outcome
    from eplb_rs.simulate_report import SimulationReport

__all__ = ["balance_figure", "choice_figure", "cost_figure"]

_COLOURS = {
    "trivial": ("#6b7280", "#a3adbd"),
    "deepseek": ("#c2571a", "#f0995a"),
    "balanced": ("#1f6fb2", "#6db3f2"),
    "scenarios": ("#8a3fa0", "#c78be0"),
    "oracle": ("#2e8b57", "#63c58f"),
}
"""Of each policy, on light and on dark ground."""

_LINES: dict[str, Any] = {"uniform": (0, (4, 2)), "past": (0, (1, 1.5)), "arriving": "solid"}
_MARKS = {"uniform": "o", "past": "^", "arriving": "D"}


def choice_figure(
    report: SimulationReport, palette: Palette = LIGHT, *, narrow: bool = False
) -> Figure:
    """Balance in the next window against the moves of a plan: a point for each outcome.

    The recommended one is circled.
    """
    fig, axis = _axis(palette, narrow, 3.6)
    chosen = report.verdict.outcome
    policies = list(dict.fromkeys(one.policy for one in report.simulation.outcomes))
    for one in report.simulation.outcomes:
        moved = 100 * one.steps.moves_per_step / report.num_slots
        colour = _colour(one.policy, palette)
        if one.policy == "oracle":
            axis.axhline(one.mean_balance, color=colour, linewidth=1, linestyle=_LINES[one.shares])
            continue
        axis.scatter(moved, one.mean_balance, 46, colour, marker=_MARKS[one.shares], zorder=3)
        if one is chosen:
            axis.scatter(
                moved,
                one.mean_balance,
                220,
                marker="o",
                facecolors="none",
                edgecolors=palette.text,
                linewidths=1.4,
                zorder=4,
            )
    axis.set_xlim(left=min(-1.0, -0.03 * axis.get_xlim()[1]))
    low, high = axis.get_ylim()
    axis.set_ylim(low - 0.04 * (high - low), min(high + 0.02 * (high - low), 1.02))
    axis.set_xlabel("slots changed by a plan, %", color=palette.quiet, fontsize=9)
    axis.set_ylabel("mean balance", color=palette.quiet, fontsize=9)
    shares = dict.fromkeys(one.shares for one in report.simulation.outcomes)
    entries = [_entry(name, _colour(name, palette), "s") for name in policies]
    entries += [_entry(name, palette.quiet, _MARKS[name]) for name in shares]
    _legend(fig, entries, palette, 3 if narrow else 9)
    return fig


def balance_figure(
    report: SimulationReport, palette: Palette = LIGHT, *, narrow: bool = False
) -> Figure:
    """The balance of each outcome, window by window, and where the domain shifted."""
    fig, axis = _axis(palette, narrow, 3.6)
    simulation = report.simulation
    windows = np.arange(1, len(simulation.distance) + 1)
    thin = len(windows) > 200
    for one in _told_apart(simulation.outcomes):
        recommended = one is report.verdict.outcome
        axis.plot(
            windows,
            one.balance,
            color=_colour(one.policy, palette),
            linestyle=_LINES[one.shares],
            linewidth=(1.0 if thin else 2.2) if recommended else (0.6 if thin else 1.3),
            zorder=4 if recommended else 3,
            label=outcome_name(one),
        )
    _shifts(axis, report, palette)
    axis.set_xlim(0.5, len(windows) + 0.5)
    axis.set_xlabel("window", color=palette.quiet, fontsize=9)
    axis.set_ylabel("balance", color=palette.quiet, fontsize=9)
    _legend(fig, axis.get_legend_handles_labels()[0], palette, 2 if narrow else 5)
    return fig


def cost_figure(
    report: SimulationReport, palette: Palette = LIGHT, *, narrow: bool = False
) -> Figure:
    """What each plan cost: the slots it changed, and how long planning took."""
    from matplotlib.ticker import NullLocator

    fig, above = _axis(palette, narrow, 4.6, rows=2)
    below = fig.axes[1]
    entries = []
    planned = list({id(one.steps): one for one in report.simulation.outcomes}.values())
    for one in planned:
        steps = one.steps
        if not len(steps):
            continue
        alone = sum(other.policy == one.policy for other in planned) == 1
        style: dict[str, Any] = {
            "color": _colour(one.policy, palette),
            "marker": "o" if alone else _MARKS[one.shares],
            "linestyle": "none",
            "markersize": 4.0 if len(steps) <= 200 else 2.0,
        }
        above.plot(steps.windows[1:], 100 * steps.moves[1:] / report.num_slots, **style)
        below.plot(steps.windows, 1e-3 * steps.plan_us, **style)
        name = one.policy if alone else outcome_name(one)
        entries.append(_entry(name, style["color"], style["marker"]))
    for axis in (above, below):
        _shifts(axis, report, palette, named=axis is above)
        axis.set_xlim(0.5, len(report.simulation.distance) + 0.5)
    above.set_ylim(bottom=-0.03 * above.get_ylim()[1])
    below.set_yscale("log")
    below.yaxis.set_major_formatter("{x:g}")
    below.yaxis.set_minor_locator(NullLocator())
    above.tick_params(labelbottom=False)
    below.set_xlabel("first window of the plan", color=palette.quiet, fontsize=9)
    above.set_ylabel("slots changed, %", color=palette.quiet, fontsize=9)
    below.set_ylabel("planned in, ms", color=palette.quiet, fontsize=9)
    if entries:
        _legend(fig, entries, palette, 2 if narrow else 5)
    return fig


def _axis(palette: Palette, narrow: bool, height: float, rows: int = 1) -> tuple[Figure, Axes]:
    """A figure with one axis over another, and the first of them."""
    from matplotlib.figure import Figure

    width = 4.6 if narrow else 10.0
    fig = Figure(figsize=(width, height), facecolor=palette.background)
    fig.subplots(rows, 1)
    fig.subplots_adjust(left=0.62 / width, right=1 - 0.12 / width, bottom=0.5 / height, hspace=0.12)
    for axis in fig.axes:
        axis.set_facecolor(palette.background)
        axis.grid(axis="y", color=palette.grid, linewidth=0.7)
        axis.set_axisbelow(True)
        calm(axis, palette)
    return fig, fig.axes[0]


def _shifts(axis: Axes, report: SimulationReport, palette: Palette, *, named: bool = True) -> None:
    """Lines where the domain shifted, with what the trace calls the new one."""
    simulation = report.simulation
    shifts = np.flatnonzero(simulation.shifted).tolist()
    for number in shifts:
        axis.axvline(number + 1, color=palette.quiet, linewidth=0.8, linestyle=(0, (2, 3)))
        if not named or simulation.labels is None or len(shifts) > 12:
            continue
        axis.annotate(
            _plain(simulation.labels[number]),
            (number + 1, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, 3),
            textcoords="offset points",
            color=palette.quiet,
            fontsize=8,
            parse_math=False,
        )


def _told_apart(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """The outcomes, without those that a line drawn already covers."""
    kept: list[Outcome] = []
    for one in outcomes:
        twins = (other for other in kept if other.policy == one.policy)
        if all(np.abs(other.balance - one.balance).max() > 0.004 for other in twins):
            kept.append(one)
    return kept


def _entry(name: str, colour: str, marker: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, marker=marker, linestyle="none", markersize=6, label=name)


def _legend(fig: Figure, entries: list[Any], palette: Palette, per_row: int) -> None:
    """A legend above the picture and the names of shifts, in as many rows as it takes."""
    rows = -(-len(entries) // per_row)
    height = fig.get_figheight()
    fig.subplots_adjust(top=1 - (0.3 + 0.19 * rows) / height)
    legend = fig.legend(
        handles=entries,
        loc="upper left",
        bbox_to_anchor=(0.62 / fig.get_figwidth(), 1 - 0.04 / height),
        ncols=min(per_row, len(entries)),
        frameon=False,
        fontsize=8.5,
        handletextpad=0.3,
        columnspacing=1.0,
        borderpad=0.0,
        borderaxespad=0.0,
    )
    for text in legend.get_texts():
        text.set_color(palette.text)


def _colour(policy: str, palette: Palette) -> str:
    return _COLOURS[policy][palette is not LIGHT]


def _plain(text: str, most: int = 16) -> str:
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= most else text[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"
