"""What a step gives to its caller."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from dualpipe.executor.microbatches import merge

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dualpipe.executor.plan import Batch
    from dualpipe.executor.stage import Settings, Stage

__all__ = ["StepResult", "result_of"]


class StepResult(NamedTuple):
    """What a step gives to a rank."""

    losses: torch.Tensor | None
    """The losses of the micro-batches whose last stage is on this rank, in their order, `[M]` or
    a copy's part of it, free of the graph; None without a criterion or a last stage."""
    outputs: torch.Tensor | tuple[torch.Tensor | None, ...] | None
    """Their outputs, put together along the batch dimension; a tuple if the stage returns one."""


def result_of(
    stages: Iterable[Stage], batch: Batch, settings: Settings, batch_dim: int
) -> StepResult:
    """Collects what a rank's stages have left of a step; the caller's inputs get gradients."""
    stages = list(stages)
    last = [stage for stage in stages if stage.is_last]
    losses = [loss.detach() for s in last for loss in s.losses if loss is not None]
    if settings.training:
        first = (stage for stage in stages if stage.is_first)
        batch.give_back([grad for s in first for grads in s.given_grads for grad in grads])
    outputs = None
    results = [result for stage in last for result in stage.results]
    if results and settings.return_outputs:
        outputs = merge(results, batch_dim)
    return StepResult(torch.stack(losses) if losses else None, outputs)
