"""Runs one step after the other, each by its plan."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import torch

from dualpipe.executor.buffers import Buffers
from dualpipe.executor.pair import Streams, has_hook
from dualpipe.executor.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from dualpipe.executor.copies import Copies
    from dualpipe.executor.graphs import Graphs
    from dualpipe.executor.places import Places
    from dualpipe.executor.plan import Batch, Plan
    from dualpipe.executor.stage import Settings
    from dualpipe.executor.timeline import Recorder
    from dualpipe.executor.transport.base import Transport

__all__ = ["Runner"]

_STEADY = 3
"""So many steps of a plan warm up, and capture graphs."""


class Runner:
    """What a rank runs its steps by.

    A step may be started before the ranks have agreed on it: :meth:`lead` runs the forwards
    before its first transfer, on the ranks where micro-batches enter, so that agreeing takes none
    of their time. :meth:`undo` takes them back.

    Args:
        places: The rank's stages.
        transport: What moves messages.
        copies: What reduces gradients.
        graphs: The stages' CUDA graphs.
        recorder: Marks and measures.
        device: Where the stages are.
    """

    def __init__(
        self,
        places: Places,
        transport: Transport,
        copies: Copies | None,
        graphs: Graphs,
        recorder: Recorder,
        device: torch.device,
    ) -> None:
        self._places = places
        self._transport = transport
        self._copies = copies
        self._graphs = graphs
        self._recorder = recorder
        self._device = device
        self._streams = Streams(device)
        self._prepared: Plan | None = None
        """The plan that the transport is ready for: that of the last step."""
        self._num_runs = 0
        """How many steps of it have been run."""
        self._entrances = [s.module for s in places.stages.values() if s.is_first]
        """Where micro-batches enter."""
        self._seen: Buffers | None = None
        """Their buffers before the last of the steps that warm up."""
        self._changing: set[tuple[nn.Module, str]] = set()
        """Those that steps change."""
        self._before: tuple[list[torch.Tensor], Buffers] | None = None
        """The random generators and changing buffers before a lead."""
        self.stream: Stream | None = None
        """What is being run."""

    def leads(self, plan: Plan) -> bool:
        """Whether a step may be started before the ranks have agreed on it."""
        ready = plan is self._prepared and self._num_runs >= _STEADY
        if not ready or not self._entrances:
            return False
        if self._seen is not None:
            self._changing = self._seen.changed()
            self._seen = None
        return True

    def start(self, plan: Plan, batch: Batch, settings: Settings, *, reducing: bool) -> None:
        """Sets the stages up for a step."""
        schedule = plan.schedule
        for (_, copy), stage in self._places.stages.items():
            first_micro_batch = sum(schedule.micro_batches[:copy])
            stage.begin(settings, plan.flights(stage, batch), first_micro_batch)
        stream = plan.streams.get(reducing)
        if stream is None:
            stream = plan.streams[reducing] = self._make_stream(plan, reducing=reducing)
        self.stream = stream
        with _on(self._device):
            self._graphs.begin(plan, stream.instructions, settings)
            self._recorder.begin()

    def lead(self, settings: Settings) -> None:
        """Runs what comes before the first transfer."""
        assert self.stream is not None
        generators = [] if settings.seed else _generators(self._device)
        self._before = generators, Buffers(self._changing)
        with _on(self._device):
            self.stream.run_lead()

    def undo(self) -> None:
        """Takes back what :meth:`lead` has done; what modules keep in Python stays."""
        if self._before is not None:
            generators, buffers = self._before
            if generators:
                _restore(generators, self._device)
            buffers.restore()
            self._graphs.undo()
        self.end()

    def run(self, plan: Plan, settings: Settings) -> None:
        """Runs the step, or what :meth:`lead` has left of it."""
        assert self.stream is not None
        if plan is not self._prepared:
            self._prepared = None
            self._num_runs = 0
            self._transport.prepare(self.stream.envelopes(training=settings.training))
            self._prepared = plan
        if self._num_runs == _STEADY - 1:
            self._seen = Buffers.of(self._entrances)
        with _on(self._device):
            self.stream.run()
        self._num_runs += 1

    def wait(self, poll: Callable[[], None]) -> None:
        """Waits until the GPU has ended the step.

        Args:
            poll: Raises what went wrong meanwhile: what is lost while the streams run must be
                found, so this is no synchronization.
        """
        if self._device.type != "cuda":
            return
        end = torch.cuda.Event()  # type: ignore[no-untyped-call]
        end.record(torch.cuda.current_stream(self._device))
        while not end.query():  # type: ignore[no-untyped-call]
            poll()
            time.sleep(5e-5)

    def end(self) -> None:
        """Lets go of all that the step held."""
        if self.stream is not None:
            self.stream.reset()
        self.stream = self._before = None
        for stage in self._places.stages.values():
            stage.reset()

    def _make_stream(self, plan: Plan, *, reducing: bool) -> Stream:
        stages = self._places.stages
        for stage in stages.values():
            stage.keeps_outputs = any(has_hook(other, stage) for other in stages.values())
        stream = Stream(
            plan.schedule.instructions(self._places.rank),
            stages,
            self._places.peers,
            self._recorder.transport(self._transport),
            self._copies if reducing else None,
            self._streams,
        )
        stream.actions = self._recorder.actions(stream.instructions, stream.actions)
        return stream


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _generators(device: torch.device) -> list[torch.Tensor]:
    """The states of the random generators that a forward may draw from."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _restore(states: list[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
