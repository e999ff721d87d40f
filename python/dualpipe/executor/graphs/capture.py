"""How a slot gets its graphs."""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, Any

import torch

from dualpipe.executor.boundary import as_outputs
from dualpipe.executor.graphs.slots import Slot
from dualpipe.instruction import Kind

if TYPE_CHECKING:
    from collections.abc import Callable

    from dualpipe.executor.graphs.likeness import Like
    from dualpipe.executor.graphs.stage import GraphedStage
    from dualpipe.executor.stage import Settings

__all__ = ["captured"]


def captured(stage: GraphedStage, like: Like, kinds: set[Kind], settings: Settings) -> Slot:
    """A slot with its graphs: F first, and from its autograd graph the others."""
    slot = Slot(like)
    pool = torch.cuda.graph_pool_handle()

    boundary = None if stage.is_last else stage.flights[0].boundary_out

    def forward() -> None:
        slot.outputs = as_outputs(stage.module(*slot.inputs, **slot.kwargs))
        if stage.is_last:
            if settings.criterion is not None:
                slot.loss = settings.criterion(*slot.outputs, *slot.labels)
            return
        # As the gradients come back: one for each place of the boundary, or of what goes on here.
        found = (
            [o for o in slot.outputs if o is not None and o.requires_grad]
            if boundary is None
            else [slot.outputs[at] for at in boundary.grad_places]
        )
        slot.sources = [o if o is not None and o.requires_grad else None for o in found]

    def roots_and_grads() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        if not stage.is_last:
            pairs = list(zip(slot.sources, slot.output_grads, strict=True))
            return [o for o, _ in pairs if o is not None], [g for _, g in pairs if g is not None]
        losses = [] if slot.loss is None or not slot.loss.requires_grad else [slot.loss]
        return losses, [stage.loss_grad(loss) for loss in losses]

    def backward() -> None:
        grads = stage.gradient.whole(*roots_and_grads(), slot.leaves, retain_graph=True)
        slot.input_grads[Kind.B] = grads

    def backward_input() -> None:
        slot.input_grads[Kind.I], slot.weight_part = stage.gradient.input_part(
            *roots_and_grads(), slot.leaves, retain_graph=True
        )

    def backward_weight() -> None:
        assert slot.weight_part is not None
        slot.weight_part.run()

    slot.graphs[Kind.F] = _graph_of(forward, pool)
    slot.output_grads = [None if o is None else torch.zeros_like(o) for o in slot.sources]
    if Kind.B in kinds:
        slot.graphs[Kind.B] = _graph_of(backward, pool)
    if Kind.I in kinds:
        slot.graphs[Kind.I] = _graph_of(backward_input, pool)
        slot.graphs[Kind.W] = _graph_of(backward_weight, pool)
    return slot


def _graph_of(work: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
    """The work as a graph; it is not run."""
    graph = torch.cuda.CUDAGraph()
    # Other threads (autograd's own, NCCL's watchdog) go on as they do.
    graph.capture_begin(pool, capture_error_mode="thread_local")
    try:
        work()
    except BaseException:
        # The capture is broken off, which raises as well; the first fault is the one to tell.
        with contextlib.suppress(RuntimeError):
            graph.capture_end()
        raise
    with warnings.catch_warnings():
        # A weight part that is left empty is a graph without nodes.
        warnings.simplefilter("ignore", UserWarning)
        graph.capture_end()
    return graph
