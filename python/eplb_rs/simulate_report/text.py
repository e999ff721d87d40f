"""A report on a replay as text."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import numpy as np

from eplb_rs.simulate_report.words import outcome_name

if TYPE_CHECKING:
    from eplb_rs.report import Style
    from eplb_rs.simulate import Simulation
    from eplb_rs.simulate_report.report import SimulationReport

__all__ = ["curves_text", "table_text"]


def table_text(report: SimulationReport, style: Style) -> str:
    """The table, in as many parts one below the other as the width asks for."""
    names, rows = report.table()
    columns = list(zip(names, *rows, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    kept = widths[0] + 2 + widths[1]
    parts: list[list[int]] = [[]]
    used = kept
    for number in range(2, len(names)):
        if parts[-1] and used + 2 + widths[number] > style.width:
            parts.append([])
            used = kept
        parts[-1].append(number)
        used += 2 + widths[number]
    chosen = report.simulation.outcomes.index(report.verdict.outcome)
    blocks = []
    for part in parts:
        lines = []
        for index, row in enumerate([names, *rows]):
            line = f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}"
            line += "".join(f"  {row[number]:>{widths[number]}}" for number in part)
            if index == 0:
                line = style.dim(line)
            elif index == chosen + 1:
                line = style.after(line)
            lines.append(line.rstrip())
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def curves_text(simulation: Simulation, style: Style) -> str:
    """The balance of each outcome, window by window, as a line of blocks."""
    names = [outcome_name(one) for one in simulation.outcomes]
    margin = max(map(len, names)) + 2
    room = max(style.width - margin, 8)
    per_mark = -(-len(simulation.distance) // room)
    starts = np.arange(0, len(simulation.distance), per_mark)
    curves = [np.minimum.reduceat(one.balance, starts) for one in simulation.outcomes]
    low = min(float(curve.min()) for curve in curves)
    low = min(np.floor(10 * low) / 10, 0.9)
    marks = "▁▂▃▄▅▆▇█" if style.blocks else "_.-~=+*#"
    what = "window by window" if per_mark == 1 else f"the worst of each {per_mark} windows"
    title = f"Balance, {what}: {marks[0]} {low:.1f} to {marks[-1]} 1.0"
    lines = [style.dim(line) for line in textwrap.wrap(title, style.width)]
    for name, curve in zip(names, curves, strict=True):
        levels = np.clip((curve - low) / (1 - low) * len(marks), 0, len(marks) - 1)
        lines.append(f"{name:<{margin}}" + "".join(marks[int(level)] for level in levels))
    if simulation.shifted.any():
        shifts = np.maximum.reduceat(simulation.shifted, starts)
        pointers = "".join("^" if shift else " " for shift in shifts)
        lines.append(style.dim(f"{'shifts':<{margin}}{pointers}".rstrip()))
    return "\n".join(lines)
