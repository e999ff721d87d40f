"""Rank loads as bars of characters."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from eplb_rs.plan import Plan
    from eplb_rs.report.report import Report
    from eplb_rs.report.style import Style

__all__ = ["bar", "rank_bars"]

_EIGHTHS = " ▁▂▃▄▅▆▇█"
_THIRDS = " .:#"
_BAR_EIGHTHS = " ▏▎▍▌▋▊▉█"


def rank_bars(report: Report, row: int, style: Style, why: str) -> str:
    """A bar per rank of one layer, before and after on one scale."""
    plan, before = report.plan, report.before
    mean = float(plan.rank_load[row].mean()) or 1.0
    loads = [before.rank_load[row] / mean, plan.rank_load[row] / mean]
    top = max(float(load.max()) for load in loads) or 1.0
    num_ranks = plan.topology.num_gpus
    room = style.width - 8
    beside = 2 * num_ranks + 3 <= room
    ranks_per_bar = 1 if beside else -(-num_ranks // room)
    height = 6 if beside else 4
    charts = [_chart(_grouped(load, ranks_per_bar), top, height, style.blocks) for load in loads]
    ticks = _ticks(plan, ranks_per_bar, len(charts[0][0]))
    titles = [
        f"before, max {loads[0].max():.2f}",
        f"after, max {loads[1].max():.2f}",
    ]
    painted = [
        [style.before(line) for line in charts[0]],
        [style.after(line) for line in charts[1]],
    ]
    scale = [f"{top:5.1f} " if line == 0 else " " * 6 for line in range(height)]
    what = "a bar per rank" if ranks_per_bar == 1 else f"a bar per {ranks_per_bar} ranks"
    title = f"Rank loads of layer {plan.layer_ids[row]}{why}, {what}; 1 = mean"
    lines = [style.dim(line) for line in textwrap.wrap(title, style.width)]
    width = len(charts[0][0])
    if beside:
        lines.append(f"{'':6}{titles[0]:<{width}}   {titles[1]}".rstrip())
        for mark, left, right in zip(scale, *painted, strict=True):
            lines.append(f"{style.dim(mark)}{left}   {right}".rstrip())
        lines.append(style.dim(f"{' rank ':6}{ticks:<{width}}   {ticks}".rstrip()))
        return "\n".join(lines)
    for chart_title, chart in zip(titles, painted, strict=True):
        lines.append(f"{'':6}{chart_title}")
        for mark, line in zip(scale, chart, strict=True):
            lines.append(f"{style.dim(mark)}{line}".rstrip())
    lines.append(style.dim(f"{' rank ':6}{ticks}".rstrip()))
    return "\n".join(lines)


def _chart(heights: npt.NDArray[np.float64], top: float, height: int, blocks: bool) -> list[str]:
    """Upright bars, one a column, as lines from the top."""
    marks = _EIGHTHS if blocks else _THIRDS
    steps = len(marks) - 1
    filled = np.rint(heights / top * height * steps).astype(int)
    filled[(heights > 0) & (filled == 0)] = 1  # a load is never drawn as none
    lines = []
    for line in reversed(range(height)):
        levels = np.clip(filled - line * steps, 0, steps)
        lines.append("".join(marks[level] for level in levels))
    return lines


def bar(part: float, width: int, blocks: bool) -> str:
    """A lying bar of at most `width` columns."""
    if not blocks:
        return "#" * round(part * width)
    full, eighths = divmod(round(part * width * 8), 8)
    return "█" * full + _BAR_EIGHTHS[eighths].strip()


def _grouped(loads: npt.NDArray[np.float64], size: int) -> npt.NDArray[np.float64]:
    """The largest of each `size` neighbours."""
    return np.maximum.reduceat(loads, np.arange(0, len(loads), size))


def _ticks(plan: Plan, ranks_per_bar: int, width: int) -> str:
    """Rank numbers under bars: at the nodes where they fit, else some 8 columns apart."""
    step = plan.topology.gpus_per_node
    while step < 8 * ranks_per_bar:
        step *= 2
    line = " " * width
    for rank in range(0, plan.topology.num_gpus, step):
        column, name = rank // ranks_per_bar, str(rank)
        if column + len(name) <= width:
            line = line[:column] + name + line[column + len(name) :]
    return line
