"""What ran when: marks for profilers, and measured timelines."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dualpipe.executor.pair import run_pair
from dualpipe.executor.transport.base import Arrival, Transport
from dualpipe.instruction import Instruction, Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dualpipe.executor.transport.base import Departure, Envelope, Message, TensorSpec

    Action = Callable[[], None]

__all__ = ["Recorder", "Span"]


class Span(NamedTuple):
    """One computation as it was run."""

    instruction: Instruction
    """What was computed; ``OVERLAP_F`` for a whole pair that a hook has interleaved."""
    pair: bool
    """Whether it is such a pair."""
    start_s: float
    """When it started, by the host's wall clock: what it waited for was there."""
    end_s: float
    """When it ended."""


class Recorder:
    """Marks every instruction for profilers, and measures the computing ones when asked to.

    Args:
        device: Where the computations run. On a GPU times are those of events in the computing
            stream, put on the host's clock once a step; on a CPU those of the clock itself.
        measure: Whether to measure; may be changed between steps.

    Cost: 1 us an instruction; measured, 6 us a computation on a GPU, 1 us on a CPU.
    """

    def __init__(self, device: torch.device, *, measure: bool = False) -> None:
        self.measure = measure
        self._clock: _Clock = _EventClock(device) if device.type == "cuda" else _HostClock()
        self._marks = device.type == "cuda"
        self._done: list[tuple[Instruction, bool]] = []

    def begin(self) -> None:
        """Starts a step, when nothing runs."""
        self._done.clear()
        if self.measure:
            self._clock.begin()

    def actions(
        self, instructions: Sequence[Instruction], actions: Sequence[Action]
    ) -> list[Action]:
        """The same actions, marked and measured."""
        return [
            self._watched(instruction, action, getattr(action, "func", None) is run_pair)
            for instruction, action in zip(instructions, actions, strict=True)
        ]

    def _watched(self, instruction: Instruction, action: Action, pair: bool) -> Action:
        name = str(instruction)
        if pair:
            name = f"({name.strip('()')} ...)"
        computes = instruction.kind.computes
        clock = self._clock
        marks = self._marks

        def run() -> None:
            measured = computes and self.measure
            if marks:
                torch.cuda.nvtx.range_push(name)  # type: ignore[no-untyped-call]
            if measured:
                clock.start()
            if torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
                with torch.profiler.record_function(name):
                    action()
            else:
                action()
            if measured:
                clock.stop()
                self._done.append((instruction, pair))
            if marks:
                torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]

        return run

    def transport(self, transport: Transport) -> Transport:
        """The same transport; what is waited for in it is not counted as computing."""
        return _NotedTransport(transport, self)

    def waited(self) -> None:
        """Says that what the instruction needs from other ranks is there."""
        if self.measure:
            self._clock.restart()

    def spans(self) -> list[Span]:
        """What the last step has computed, in its order; after its end."""
        times = self._clock.times()
        return [Span(*done, *at) for done, at in zip(self._done, times, strict=True)]


class _Clock:
    """Takes the times of computations, one after the other."""

    def begin(self) -> None: ...
    def start(self) -> None: ...
    def restart(self) -> None: ...
    def stop(self) -> None: ...
    def times(self) -> list[tuple[float, float]]:
        raise NotImplementedError


class _HostClock(_Clock):
    def __init__(self) -> None:
        self._times: list[tuple[float, float]] = []
        self._since = self._offset = 0.0

    def begin(self) -> None:
        self._times = []
        self._offset = time.time() - time.perf_counter()

    def start(self) -> None:
        self._since = time.perf_counter()

    restart = start

    def stop(self) -> None:
        self._times.append((self._since + self._offset, time.perf_counter() + self._offset))

    def times(self) -> list[tuple[float, float]]:
        return self._times


class _EventClock(_Clock):
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._count = 0
        self._base = _timed_event()
        self._base_s = 0.0

    def begin(self) -> None:
        self._count = 0
        self._base.record(torch.cuda.current_stream(self._device))
        self._base.synchronize()
        self._base_s = time.time()

    def start(self) -> None:
        if self._count == len(self._events):
            self._events.append((_timed_event(), _timed_event()))
        self._events[self._count][0].record()

    def restart(self) -> None:
        # Recorded again, an event has its later place in the stream.
        if self._count < len(self._events):
            self._events[self._count][0].record()

    def stop(self) -> None:
        self._events[self._count][1].record()
        self._count += 1

    def times(self) -> list[tuple[float, float]]:
        base, ms = self._base, 1e-3
        return [
            (
                self._base_s + base.elapsed_time(start) * ms,
                self._base_s + base.elapsed_time(end) * ms,
            )
            for start, end in self._events[: self._count]
        ]


def _timed_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class _NotedTransport(Transport):
    """A transport whose arrivals tell a recorder when they are there."""

    def __init__(self, inner: Transport, recorder: Recorder) -> None:
        super().__init__(inner.group, inner.device, inner.limit_s)
        self.name = inner.name
        self._inner = inner
        self._recorder = recorder

    def prepare(self, envelopes: Sequence[Envelope]) -> None:
        self._inner.prepare(envelopes)

    def post_receive(self, peer: int, message: Message, specs: Sequence[TensorSpec]) -> Arrival:
        return _NotedArrival(self._inner.post_receive(peer, message, specs), self._recorder)

    def send(self, peer: int, message: Message, tensors: Sequence[torch.Tensor]) -> Departure:
        return self._inner.send(peer, message, tensors)

    def poll(self) -> None:
        self._inner.poll()

    def close(self, *, drop: bool = False) -> None:
        self._inner.close(drop=drop)


class _NotedArrival(Arrival):
    __slots__ = ("_inner", "_recorder", "release")

    def __init__(self, inner: Arrival, recorder: Recorder) -> None:
        self._inner = inner
        self._recorder = recorder
        self.release: Any = inner.release

    def ready(self) -> list[torch.Tensor]:
        tensors = self._inner.ready()
        self._recorder.waited()
        return tensors


_WHOLE = {Kind.OVERLAP_F: Kind.F, Kind.OVERLAP_B: Kind.B}


def plain_kind(span: Span) -> Kind:
    """F, B, I or W; what half of a pair is alone."""
    return _WHOLE.get(span.instruction.kind, span.instruction.kind)
