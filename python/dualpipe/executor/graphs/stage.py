"""A stage that can be replayed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from dualpipe.executor.graphs.likeness import kind_of
from dualpipe.executor.stage import Stage
from dualpipe.instruction import Kind

if TYPE_CHECKING:
    from dualpipe.executor.graphs.slots import Slot, Slots
    from dualpipe.executor.stage import Flight

__all__ = ["GraphedStage", "Probe"]


class GraphedStage(Stage):
    """A stage whose instructions are replayed once they have been captured."""

    slots: Slots | None = None
    """What has been captured; None runs the stage as it is."""
    seen: set[Any] | None = None
    """What micro-batches of the last steps were like."""
    probe: Probe | None = None
    """How long the first forward of a step takes, on the host and on the GPU."""

    def forward(self, m: int) -> None:
        """F."""
        flight = self.flights[m]
        if self.slots is not None:
            slot = self.slots.forward(flight, m, self.open(flight, m))
            if flight.arrival is not None:
                # Copied into the slot.
                flight.arrival.release()
                flight.arrival = None
            self._keep(flight, m, slot)
            return
        inputs = self.open(flight, m)
        if self.settings.training and self.seen is not None:
            self.seen.add(kind_of(inputs, flight))
        if self.probe is not None and m == 0:
            with self.probe:
                returned = self.module(*inputs, **flight.kwargs)
        else:
            returned = self.module(*inputs, **flight.kwargs)
        self.close(flight, m, returned)

    def backward(self, m: int) -> None:
        """B."""
        if self.slots is None:
            super().backward(m)
        else:
            self._backward(m, Kind.B)
            self.free(self.flights[m])

    def backward_input(self, m: int) -> None:
        """I."""
        if self.slots is None:
            super().backward_input(m)
        else:
            self._backward(m, Kind.I)

    def backward_weight(self, m: int) -> None:
        """W."""
        if self.slots is None:
            super().backward_weight(m)
        else:
            self.slots.backward_weight(m)
            self.free(self.flights[m])

    def _backward(self, m: int, kind: Kind) -> None:
        flight = self.flights[m]
        assert self.slots is not None
        if flight.grad_arrival is not None:
            flight.output_grads = flight.grad_arrival.ready()
        grads = self.slots.backward(flight, m, kind)
        if flight.grad_arrival is not None:
            flight.grad_arrival.release()
            flight.grad_arrival = None
        # What stays on this rank may be used after the slot has got another micro-batch.
        here = self.previous is not None or self.is_first
        flight.input_grads = [None if g is None else g.clone() for g in grads] if here else grads
        self.hand_back(flight, m)

    def _keep(self, flight: Flight, m: int, slot: Slot) -> None:
        """Hands on what a replay has computed."""
        if self.is_last:
            if slot.loss is not None:
                self.losses[m] = slot.loss.detach().clone()
            if self.settings.return_outputs:
                self.results[m] = tuple(
                    None if o is None else o.detach().clone() for o in slot.outputs
                )
        elif self.next is not None:
            self.next.flights[m].inputs = [
                None if o is None else o.detach().requires_grad_(o.requires_grad)
                for o in slot.outputs
            ]
        else:
            flight.outputs = [None if o is None else o.detach() for o in slot.outputs]


class Probe:
    """Times a forward on the host and on the GPU, from an empty queue on."""

    def __init__(self) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        self._host_s = 0.0

    def __enter__(self) -> None:
        self._events[0].record()
        self._host_s = -time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._host_s += time.perf_counter()
        self._events[1].record()

    @property
    def ratio(self) -> float:
        """The host's part of the GPU's time."""
        gpu_ms: float = self._events[0].elapsed_time(self._events[1])
        return 1e3 * self._host_s / max(gpu_ms, 1e-3)
