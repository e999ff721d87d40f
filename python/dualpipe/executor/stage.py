"""One copy of one stage: what it keeps of each micro-batch, and how it computes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import get_gradient_edge

from dualpipe.errors import PipelineError
from dualpipe.executor.backward import StageBackward
from dualpipe.executor.boundary import Boundary, as_outputs
from dualpipe.executor.seeds import seed_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from dualpipe.executor.backward import WeightPart
    from dualpipe.executor.transport.base import Arrival, Departure, Message, Transport

__all__ = ["Flight", "Settings", "Stage"]


@dataclass
class Settings:
    """What holds for all stages of a rank during one step."""

    training: bool
    criterion: Callable[..., torch.Tensor] | None
    loss_scale: float
    return_outputs: bool
    seed: tuple[int, int] | None
    """The executor's seed and the number of the step."""


class Flight:
    """One micro-batch on one stage, from its arrival to the end of its backward."""

    __slots__ = (
        "arrival",
        "boundary_in",
        "boundary_out",
        "departure",
        "grad_arrival",
        "grad_departure",
        "input_grads",
        "inputs",
        "kwargs",
        "labels",
        "leaves",
        "loss",
        "output_grads",
        "outputs",
        "roots",
        "weight_part",
    )

    def __init__(
        self,
        kwargs: dict[str, Any],
        boundary_in: Boundary | None,
        boundary_out: Boundary | None,
    ) -> None:
        self.kwargs = kwargs
        self.boundary_in = boundary_in
        self.boundary_out = boundary_out
        self.labels: Sequence[Any] = ()
        self.arrival: Arrival | None = None
        self.inputs: Sequence[Any] = ()
        self.leaves: list[torch.Tensor] = []
        """Those of the inputs that need a gradient."""
        self.outputs: Sequence[torch.Tensor | None] = ()
        self.departure: Departure | None = None
        self.loss: torch.Tensor | None = None
        """Free of the graph."""
        # What the backward starts from: gradient edges, which hold no tensor, so that the memory
        # of an output is free once it has been sent; for a pair's hook the tensors themselves.
        self.roots: Sequence[Any] = ()
        self.grad_arrival: Arrival | None = None
        self.output_grads: Sequence[torch.Tensor | None] = ()
        self.input_grads: Sequence[torch.Tensor | None] = ()
        self.grad_departure: Departure | None = None
        self.weight_part: WeightPart | None = None


class Stage:
    """A module as one stage of a pipeline, on one of its copies."""

    def __init__(self, module: nn.Module, index: int, copy: int, num_stages: int) -> None:
        self.module = module
        self.index = index
        self.copy = copy
        self.is_first = index == 0
        self.is_last = index == num_stages - 1
        self.previous: Stage | None = None
        """The stage before, where it is on the same rank."""
        self.next: Stage | None = None
        """Likewise the stage behind."""
        self.keeps_outputs = False
        """Whether a pair's hook will ask for outputs."""
        self.gradient = StageBackward()
        self.not_left: dict[str, int] = {}
        """Why weight parts were not left by I, or not all of them, and how often."""
        self.flights: list[Flight] = []
        self.losses: list[torch.Tensor | None] = []
        self.results: list[tuple[torch.Tensor | None, ...]] = []
        self.given_grads: list[Sequence[torch.Tensor | None]] = []

    @cached_property
    def modules(self) -> list[nn.Module]:
        """The stage's module and all that are in it."""
        return list(self.module.modules())

    def begin(self, settings: Settings, flights: list[Flight], first_micro_batch: int) -> None:
        """Starts a step with these micro-batches."""
        self.settings = settings
        self.flights = flights
        self.first_micro_batch = first_micro_batch
        count = len(flights)
        self.losses = [None] * count if self.is_last else []
        self.results = [()] * count if self.is_last else []
        self.given_grads = [()] * count if self.is_first else []

    def reset(self) -> None:
        """Drops everything that a step holds."""
        self.flights = []
        self.losses = []
        self.results = []
        self.given_grads = []

    # What the instructions do

    def forward(self, m: int) -> None:
        """F."""
        flight = self.flights[m]
        inputs = self.open(flight, m)
        self.close(flight, m, self.module(*inputs, **flight.kwargs))

    def backward(self, m: int) -> None:
        """B."""
        flight = self.flights[m]
        roots, grads = self.roots_and_grads(flight)
        flight.input_grads = self.gradient.whole(roots, grads, flight.leaves)
        self.hand_back(flight, m)
        self.free(flight)

    def backward_input(self, m: int) -> None:
        """I."""
        flight = self.flights[m]
        roots, grads = self.roots_and_grads(flight)
        flight.input_grads, flight.weight_part = self.input_part(roots, grads, flight.leaves)
        self.hand_back(flight, m)

    def backward_weight(self, m: int) -> None:
        """W."""
        flight = self.flights[m]
        assert flight.weight_part is not None
        flight.weight_part.run()
        flight.weight_part = None
        self.free(flight)

    def receive_forward(self, transport: Transport, peer: int, message: Message) -> None:
        """RECV_F."""
        flight = self.flights[message.micro_batch]
        assert flight.boundary_in is not None
        flight.arrival = transport.post_receive(peer, message, flight.boundary_in.activations)

    def send_forward(self, transport: Transport, peer: int, message: Message) -> None:
        """SEND_F."""
        flight = self.flights[message.micro_batch]
        assert flight.boundary_out is not None
        flight.boundary_out.check(flight.outputs)
        outputs = [output for output in flight.outputs if output is not None]
        flight.departure = transport.send(peer, message, outputs)
        flight.outputs = ()

    def wait_send_forward(self, m: int) -> None:
        """WAIT_SEND_F."""
        flight = self.flights[m]
        assert flight.departure is not None
        flight.departure.done()
        flight.departure = None
        if not self.settings.training:
            self.free(flight)
        elif self.keeps_outputs:
            for root in flight.roots:
                _forget_content(root)

    def receive_backward(self, transport: Transport, peer: int, message: Message) -> None:
        """RECV_B."""
        flight = self.flights[message.micro_batch]
        assert flight.boundary_out is not None
        flight.grad_arrival = transport.post_receive(peer, message, flight.boundary_out.gradients)

    def send_backward(self, transport: Transport, peer: int, message: Message) -> None:
        """SEND_B."""
        flight = self.flights[message.micro_batch]
        assert flight.boundary_in is not None
        grads = [
            torch.zeros(spec.shape, dtype=spec.dtype, device=transport.device)
            if grad is None
            else grad
            for grad, spec in zip(flight.input_grads, flight.boundary_in.gradients, strict=True)
        ]
        flight.grad_departure = transport.send(peer, message, grads)
        flight.input_grads = ()

    def wait_send_backward(self, m: int) -> None:
        """WAIT_SEND_B."""
        flight = self.flights[m]
        assert flight.grad_departure is not None
        flight.grad_departure.done()
        flight.grad_departure = None

    # Their parts, which a pair's hook needs one by one

    def open(self, flight: Flight, m: int) -> Sequence[Any]:
        """The inputs of the forward, when they are there; seeds it."""
        if flight.arrival is not None:
            assert flight.boundary_in is not None
            arrived = iter(flight.arrival.ready())
            inputs = [None if s is None else next(arrived) for s in flight.boundary_in.tensors]
            if self.settings.training:
                for place in flight.boundary_in.grad_places:
                    tensor = inputs[place]
                    assert tensor is not None
                    tensor.requires_grad_()
            flight.inputs = inputs
        if self.settings.training:
            flight.leaves = [
                given
                for given in flight.inputs
                if isinstance(given, torch.Tensor) and given.requires_grad
            ]
        if self.settings.seed is not None:
            micro_batch = self.first_micro_batch + m
            torch.manual_seed(seed_of(*self.settings.seed, self.index, micro_batch))
        return flight.inputs

    def close(
        self, flight: Flight, m: int, returned: Any, loss: torch.Tensor | None = None
    ) -> None:
        """Keeps what the forward returned, or hands it over; computes a loss that is not given."""
        outputs = as_outputs(returned)
        if self.is_last:
            self._close_last(flight, m, outputs, loss)
        elif self.next is not None:
            self._hand_over(flight, m, outputs)
        else:
            assert flight.boundary_out is not None
            flight.outputs = outputs
            if self.settings.training:
                self._keep_roots(flight, [outputs[at] for at in flight.boundary_out.grad_places])

    def _close_last(
        self,
        flight: Flight,
        m: int,
        outputs: tuple[torch.Tensor | None, ...],
        loss: Any,
    ) -> None:
        settings = self.settings
        if settings.criterion is not None:
            if loss is None:
                loss = settings.criterion(*outputs, *flight.labels)
            if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
                raise PipelineError(
                    code="criterion",
                    argument="criterion",
                    got=f"a loss of {_kind_of(loss)}",
                    expected="a function that returns a tensor with one element",
                )
            # A copy: a mean may lie at the start of all the memory that it is the mean of.
            flight.loss = self.losses[m] = loss.detach().clone()
        if settings.return_outputs:
            self.results[m] = _apart(outputs, flight.inputs)
        if settings.training:
            assert loss is not None
            flight.roots = ()
            if loss.requires_grad:
                flight.roots = (loss if self.keeps_outputs else get_gradient_edge(loss),)
        else:
            self.free(flight)

    def _hand_over(self, flight: Flight, m: int, outputs: tuple[torch.Tensor | None, ...]) -> None:
        assert self.next is not None
        if self.settings.training:
            self.next.flights[m].inputs = [
                None if o is None else o.detach().requires_grad_(o.requires_grad) for o in outputs
            ]
            self._keep_roots(flight, [o for o in outputs if o is not None and o.requires_grad])
        else:
            self.next.flights[m].inputs = _apart(outputs, flight.inputs)
            self.free(flight)

    def _keep_roots(self, flight: Flight, outputs: list[torch.Tensor | None]) -> None:
        make = _alias if self.keeps_outputs else get_gradient_edge
        flight.roots = [make(o) if o is not None and o.requires_grad else None for o in outputs]

    def roots_and_grads(self, flight: Flight) -> tuple[list[Any], list[torch.Tensor]]:
        """What the backward starts from, when the gradients are there."""
        if self.is_last:
            return list(flight.roots), [self.loss_grad(flight.loss) for _ in flight.roots]
        if flight.grad_arrival is not None:
            flight.output_grads = flight.grad_arrival.ready()
        roots, grads = [], []
        for root, grad in zip(flight.roots, flight.output_grads, strict=True):
            if root is not None and grad is not None:
                roots.append(root)
                grads.append(grad)
        return roots, grads

    def input_part(
        self, roots: list[Any], grads: list[torch.Tensor], leaves: list[torch.Tensor]
    ) -> tuple[Sequence[torch.Tensor | None], WeightPart]:
        """The inputs' gradients, and what is left for W."""
        input_grads, weight_part = self.gradient.input_part(roots, grads, leaves)
        if weight_part.why is not None:
            self.not_left[weight_part.why] = self.not_left.get(weight_part.why, 0) + 1
        return input_grads, weight_part

    def loss_grad(self, loss: torch.Tensor | None) -> torch.Tensor:
        """The gradient of a loss."""
        assert loss is not None
        return torch.full_like(loss, self.settings.loss_scale)

    def hand_back(self, flight: Flight, m: int) -> None:
        """Passes the inputs' gradients on, or keeps them until they are sent."""
        if flight.boundary_in is not None:
            return
        if self.previous is not None:
            self.previous.flights[m].output_grads = flight.input_grads
        else:
            self.given_grads[m] = flight.input_grads
        flight.input_grads = ()

    def free(self, flight: Flight) -> None:
        """Lets go of what the micro-batch held; all work that reads it has been started."""
        flight.inputs = flight.roots = flight.output_grads = flight.labels = ()
        flight.leaves = []
        flight.kwargs = {}
        if flight.arrival is not None:
            flight.arrival.release()
            flight.arrival = None
        if flight.grad_arrival is not None:
            flight.grad_arrival.release()
            flight.grad_arrival = None


def _alias(output: torch.Tensor) -> torch.Tensor:
    """The same output as a tensor of its own, whose content can be dropped alone."""
    alias: torch.Tensor = torch.ops.aten._unsafe_view(output, output.shape)
    return alias


def _forget_content(alias: torch.Tensor | None) -> None:
    """Frees the memory of an output that has been sent, where the graph has not saved it."""
    if alias is not None:
        alias.data = torch.empty(0, dtype=alias.dtype, device=alias.device)


def _apart(
    outputs: Sequence[torch.Tensor | None], inputs: Sequence[Any]
) -> tuple[torch.Tensor | None, ...]:
    """Outputs free of the graph and of the inputs, whose buffers may be another message's soon."""
    taken = {_storage(given) for given in inputs if isinstance(given, torch.Tensor)}
    detached = [None if output is None else output.detach() for output in outputs]
    return tuple(o.clone() if o is not None and _storage(o) in taken else o for o in detached)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _kind_of(loss: Any) -> str:
    return f"shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
