"""What a step needs to know before its first transfer: the rank's micro-batches, the boundaries."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dualpipe.errors import PipelineError
from dualpipe.executor.boundary import Boundary, dry_forward
from dualpipe.executor.microbatches import signature, split, split_mapping
from dualpipe.executor.stage import Flight

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dualpipe.executor.stage import Stage
    from dualpipe.executor.stream import Stream
    from dualpipe.schedule import Schedule

__all__ = ["Batch", "Plan", "find_boundaries"]


@dataclass
class Plan:
    """What stays the same while shapes do."""

    schedule: Schedule
    """With transfers; forwards only for inference."""
    boundaries: Mapping[tuple[int, int], Sequence[Boundary]]
    """Of each copy's micro-batches, `[S - 1]`; none where nothing crosses ranks."""
    streams: dict[bool, Stream] = field(default_factory=dict)
    """The rank's stream, without and with the reduction of copies' gradients."""

    def flights(self, stage: Stage, batch: Batch) -> list[Flight]:
        """The micro-batches of a step on one of the rank's stages."""
        index, copy = stage.index, stage.copy
        flights = []
        for m, kwargs in enumerate(batch.kwargs[index, copy]):
            boundaries = self.boundaries[copy, m]
            crosses_in = not stage.is_first and stage.previous is None
            crosses_out = not stage.is_last and stage.next is None
            flight = Flight(
                kwargs,
                boundaries[index - 1] if crosses_in else None,
                boundaries[index] if crosses_out else None,
            )
            if stage.is_first:
                flight.inputs = batch.inputs[copy][m]
            if stage.is_last and batch.labels:
                flight.labels = batch.labels[copy][m]
            flights.append(flight)
        return flights


class Batch:
    """One rank's inputs, labels and keyword arguments, cut into micro-batches.

    Args:
        stages: The rank's stages.
        counts: The micro-batches of each copy, `[C]`.
        batch_dim: Along which dimension tensors are cut.
        inputs: Of all copies that enter here, in a row.
        labels: Of all copies that leave here, in a row.
        kwargs: For all stages, or by stage or by stage and copy.

    Raises:
        PipelineError: ``inputs``, ``labels``, ``kwargs``, ``batch_size``, ``batch_dim``,
            ``not_a_tensor``.
    """

    def __init__(
        self,
        stages: Mapping[tuple[int, int], Stage],
        counts: Sequence[int],
        batch_dim: int,
        *,
        inputs: Sequence[Any],
        labels: Sequence[Any],
        kwargs: Mapping[Any, Any],
    ) -> None:
        first = [stage.copy for stage in stages.values() if stage.is_first]
        last = [stage.copy for stage in stages.values() if stage.is_last]
        given = any(value is not None for value in inputs)
        if given and not first:
            raise PipelineError(
                code="inputs",
                argument="inputs",
                got=f"{len(inputs)} inputs on a rank without a first stage",
                expected="none, or None",
            )
        if not isinstance(labels, (list, tuple)):
            raise PipelineError(
                code="labels",
                argument="labels",
                got=type(labels).__name__,
                expected="a list of labels",
                hint="one label is [label]",
            )
        self.sources: list[torch.Tensor] = []
        """Parts of inputs that get a gradient, in the order of copies and micro-batches."""
        self.inputs: dict[int, list[tuple[Any, ...]]] = {
            copy: [tuple(map(self._leaf, part)) for part in parts]
            for copy, parts in _by_copy(inputs, first, counts, batch_dim, "inputs").items()
        }
        self.labels = _by_copy(labels, last, counts, batch_dim, "labels") if last else {}
        self.kwargs = {
            key: split_mapping(_kwargs_of(key, kwargs), counts[key[1]], batch_dim) for key in stages
        }

        entering = [copy for copy in first if counts[copy]]
        if not given and any(not any(self.kwargs[0, copy]) for copy in entering):
            raise PipelineError(
                code="inputs",
                argument="inputs",
                got="none on a rank with the first stage",
                expected="those of the micro-batches that enter here",
            )

    def _leaf(self, part: Any) -> Any:
        """Cuts the caller's graph off, so that a backward ends at the first stage's input."""
        if isinstance(part, torch.Tensor) and part.requires_grad and torch.is_grad_enabled():
            self.sources.append(part)
            return part.detach().requires_grad_()
        return part

    def give_back(self, grads: Sequence[torch.Tensor | None]) -> None:
        """Continues the backward into the caller's graph, once for all micro-batches."""
        pairs = [p for p in zip(self.sources, grads, strict=True) if p[1] is not None]
        if pairs:
            sources, found = zip(*pairs, strict=True)
            torch.autograd.backward(sources, found)

    def signatures(self) -> dict[tuple[int, int], Any]:
        """What decides the boundaries, of every copy's micro-batches as far as seen from here."""
        found: dict[tuple[int, int], Any] = {}
        for (stage, copy), rows in self.kwargs.items():
            for m, kwargs in enumerate(rows):
                inputs = self.inputs[copy][m] if stage == 0 else None
                found.setdefault((copy, m), []).append(
                    (stage, signature(inputs), signature(kwargs))
                )
        return {key: tuple(parts) for key, parts in found.items()}


def _by_copy(
    values: Sequence[Any], copies: list[int], counts: Sequence[int], batch_dim: int, argument: str
) -> dict[int, list[tuple[Any, ...]]]:
    if not copies:
        return {}
    rows = split(values, sum(counts[copy] for copy in copies), batch_dim, argument)
    found = {}
    for copy in copies:
        found[copy], rows = rows[: counts[copy]], rows[counts[copy] :]
    return found


def _kwargs_of(key: tuple[int, int], kwargs: Mapping[Any, Any]) -> dict[str, Any]:
    if all(isinstance(name, str) for name in kwargs):
        return dict(kwargs)
    for place in (key, key[0]):
        if place in kwargs:
            return dict(kwargs[place])
    if any(isinstance(name, str) for name in kwargs):
        raise PipelineError(
            code="kwargs",
            argument="kwargs",
            got=f"keys {list(kwargs)}",
            expected="names only, or stages (or pairs of stage and copy) only",
        )
    return {}


def find_boundaries(
    stages: Mapping[tuple[int, int], Stage],
    placement: Sequence[Sequence[int]],
    batch: Batch,
    exchange: Callable[[Any], list[Any]],
    device: torch.device,
    *,
    training: bool,
) -> dict[tuple[int, int], tuple[Boundary, ...]]:
    """Runs one forward of every kind of micro-batch through all stages, rank by rank, on zeros.

    Args:
        stages: The rank's stages.
        placement: The rank of every copy of every stage, `[C, S]`.
        batch: The rank's micro-batches.
        exchange: Gives what every pipeline rank gave; raises where one gave an exception.
        device: Where stages' inputs live.
        training: Whether gradients come back.

    Cost: S forwards one after the other for every kind of micro-batch, and S exchanges.
    """
    every = exchange(batch.signatures())
    rows: dict[tuple[int, int], list[Any]] = {}
    for signatures in every:
        for key, parts in signatures.items():
            rows.setdefault(key, []).append(parts)
    # Copies are equal, so what a micro-batch is like matters and not which copy it is of.
    kinds: dict[Any, tuple[Boundary, ...]] = {}
    found = {}
    for (copy, m), parts in sorted(rows.items()):
        kind = tuple(sorted((part for row in parts for part in row), key=lambda part: part[0]))
        if kind not in kinds:
            kinds[kind] = _chain(
                stages, placement[copy], copy, m, batch, exchange, device, training=training
            )
        found[copy, m] = kinds[kind]
    return found


def _chain(
    stages: Mapping[tuple[int, int], Stage],
    ranks: Sequence[int],
    copy: int,
    m: int,
    batch: Batch,
    exchange: Callable[[Any], list[Any]],
    device: torch.device,
    *,
    training: bool,
) -> tuple[Boundary, ...]:
    boundaries: list[Boundary] = []
    for index, rank in enumerate(ranks[:-1]):
        stage = stages.get((index, copy))
        own: Boundary | PipelineError | None = None
        cause: Exception | None = None
        if stage is not None:
            inputs = batch.inputs[copy][m] if index == 0 else _zeros(boundaries[-1], device)
            try:
                kwargs = batch.kwargs[index, copy][m]
                own = dry_forward(stage.module, inputs, kwargs, training=training)
            except PipelineError as error:
                own = error
            except Exception as error:
                cause = error
                own = PipelineError(
                    code="dry_forward",
                    argument="stages",
                    got=f"stage {index} raised {type(error).__name__}: {error}",
                    expected="a forward that runs on zeros of its input's shape",
                    hint="or give `boundaries`, and none is needed",
                )
        try:
            boundaries.append(exchange(own)[rank])
        except PipelineError as error:
            raise error from cause
    return tuple(boundaries)


def _zeros(boundary: Boundary, device: torch.device) -> list[torch.Tensor | None]:
    return [
        None
        if spec is None
        else torch.zeros(spec.shape, dtype=spec.dtype, device=device).requires_grad_(
            at in boundary.grad_places
        )
        for at, spec in enumerate(boundary.tensors)
    ]
