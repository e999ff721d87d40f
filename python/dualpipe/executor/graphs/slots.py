"""Memory and graphs for the micro-batches of a stage that are in flight at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dualpipe.executor.graphs.likeness import sample, tensor_pairs
from dualpipe.instruction import Instruction, Kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from dualpipe.executor.backward import WeightPart
    from dualpipe.executor.graphs.likeness import Like
    from dualpipe.executor.stage import Flight

__all__ = ["Slot", "Slots", "share_slots"]

_ENDS = {Kind.B, Kind.W, Kind.OVERLAP_B}
_OF_GRAPH = {Kind.OVERLAP_F: Kind.F, Kind.OVERLAP_B: Kind.B}


class Slot:
    """Memory and graphs for one micro-batch in flight."""

    def __init__(self, like: Like) -> None:
        self.inputs = [sample(part) for part in like.inputs]
        self.kwargs = {name: sample(part) for name, part in like.kwargs}
        self.labels = [sample(part) for part in like.labels]
        self.graphs: dict[Kind, torch.cuda.CUDAGraph] = {}
        self.outputs: tuple[torch.Tensor | None, ...] = ()
        self.loss: torch.Tensor | None = None
        self.sources: list[torch.Tensor | None] = []
        """The outputs whose gradients come back; None where they lead nowhere."""
        self.output_grads: list[torch.Tensor | None] = []
        self.input_grads: dict[Kind, list[torch.Tensor | None]] = {}
        self.weight_part: WeightPart | None = None
        self.flight: Flight | None = None
        """The micro-batch that was here last."""

    @property
    def leaves(self) -> list[torch.Tensor]:
        """The inputs that need a gradient."""
        return [t for t in self.inputs if isinstance(t, torch.Tensor) and t.requires_grad]

    def fill(self, flight: Flight, inputs: Sequence[Any]) -> None:
        """Takes a micro-batch in, once what the last one gave has left."""
        self.settle()
        self.flight = flight
        with torch.no_grad():
            for own, given in tensor_pairs(self.inputs, inputs):
                own.copy_(given)
            for own, given in tensor_pairs(self.labels, flight.labels):
                own.copy_(given)
            for name, own in self.kwargs.items():
                if isinstance(own, torch.Tensor):
                    own.copy_(flight.kwargs[name])

    def settle(self) -> None:
        """Lets the stream wait until everything that was sent from here has been read."""
        if self.flight is not None:
            for departure in (self.flight.departure, self.flight.grad_departure):
                if departure is not None:
                    departure.done()


class Slots:
    """A stage's slots, and which micro-batch uses which."""

    def __init__(self, places: Mapping[int, int], slots: list[Slot]) -> None:
        self._places = places
        self._slots = slots

    def forward(self, flight: Flight, m: int, inputs: Sequence[Any]) -> Slot:
        """Replays F; the slot has the results."""
        slot = self._slots[self._places[m]]
        slot.fill(flight, inputs)
        slot.graphs[Kind.F].replay()
        return slot

    def backward(self, flight: Flight, m: int, kind: Kind) -> Sequence[torch.Tensor | None]:
        """Replays B or I; the gradients of the inputs."""
        slot = self._slots[self._places[m]]
        slot.settle()
        given = flight.output_grads
        for own, grad in zip(slot.output_grads, given, strict=bool(slot.output_grads)):
            if own is not None:
                own.zero_() if grad is None else own.copy_(grad)
        slot.graphs[kind].replay()
        return slot.input_grads[kind]

    def backward_weight(self, m: int) -> None:
        """Replays W."""
        self._slots[self._places[m]].graphs[Kind.W].replay()


def share_slots(
    computations: Iterable[Instruction], key: tuple[int, int]
) -> tuple[dict[int, int], list[set[Kind]]]:
    """Which slot each micro-batch of a stage uses, and which graphs each slot needs."""
    places: dict[int, int] = {}
    kinds: list[set[Kind]] = []
    free: list[int] = []
    for kind, stage, m, copy in computations:
        if (stage, copy) != key:
            continue
        plain = _OF_GRAPH.get(kind, kind)
        if plain == Kind.F:
            if not free:
                free.append(len(kinds))
                kinds.append(set())
            places[m] = free.pop()
        kinds[places[m]].add(plain)
        if kind in _ENDS:
            free.append(places[m])
    return places, kinds
