"""What a Chrome trace must be like for ui.perfetto.dev to show all of it.

Its importer drops without a word what is wrong: slices of a track that overlap and do not nest,
arrows that begin or end in no slice, events without the fields of their phase.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict

FIELDS = {
    "M": {"args"},
    "X": {"tid", "ts", "dur", "cat", "args"},
    "C": {"ts", "args"},
    "s": {"tid", "ts", "id", "cat"},
    "f": {"tid", "ts", "id", "cat", "bp"},
}


def check_trace(text: str) -> list[dict]:
    """The events of a trace, all of them right."""
    trace = json.loads(text, parse_constant=lambda name: math.nan)
    assert trace["displayTimeUnit"] in {"ms", "ns"}
    events = trace["traceEvents"]
    slices, named, ends = defaultdict(list), set(), defaultdict(list)
    for event in events:
        phase = event["ph"]
        assert FIELDS[phase] | {"ph", "name", "pid"} <= event.keys(), event
        assert isinstance(event["name"], str), event
        assert event["name"], event
        assert all(type(event.get(key, 0)) is int for key in ("pid", "tid", "id")), event
        for key in ("ts", "dur"):
            nanoseconds = event.get(key, 0) * 1000
            assert math.isfinite(nanoseconds), event
            assert nanoseconds >= 0, event
            assert nanoseconds == int(nanoseconds), event
        if phase == "M":
            assert event["name"] in {"process_name", "thread_name"}
            assert isinstance(event["args"]["name"], str)
            named.add((event["pid"], event.get("tid") if event["name"] == "thread_name" else None))
        elif phase == "X":
            slices[event["pid"], event["tid"]].append(event)
        elif phase == "C":
            assert all(isinstance(value, (int, float)) for value in event["args"].values())
        else:
            ends[event["pid"], event["id"]].append(event)
    for (pid, tid), track in slices.items():
        assert {(pid, None), (pid, tid)} <= named
        _check_track(track)
    for (pid, _), arrow in ends.items():
        assert [event["ph"] for event in arrow] == ["s", "f"]
        assert arrow[0]["ts"] <= arrow[1]["ts"]
        for event in arrow:
            track = slices[pid, event["tid"]]
            assert any(s["ts"] <= event["ts"] < s["ts"] + s["dur"] for s in track), event
    return events


def _check_track(track: list[dict]) -> None:
    """Slices nest, or come one after the other; of two with one start, the outer comes first."""
    open_ends: list[float] = []
    for event in sorted(track, key=lambda event: event["ts"]):
        end = event["ts"] + event["dur"]
        while open_ends and open_ends[-1] <= event["ts"]:
            open_ends.pop()
        assert not open_ends or end <= open_ends[-1], event
        open_ends.append(end)
