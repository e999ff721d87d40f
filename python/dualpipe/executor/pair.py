"""An overlapped pair: the forward of one micro-batch and the backward of another, interleaved.

A module type says how by a hook, used where both stages of a pair are of that type:

- ``overlapped_forward_backward``, published with DualPipe, gets eight arguments;
- ``overlapped_forward_backward_streams`` gets an :class:`OverlappedPair`, which has the streams
  too, and the parts of the backward one by one. It is preferred where there are both.

Without a hook the forward runs first, and its result leaves before the backward starts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from dualpipe.executor.backward import WeightPart
    from dualpipe.executor.stage import Flight, Stage

__all__ = ["OverlappedPair", "Streams", "has_hook", "run_pair", "run_rest"]

_PUBLISHED = "overlapped_forward_backward"
_STREAMS = "overlapped_forward_backward_streams"


class Streams:
    """Streams beside the computing one, for hooks; None on a CPU."""

    def __init__(self, device: torch.device) -> None:
        def stream() -> torch.cuda.Stream | None:
            return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

        self.communication = stream()
        self.weight = stream()


class OverlappedPair:
    """What a hook with streams gets: a forward (0) and a whole backward (1) to interleave.

    The hook runs on the computing stream and returns ``(outputs0, loss0)``, as the published one.
    It must have brought the streams together: what is returned, and the inputs' gradients, are
    used by the computing stream.

    The backward is run by :meth:`backward`, or by :meth:`backward_input` and then, at a chosen
    place, :meth:`backward_weight`; or by the hook's own means from ``loss1`` or ``outputs1`` and
    ``output_grads1``. A weight part that the hook leaves alone runs once the pair's results are
    on their way.
    """

    def __init__(
        self,
        forward: Stage,
        flight0: Flight,
        inputs0: Sequence[Any],
        backward: Stage,
        flight1: Flight,
        streams: Streams,
    ) -> None:
        self.module0: nn.Module = forward.module
        self.inputs0 = inputs0
        self.kwargs0 = flight0.kwargs
        with_loss = forward.is_last and forward.settings.criterion is not None
        self.criterion0: Callable[..., torch.Tensor] | None = (
            forward.settings.criterion if with_loss else None
        )
        self.labels0: Sequence[Any] = flight0.labels if with_loss else []
        self.module1: nn.Module = backward.module
        self.inputs1 = flight1.inputs
        self.communication = streams.communication
        self.weight = streams.weight
        roots, grads = backward.roots_and_grads(flight1)
        self._roots, self._grads = roots, grads
        self.loss1: torch.Tensor | None = roots[0] if backward.is_last and roots else None
        self.outputs1: list[torch.Tensor] = [] if backward.is_last else roots
        self.output_grads1: list[torch.Tensor] = [] if backward.is_last else grads
        self._behind = backward
        self._leaves = flight1.leaves
        self._input_grads: Sequence[torch.Tensor | None] | None = None
        self.weight_part: WeightPart | None = None
        """What is still to run of the backward."""

    def forward(self) -> tuple[Any, torch.Tensor | None]:
        """The whole forward: ``(outputs0, loss0)``."""
        outputs = self.module0(*self.inputs0, **self.kwargs0)
        if self.criterion0 is None:
            return outputs, None
        parts = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        return outputs, self.criterion0(*parts, *self.labels0)

    def backward(self) -> None:
        """The whole backward."""
        gradient = self._behind.gradient
        self._input_grads = gradient.whole(self._roots, self._grads, self._leaves)

    def backward_input(self) -> None:
        """The backward for the input only."""
        self._input_grads, self.weight_part = self._behind.input_part(
            self._roots, self._grads, self._leaves
        )

    def backward_weight(self) -> None:
        """The backward for the weights, on the current stream; after :meth:`backward_input`."""
        weight_part, self.weight_part = self.weight_part, None
        if weight_part is not None:
            weight_part.run()

    def input_grads(self) -> Sequence[torch.Tensor | None]:
        """The inputs' gradients, by whatever means they were computed."""
        if self._input_grads is None:
            self._input_grads = [leaf.grad for leaf in self._leaves]
            for leaf in self._leaves:
                leaf.grad = None
        return self._input_grads


def has_hook(forward: Stage, backward: Stage) -> bool:
    """Whether a module type says how to interleave these two."""
    kind = type(forward.module)
    return kind is type(backward.module) and (hasattr(kind, _STREAMS) or hasattr(kind, _PUBLISHED))


def run_pair(forward: Stage, m0: int, backward: Stage, m1: int, streams: Streams) -> None:
    """Runs the hook of the two stages' type."""
    flight0, flight1 = forward.flights[m0], backward.flights[m1]
    inputs0 = forward.open(flight0, m0)
    pair = OverlappedPair(forward, flight0, inputs0, backward, flight1, streams)
    kind: Any = type(forward.module)
    if hasattr(kind, _STREAMS):
        outputs0, loss0 = getattr(kind, _STREAMS)(pair)
    elif flight0.kwargs:
        # The eight published arguments have no place for them.
        outputs0, loss0 = pair.forward()
        pair.backward()
    else:
        scale = backward.settings.loss_scale
        loss1 = pair.loss1 if pair.loss1 is None or scale == 1 else pair.loss1 * scale
        outputs0, loss0 = getattr(kind, _PUBLISHED)(
            pair.module0,
            inputs0,
            pair.criterion0,
            pair.labels0,
            pair.module1,
            loss1,
            pair.outputs1,
            pair.output_grads1,
        )
    forward.close(flight0, m0, outputs0, loss0)
    flight1.input_grads = pair.input_grads()
    flight1.weight_part = pair.weight_part
    backward.hand_back(flight1, m1)
    if flight1.weight_part is None:
        backward.free(flight1)


def run_rest(backward: Stage, m1: int) -> None:
    """Runs the weight part that a hook has left alone."""
    if backward.flights[m1].weight_part is not None:
        backward.backward_weight(m1)
