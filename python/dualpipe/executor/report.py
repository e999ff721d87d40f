"""What a measured step says, beside what was predicted for it.

Letters: P ranks, S stages. Times are in microseconds.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from dualpipe.choice import Layers, Machine
from dualpipe.costs import Costs
from dualpipe.draw import trace_slice
from dualpipe.errors import PipelineError
from dualpipe.executor.timeline import Span, plain_kind
from dualpipe.instruction import Kind

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping, Sequence

    from dualpipe.schedule import Schedule
    from dualpipe.timeline import Timeline

__all__ = ["StepReport"]

_KINDS = (Kind.F, Kind.B, Kind.I, Kind.W)
_WAITED_US = 20.0
"""A rank that was idle for longer before a computation had waited for its message."""


@dataclass(frozen=True, eq=False)
class StepReport:
    """One measured step of all ranks, and what :meth:`Schedule.simulate` says of it.

    ``print(report)`` shows both side by side, for each rank and kind.
    """

    schedule: Schedule = field(repr=False)
    """What was run."""
    spans: tuple[tuple[Span, ...], ...] = field(repr=False)
    """Every pipeline rank's computations in their order, `[P]`; by the wall clocks of their hosts,
    which are as close as those are set, and the same on one host."""
    notes: tuple[str, ...] = ()
    """What did not run as it could, and why, with the rank: backwards that were not split, graphs
    that were not captured."""
    given: Costs | None = field(default=None, repr=False)
    """Costs to predict by; by default those measured here."""

    @property
    def makespan_us(self) -> float:
        """From the first computation's start to the last one's end."""
        return self._bounds[1] - self._bounds[0]

    @cached_property
    def _bounds(self) -> tuple[float, float]:
        starts = [rank[0].start_s for rank in self.spans if rank]
        ends = [rank[-1].end_s for rank in self.spans if rank]
        return (min(starts) * 1e6, max(ends) * 1e6) if starts else (0.0, 0.0)

    @cached_property
    def busy_us(self) -> npt.NDArray[np.float64]:
        """Time that each rank computes, `[P]`."""
        return np.array([sum(_length(span) for span in rank) for rank in self.spans])

    @property
    def idle_ratio(self) -> npt.NDArray[np.float64]:
        """The part of the makespan that each rank does not compute, `[P]`."""
        return 1 - self.busy_us / self.makespan_us

    @cached_property
    def costs(self) -> Costs:
        """Medians for every stage, and links, as :meth:`Schedule.simulate` takes them.

        Where a stage has only run I and W, B is their sum; where only B, I and W are its halves.
        A link's latency is the least that a receiver which waited saw between the end of what made
        a message and the start of what took it; 0 where nobody ever waited.
        """
        return self._costs(np.ones(len(self.spans)))

    def costs_for_any_rank(self, alike: Mapping[Kind, Sequence[int]]) -> Costs:
        """The same, with the ranks' speeds apart from the stages' work, for another placement.

        Two GPUs of a kind differ by a few percent. What a stage costs was measured on the rank
        that holds it; on another it costs as many times more as that rank is slower.

        Args:
            alike: Stages that do the same work, by kind of computation (F, B, I, W): the ranks
                are compared by them. Those that only one rank holds say nothing.

        Returns:
            Costs of the stages on a rank of average speed, and ``rank_factor``.
        """
        factor = self._rank_factor(alike)
        return replace(self._costs(factor), rank_factor=factor)

    def _rank_factor(self, alike: Mapping[Kind, Sequence[int]]) -> npt.NDArray[np.float64]:
        own: list[dict[Kind, list[float]]] = []
        for spans in self.spans:
            times: dict[Kind, list[float]] = defaultdict(list)
            for span in spans:
                kind = plain_kind(span)
                if not span.pair and span.instruction.stage in alike.get(kind, ()):
                    times[kind].append(_length(span))
            own.append(times)
        slower = np.zeros(len(own))
        weight = np.zeros(len(own))
        for kind in alike:
            middle = {rank: median(times[kind]) for rank, times in enumerate(own) if times[kind]}
            if len(middle) < 2:
                continue
            average = sum(middle.values()) / len(middle)
            for rank, time in middle.items():
                # By what was measured of it, so that one short instruction does not weigh much.
                measured = sum(own[rank][kind])
                slower[rank] += measured * time / average
                weight[rank] += measured
        return np.divide(slower, weight, out=np.ones(len(own)), where=weight > 0)

    def _costs(self, factor: npt.NDArray[np.float64]) -> Costs:
        times: dict[tuple[Kind, int], list[float]] = defaultdict(list)
        pairs: dict[int, list[float]] = defaultdict(list)
        for rank, spans in enumerate(self.spans):
            for span in spans:
                length = _length(span) / factor[rank]
                if span.pair:
                    pairs[span.instruction.stage].append(length)
                else:
                    times[plain_kind(span), span.instruction.stage].append(length)
        middle = {key: median(found) for key, found in times.items()}
        table = np.zeros((4, self.schedule.num_stages))
        for stage in range(self.schedule.num_stages):
            forward, whole, first, second = (middle.get((kind, stage)) for kind in _KINDS)
            if whole is None:
                whole = (first or 0.0) + (second or 0.0)
            if first is None or second is None:
                first = second = whole / 2
            table[:, stage] = forward or 0.0, whole, first, second
        apart = table[0] + table[1]
        pair = [median(pairs[s]) if s in pairs else apart[s] for s in range(len(apart))]
        return Costs(
            forward=table[0],
            backward=table[1],
            backward_input=table[2],
            backward_weight=table[3],
            pair=pair if pairs else None,
            latency=self._latency(),
        )

    def layers(self, num_layers: Sequence[int], **sizes: npt.ArrayLike) -> Layers:
        """The measured times as :func:`dualpipe.search` takes them.

        Args:
            num_layers: How many layers each stage has, `[S]`; each is taken to cost the same.
            sizes: ``parameter_bytes``, ``activation_bytes`` and ``message_bytes`` of the layers.

        Raises:
            PipelineError: ``num_layers``.
        """
        counts = np.asarray(num_layers)
        if counts.shape != (self.schedule.num_stages,) or not np.all(counts > 0):
            raise PipelineError(
                code="num_layers",
                argument="num_layers",
                got=repr(num_layers),
                expected=f"the number of layers of each of the {self.schedule.num_stages} stages",
            )
        costs = self.costs
        each = (
            np.repeat(np.asarray(times) / counts, counts)
            for times in (costs.forward, costs.backward_input, costs.backward_weight)
        )
        forward, backward_input, backward_weight = each
        return Layers(
            forward=forward,
            backward_input=backward_input,
            backward_weight=backward_weight,
            **sizes,
        )

    def machine(self, **options: Any) -> Machine:
        """The measured links and overlapped pairs as :func:`dualpipe.search` takes them.

        Links that no message was waited for on are taken to be as fast as the others' median.

        Args:
            options: Other fields of :class:`dualpipe.Machine`, or the same to replace them.
        """
        costs = self.costs
        latency = np.array(costs.latency)
        if (latency > 0).any():
            latency[latency == 0] = np.median(latency[latency > 0])
        measured: dict[str, Any] = {"latency": latency, "pairs": self._pairs}
        if costs.pair is not None and costs.backward is not None:
            stages = sorted({span.instruction.stage for span in self._all() if span.pair})
            apart = np.add(costs.forward, costs.backward)[stages].sum()
            if apart > 0:
                measured["overlap_factor"] = float(np.asarray(costs.pair)[stages].sum() / apart)
        return Machine(**measured | options)

    @property
    def _pairs(self) -> Literal["atomic", "early_forward"]:
        """When a pair has handed out F's result: early, unless a hook has run it."""
        return "atomic" if any(span.pair for span in self._all()) else "early_forward"

    @cached_property
    def predicted(self) -> Timeline:
        """The timeline that the costs give."""
        costs = self.costs if self.given is None else self.given
        return self.schedule.simulate(costs, pairs=self._pairs)

    def __str__(self) -> str:
        predicted = self._predicted_busy()
        rows = [["rank", "", "measured ms", "predicted ms", "times", "median ms"]]
        for rank, spans in enumerate(self.spans):
            found: dict[str, list[float]] = defaultdict(list)
            for span in spans:
                found[_kind_name(span)].append(_length(span))
            for name, lengths in found.items():
                rows.append(
                    [
                        str(rank),
                        name,
                        _ms(sum(lengths)),
                        _ms(predicted.get((rank, name), 0.0)),
                        str(len(lengths)),
                        _ms(median(lengths)),
                    ]
                )
            idle = self.makespan_us - self.busy_us[rank]
            rows.append(
                [str(rank), "idle", _ms(idle), _ms(float(self.predicted.idle[rank])), "", ""]
            )
        makespan = ["all", "makespan", _ms(self.makespan_us), _ms(self.predicted.makespan), "", ""]
        rows.append(makespan)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                f"{c:{'<' if i < 2 else '>'}{w}}"
                for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, *self.notes])

    def to_perfetto(self, path: str | os.PathLike[str] | None = None) -> str:
        """A Chrome trace, which ui.perfetto.dev opens: the measured step as one process, with a
        track for every rank, and the predicted one as another, with its messages.

        Returns:
            The JSON text.
        """
        trace = json.loads(self.predicted.to_perfetto(unit_us=1.0))
        events = trace["traceEvents"]
        events[0]["args"]["name"] = f"predicted: {events[0]['args']['name']}"
        events += [_named("process_name", f"measured: {self.makespan_us:.0f} us", 0)]
        for rank, spans in enumerate(self.spans):
            events.append(_named("thread_name", f"rank {rank}", rank))
            events += [self._slice(span, rank) for span in spans]
        text = json.dumps(trace)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def _slice(self, span: Span, rank: int) -> dict[str, Any]:
        _, stage, micro_batch, copy = span.instruction
        kind = _kind_name(span)
        name = f"{stage}{chr(39) * copy}{kind}{micro_batch}"
        start, end = (at * 1e6 - self._bounds[0] for at in (span.start_s, span.end_s))
        return trace_slice(name, kind, span.instruction, start, end, pid=1, rank=rank)

    def _all(self) -> Iterator[Span]:
        for rank in self.spans:
            yield from rank

    def _predicted_busy(self) -> dict[tuple[int, str], float]:
        """What each rank is predicted to spend on each kind."""
        found: dict[tuple[int, str], float] = defaultdict(float)
        costs = self.costs if self.given is None else self.given
        shape = (self.schedule.num_stages,)
        whole = costs.backward
        if whole is None:
            whole = np.add(costs.backward_input, costs.backward_weight)
        tables = (costs.forward, whole, costs.backward_input, costs.backward_weight)
        by_kind = {
            kind: np.broadcast_to(np.asarray(table, dtype=np.float64), shape)
            for kind, table in zip(_KINDS, tables, strict=True)
        }
        pair = None if costs.pair is None else np.broadcast_to(np.asarray(costs.pair), shape)
        for rank, spans in enumerate(self.spans):
            for span in spans:
                table = pair if span.pair and pair is not None else by_kind[plain_kind(span)]
                found[rank, _kind_name(span)] += float(table[span.instruction.stage])
        return found

    def _latency(self) -> npt.NDArray[np.float64]:
        made: dict[tuple[bool, int, int, int], tuple[int, float]] = {}
        for rank, spans in enumerate(self.spans):
            for span in spans:
                kind = plain_kind(span)
                if kind != Kind.W:
                    made[kind == Kind.F, *span.instruction[1:]] = rank, span.end_s
        # What waited from before its message was made saw the link alone; what got free later may
        # have waited for its own host as well, so the link back is taken before it.
        clear: dict[tuple[int, int], list[float]] = defaultdict(list)
        other: dict[tuple[int, int], list[float]] = defaultdict(list)
        for rank, spans in enumerate(self.spans):
            free = spans[0].start_s if spans else 0.0
            for span in spans:
                _, stage, micro_batch, copy = span.instruction
                kind = plain_kind(span)
                source = stage - 1 if kind == Kind.F else stage + 1
                maker = made.get((kind == Kind.F, source, micro_batch, copy))
                waited = (span.start_s - free) * 1e6 > _WAITED_US
                if kind != Kind.W and waited and maker is not None and maker[0] != rank:
                    seen = clear if maker[1] >= free else other
                    seen[maker[0], rank].append((span.start_s - maker[1]) * 1e6)
                free = span.end_s
        latency = np.zeros((len(self.spans), len(self.spans)))
        for link in clear.keys() | other.keys():
            found = clear.get(link) or clear.get(link[::-1]) or other[link]
            latency[link] = max(min(found), 0.0)
        return latency


def _length(span: Span) -> float:
    return (span.end_s - span.start_s) * 1e6


def _kind_name(span: Span) -> str:
    return "pair" if span.pair else plain_kind(span).name


def _ms(us: float) -> str:
    return f"{us / 1e3:.3f}"


def _named(what: str, name: str, rank: int) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": 1, "tid": rank, "args": {"name": name}}
