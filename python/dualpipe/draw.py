"""Timelines as pictures, as text, and as traces.

Pictures need matplotlib (``pip install "eplb-rs[plot]"``); text and traces need nothing.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dualpipe.errors import ScheduleError
from dualpipe.instruction import Instruction, Kind

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from dualpipe.timeline import Timeline

__all__ = ["grid", "plot", "to_perfetto", "trace_slice"]

_COLOURS = {
    Kind.F: "#f5b041",
    Kind.B: "#58b368",
    Kind.I: "#8fd3c7",
    Kind.W: "#6fa8dc",
}
"""Forward orange, backward green, its input part teal, its weight part blue."""

_LEGEND = {
    Kind.F: "forward",
    Kind.B: "backward",
    Kind.I: "backward for input",
    Kind.W: "backward for weights",
}

_MOST_LABELS = 6_000
"""Beyond this many computations the numbers could not be read, and cost minutes."""

_ALONE = {Kind.OVERLAP_F: Kind.F, Kind.OVERLAP_B: Kind.B}


class _Box(NamedTuple):
    """One computation, or one half of a pair, on a rank's line."""

    rank: int
    start: float
    end: float
    kind: Kind
    step: Instruction
    pair: bool


def plot(
    timeline: Timeline,
    path: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
    width: float | None = None,
) -> Any:
    """Draws a timeline as the DualPipe paper does: a line per rank, a colour per kind, micro-batch
    numbers, overlapped pairs in one black box. Numbers of the second direction are white.

    Args:
        timeline: What :meth:`dualpipe.Schedule.simulate` gives.
        path: Where to write it, as the suffix says (``.svg``, ``.png``, ``.pdf``).
        title: Above the picture; by default what the schedule is.
        width: Inches; by default as the number of columns needs.

    Returns:
        The matplotlib figure, not shown.

    Raises:
        ScheduleError: ``path`` with a suffix that matplotlib does not write.
        ImportError: matplotlib is not installed.

    Cost: about 0.2 s and 0.1 ms a computation.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.collections import PatchCollection
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch, Rectangle
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "eplb-rs[plot]"') from error

    schedule = timeline.schedule
    boxes = list(_boxes(timeline))
    ranks = schedule.num_ranks
    shortest = min((box.end - box.start for box in boxes if box.end > box.start), default=1.0)
    columns = timeline.makespan / shortest if timeline.makespan else 1.0
    size = (width or float(np.clip(0.24 * columns, 6, 60)), 0.34 * ranks + 1.1)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()

    for kind, colour in _COLOURS.items():
        patches = [
            Rectangle((box.start, box.rank - 0.5), box.end - box.start, 1.0)
            for box in boxes
            if box.kind is kind
        ]
        axes.add_collection(
            PatchCollection(patches, facecolor=colour, edgecolor="white", linewidth=0.6)
        )
    framed = [
        Rectangle((first.start, first.rank - 0.5), second.end - first.start, 1.0)
        for first, second in itertools.pairwise(boxes)
        if first.pair and second.pair and first.kind is Kind.F
    ]
    axes.add_collection(
        PatchCollection(framed, facecolor="none", edgecolor="black", linewidth=1.1, zorder=3)
    )
    if len(boxes) <= _MOST_LABELS:
        for box in boxes:
            # In a V the second half of the stages counts as the second direction.
            second = box.step.copy == 1 or (
                schedule.num_copies == 1 and box.step.stage >= schedule.num_ranks
            )
            axes.text(
                (box.start + box.end) / 2,
                box.rank,
                str(box.step.micro_batch),
                ha="center",
                va="center",
                fontsize=6.5,
                color="white" if second else "black",
                clip_on=True,
            )
    axes.set_xlim(0, timeline.makespan or 1.0)
    axes.set_ylim(ranks - 0.5, -0.5)
    axes.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    axes.tick_params(length=0)
    axes.set_xlabel("time")
    axes.set_facecolor("#f4f4f4")
    for spine in axes.spines.values():
        spine.set_visible(False)
    used = {box.kind for box in boxes}
    handles = [
        Patch(color=_COLOURS[kind], label=_LEGEND[kind]) for kind in _COLOURS if kind in used
    ]
    if framed:
        handles.append(Patch(facecolor="none", edgecolor="black", label="overlapped pair"))
    handles.append(Patch(color="#f4f4f4", label=f"idle {100 * timeline.bubble_ratio:.1f} %"))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8
    )
    axes.set_title(title or _title(timeline), fontsize=9, loc="left")
    if path is not None:
        suffix = Path(path).suffix.removeprefix(".")
        known = figure.canvas.get_supported_filetypes()
        if suffix not in known:
            raise ScheduleError(
                code="path",
                argument="path",
                got=str(path),
                expected=f"a file ending in {', '.join(sorted(known))}",
            )
        figure.savefig(path, dpi=150)
    return figure


def grid(timeline: Timeline) -> str:
    """The timeline as text: a line per rank, a column per unit of time; overlapped pairs in
    brackets, `'` marks the rank's second stage, or second direction, and so on; `.` is idle.

    A computation stands where it starts and fills its time with `-`. Times are rounded to whole
    units, so choose the unit by the costs.
    """
    rows: list[list[str]] = []
    columns = max(int(np.ceil(timeline.makespan)), 1)
    marks = _marks(timeline.schedule.placement.tolist())
    for _ in range(timeline.schedule.num_ranks):
        rows.append(["."] * columns)
    for box in _boxes(timeline):
        first, last = round(box.start), max(round(box.end), round(box.start) + 1)
        mark = "'" * marks[box.rank, box.step.copy, box.step.stage]
        label = f"{box.kind.name}{mark}{box.step.micro_batch}"
        if box.pair:
            label = f"[{label}" if box.kind is Kind.F else f"{label}]"
        row = rows[box.rank]
        row[first:last] = [label, *["-"] * (last - first - 1)][: columns - first]
    width = max(len(cell) for row in rows for cell in row)
    names = [f"rank {rank}" for rank in range(len(rows))]
    name_width = max(map(len, names))
    return "\n".join(
        f"{name:{name_width}} {' '.join(f'{cell:{width}}' for cell in row)}".rstrip()
        for name, row in zip(names, rows, strict=True)
    )


def _marks(placement: list[list[int]]) -> dict[tuple[int, int, int], int]:
    """For each rank, copy and stage, how many the rank holds before it."""
    held: dict[int, int] = {}
    marks: dict[tuple[int, int, int], int] = {}
    for copy, ranks in enumerate(placement):
        for stage, rank in enumerate(ranks):
            marks[rank, copy, stage] = held.get(rank, 0)
            held[rank] = held.get(rank, 0) + 1
    return marks


def to_perfetto(
    timeline: Timeline,
    path: str | os.PathLike[str] | None = None,
    *,
    unit_us: float = 1000.0,
    messages: bool = True,
) -> str:
    """The timeline as a Chrome trace, which ui.perfetto.dev opens: a track per rank, pairs as one
    slice with their halves in it, an arrow per message, and the activations held as a counter.

    Args:
        timeline: What :meth:`dualpipe.Schedule.simulate` gives.
        path: Where to write it too.
        unit_us: Microseconds that a unit of time stands for.
        messages: Draw the arrows.

    Returns:
        The JSON text.

    Cost: about 10 us a computation.
    """
    schedule = timeline.schedule
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": _title(timeline)}}
    ]
    events += [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": rank, "args": {"name": f"rank {rank}"}}
        for rank in range(schedule.num_ranks)
    ]
    boxes = list(_boxes(timeline))
    for index, box in enumerate(boxes):
        if box.pair and box.kind is Kind.F:
            other = boxes[index + 1]
            name = f"{_name(box)} + {_name(other)}"
            ends = box.start * unit_us, other.end * unit_us
            events.append(trace_slice(name, "pair", box.step, *ends, pid=0, rank=box.rank))
        ends = box.start * unit_us, box.end * unit_us
        events.append(trace_slice(_name(box), box.kind.name, box.step, *ends, pid=0, rank=box.rank))
    alive = [0] * schedule.num_ranks
    for box in boxes:
        if box.kind is Kind.I or not schedule.has_backward:
            continue
        alive[box.rank] += 1 if box.kind is Kind.F else -1
        at = box.start if box.kind is Kind.F else box.end
        events.append(
            {
                "ph": "C",
                "name": f"activations, rank {box.rank}",
                "pid": 0,
                "ts": _on_grid(at * unit_us),
                "args": {"held": alive[box.rank]},
            }
        )
    if messages:
        events += _arrows(boxes, schedule.placement.tolist(), unit_us)
    text = json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def trace_slice(
    name: str,
    category: str,
    step: Instruction,
    start_us: float,
    end_us: float,
    *,
    pid: int,
    rank: int,
) -> dict[str, Any]:
    """A computation in a Chrome trace."""
    start, end = _on_grid(start_us), _on_grid(end_us)
    return {
        "ph": "X",
        "name": name,
        "cat": category,
        "pid": pid,
        "tid": rank,
        "ts": start,
        "dur": end - start,
        "args": {"stage": step.stage, "copy": step.copy, "micro_batch": step.micro_batch},
    }


def _on_grid(us: float) -> float:
    """A time in whole eighths of a microsecond.

    Readers keep whole nanoseconds of the start and of the length, and drop a slice that sticks
    out of the one around it by a rounding error. Eighths are exact in both.
    """
    return round(us * 8) / 8


def _arrows(
    boxes: list[_Box], placement: list[list[int]], unit_us: float
) -> Iterator[dict[str, Any]]:
    """From the end of what makes an activation or gradient to the start of what takes it."""
    makers = {
        (box.kind is Kind.F, box.step.copy, box.step.stage, box.step.micro_batch): box
        for box in boxes
        if box.kind is not Kind.W
    }
    for number, box in enumerate(boxes):
        if box.kind is Kind.W:
            continue
        forward = box.kind is Kind.F
        source = box.step.stage + (-1 if forward else 1)
        maker = makers.get((forward, box.step.copy, source, box.step.micro_batch))
        if maker is None or placement[box.step.copy][source] == box.rank:
            continue
        arrow = {"name": "message", "cat": "message", "id": number, "pid": 0}
        # Arrows attach to slices: just inside the maker's end, and at the taker's start.
        leaves = max(_on_grid(maker.end * unit_us) - 0.125, _on_grid(maker.start * unit_us))
        # A pair's second half may have waited within its box.
        taken = max(_on_grid(box.start * unit_us), leaves)
        yield {**arrow, "ph": "s", "tid": maker.rank, "ts": leaves}
        yield {**arrow, "ph": "f", "bp": "e", "tid": box.rank, "ts": taken}


def _boxes(timeline: Timeline) -> Iterator[_Box]:
    """All computations; a pair as two boxes side by side, cut as its halves alone would be."""
    schedule = timeline.schedule
    starts = schedule._starts
    halves = timeline.halves.tolist()
    for rank in range(schedule.num_ranks):
        stream = schedule.instructions(rank)
        begin, end = timeline.bounds[rank : rank + 2]
        spans = zip(
            (timeline.op[begin:end] - starts[rank]).tolist(),
            timeline.start[begin:end].tolist(),
            timeline.end[begin:end].tolist(),
            strict=True,
        )
        for index, since, until in spans:
            step = stream[index]
            if step.kind is Kind.OVERLAP_F:
                second = stream[index + 1]
                forward, backward = halves[0][step.stage], halves[1][second.stage]
                apart = forward + backward
                middle = since + (until - since) * (forward / apart if apart else 0.5)
                yield _Box(rank, since, middle, Kind.F, step, pair=True)
                yield _Box(rank, middle, until, Kind.B, second, pair=True)
            else:
                yield _Box(rank, since, until, _ALONE.get(step.kind, step.kind), step, pair=False)


def _name(box: _Box) -> str:
    place = f"{box.step.stage}{chr(39) * box.step.copy}"
    return f"{place}{box.kind.name}{box.step.micro_batch}"


def _title(timeline: Timeline) -> str:
    schedule = timeline.schedule
    return (
        f"{schedule.name}, {schedule.num_ranks} ranks, {schedule.num_micro_batches} micro-batches: "
        f"{timeline.makespan:g} units, bubble {100 * timeline.bubble_ratio:.1f} %"
    )
