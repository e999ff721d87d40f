"""The published setters of what crosses from stage to stage, as ``dualpipe.comm`` had them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dualpipe.errors import PipelineError
from dualpipe.executor.transport.base import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

__all__ = ["set_p2p_tensor_dtype", "set_p2p_tensor_shapes"]

TENSOR_SHAPES: list[tuple[int, ...]] | None = None
TENSOR_DTYPE: torch.dtype | None = None


def set_p2p_tensor_shapes(shapes: Sequence[Sequence[int]] | None) -> None:
    """Sets the shapes of the tensors that one stage hands to the next for one micro-batch.

    A default for the whole process, read by :class:`~dualpipe.DualPipe` and
    :class:`~dualpipe.DualPipeV` at the start of each step. Where it is not set, or None, they
    find the shapes out.
    """
    global TENSOR_SHAPES  # noqa: PLW0603 - published so
    TENSOR_SHAPES = None if shapes is None else [tuple(shape) for shape in shapes]


def set_p2p_tensor_dtype(dtype: torch.dtype | None) -> None:
    """Sets the dtype of those tensors."""
    global TENSOR_DTYPE  # noqa: PLW0603 - published so
    TENSOR_DTYPE = dtype


def given_specs() -> list[TensorSpec] | None:
    """What was set; None where nothing was.

    Raises:
        PipelineError: ``boundaries`` where only one of the two was set.
    """
    if TENSOR_SHAPES is None and TENSOR_DTYPE is None:
        return None
    if TENSOR_SHAPES is None or TENSOR_DTYPE is None:
        raise PipelineError(
            code="boundaries",
            argument="set_p2p_tensor_shapes, set_p2p_tensor_dtype",
            got="one of them",
            expected="both called before a step, or neither",
        )
    return [TensorSpec(shape, TENSOR_DTYPE) for shape in TENSOR_SHAPES]
