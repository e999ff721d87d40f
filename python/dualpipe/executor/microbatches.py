"""A rank's batch cut into micro-batches, and micro-batches put together again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dualpipe.errors import PipelineError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["MicroBatches", "merge", "signature", "split", "split_mapping"]


class MicroBatches(tuple[Any, ...]):
    """An input, label or keyword argument that is cut already: one value for each micro-batch."""

    __slots__ = ()


def split(
    values: Sequence[Any], num_micro_batches: int, batch_dim: int, argument: str
) -> list[tuple[Any, ...]]:
    """The positional values of each micro-batch.

    Tensors are cut along ``batch_dim`` into parts whose sizes differ by one at most, the longer
    ones first, as :func:`torch.tensor_split` cuts; None stays None.

    Raises:
        PipelineError: ``batch_size``, ``batch_dim``, ``not_a_tensor``.
    """
    if not values:
        return [()] * num_micro_batches
    columns = [
        _column(value, num_micro_batches, batch_dim, f"{argument}[{at}]", whole=False)
        for at, value in enumerate(values)
    ]
    return list(zip(*columns, strict=True))


def split_mapping(
    values: dict[str, Any], num_micro_batches: int, batch_dim: int
) -> list[dict[str, Any]]:
    """The keyword arguments of each micro-batch: tensors cut, anything else whole.

    Raises:
        PipelineError: As :func:`split`.
    """
    if not values:
        return [{}] * num_micro_batches
    columns = [
        _column(value, num_micro_batches, batch_dim, f"kwargs[{name!r}]", whole=True)
        for name, value in values.items()
    ]
    return [dict(zip(values, row, strict=True)) for row in zip(*columns, strict=True)]


def _column(
    value: Any, num_micro_batches: int, batch_dim: int, argument: str, *, whole: bool
) -> Sequence[Any]:
    if isinstance(value, MicroBatches):
        if len(value) != num_micro_batches:
            raise PipelineError(
                code="batch_size",
                argument=argument,
                got=f"{len(value)} micro-batches",
                expected=f"cut into {num_micro_batches}",
            )
        return value
    if not isinstance(value, torch.Tensor):
        if value is None or whole:
            return [value] * num_micro_batches
        raise PipelineError(
            code="not_a_tensor",
            argument=argument,
            got=type(value).__name__,
            expected="a tensor, None, or MicroBatches of anything",
        )
    if not -value.ndim <= batch_dim < value.ndim:
        raise PipelineError(
            code="batch_dim",
            argument=argument,
            got=f"shape {list(value.shape)}",
            expected=f"a tensor with dimension {batch_dim}, along which batches are cut",
            hint="MicroBatches takes values that are cut already",
        )
    if not num_micro_batches:
        if value.shape[batch_dim]:
            raise PipelineError(
                code="batch_size",
                argument=argument,
                got=f"{value.shape[batch_dim]} rows along dimension {batch_dim}",
                expected="None, since the schedule has no micro-batches here",
                hint="with an odd number, copies of the stages have different numbers of them",
            )
        return []
    if value.shape[batch_dim] < num_micro_batches:
        raise PipelineError(
            code="batch_size",
            argument=argument,
            got=f"{value.shape[batch_dim]} rows along dimension {batch_dim}",
            expected=f"at least one row for each of {num_micro_batches} micro-batches",
        )
    return value.tensor_split(num_micro_batches, dim=batch_dim)


def merge(
    micro_batches: Sequence[tuple[torch.Tensor | None, ...]], batch_dim: int
) -> torch.Tensor | tuple[torch.Tensor | None, ...]:
    """The outputs of all micro-batches in a row; a lone output without its tuple."""
    merged = tuple(_joined(column, batch_dim) for column in zip(*micro_batches, strict=True))
    return merged[0] if len(merged) == 1 else merged  # type: ignore[return-value]


def _joined(column: Sequence[torch.Tensor | None], batch_dim: int) -> torch.Tensor | None:
    tensors = [tensor for tensor in column if tensor is not None]
    if len(tensors) < len(column):
        return None
    if tensors[0].ndim == 0:
        return torch.stack(tensors)
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=batch_dim)


def signature(value: Any) -> Any:
    """What of a value decides the shapes that follow from it; hashable, comparable, pickles."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype, value.requires_grad
    if isinstance(value, (tuple, list)):
        return tuple(map(signature, value))
    if isinstance(value, dict):
        return tuple((name, signature(part)) for name, part in value.items())
    return (
        value if isinstance(value, (int, float, str, bytes, type(None))) else type(value).__name__
    )
