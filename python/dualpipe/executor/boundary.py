"""What crosses from one stage to the next: given, or found out by a dry forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dualpipe.errors import PipelineError
from dualpipe.executor.buffers import Buffers
from dualpipe.executor.transport.base import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Boundary", "as_outputs", "dry_forward", "given_boundaries"]


@dataclass(frozen=True)
class Boundary:
    """The tensors that a stage hands to the next one for one micro-batch."""

    tensors: tuple[TensorSpec | None, ...]
    """One for each output of the stage; None where the stage gives None."""
    grad_places: tuple[int, ...]
    """Which of them get a gradient back."""

    @property
    def activations(self) -> tuple[TensorSpec, ...]:
        """What is sent forward."""
        return tuple(spec for spec in self.tensors if spec is not None)

    @property
    def gradients(self) -> tuple[TensorSpec, ...]:
        """What is sent back."""
        return tuple(spec for at in self.grad_places if (spec := self.tensors[at]) is not None)

    @classmethod
    def of(cls, outputs: Sequence[torch.Tensor | None]) -> Boundary:
        """The boundary that these outputs cross."""
        return cls(
            tuple(None if o is None else TensorSpec(tuple(o.shape), o.dtype) for o in outputs),
            tuple(at for at, o in enumerate(outputs) if o is not None and o.requires_grad),
        )

    def check(self, outputs: Sequence[torch.Tensor | None]) -> None:
        """Refuses outputs that the receiver has no buffers for.

        Raises:
            PipelineError: ``boundary``.
        """
        if len(outputs) == len(self.tensors):
            for output, spec in zip(outputs, self.tensors, strict=True):
                if output is None or spec is None:
                    if (output is None) != (spec is None):
                        break
                elif output.shape != spec.shape or output.dtype != spec.dtype:
                    break
            else:
                return
        raise PipelineError(
            code="boundary",
            argument="module",
            got=f"outputs {_text(Boundary.of(outputs).tensors)}",
            expected=f"one that gives {_text(self.tensors)} for this micro-batch",
            hint="shapes that do not follow from those of the inputs cannot cross ranks; "
            "with `boundaries` or set_p2p_tensor_shapes, give those that the stages have",
        )


def _text(tensors: Sequence[TensorSpec | None]) -> str:
    parts = (
        "None" if spec is None else f"{list(spec.shape)} {str(spec.dtype).removeprefix('torch.')}"
        for spec in tensors
    )
    return f"({', '.join(parts)})"


def as_outputs(outputs: Any) -> tuple[torch.Tensor | None, ...]:
    """What a module returned, as a tuple.

    Raises:
        PipelineError: ``module_output``.
    """
    if isinstance(outputs, torch.Tensor):
        return (outputs,)
    if isinstance(outputs, (tuple, list)) and all(
        part is None or isinstance(part, torch.Tensor) for part in outputs
    ):
        return tuple(outputs)
    raise PipelineError(
        code="module_output",
        argument="module",
        got=f"an output of type {type(outputs).__name__}",
        expected="a stage that returns a tensor, or a tuple or list of tensors and None",
    )


def given_boundaries(boundaries: Any, num_stages: int, *, training: bool) -> list[Boundary]:
    """The boundaries that a caller has given: one list of specs for all, or one for each.

    Raises:
        PipelineError: ``boundaries``.
    """
    try:
        every = list(boundaries)
        if all(isinstance(spec, TensorSpec) for spec in every):
            every = [every] * (num_stages - 1)
        rows = [[TensorSpec(tuple(shape), dtype) for shape, dtype in row] for row in every]
    except (TypeError, ValueError) as error:
        raise _refused(boundaries, num_stages) from error
    whole = all(isinstance(spec.dtype, torch.dtype) for row in rows for spec in row)
    if len(rows) != num_stages - 1 or not whole:
        raise _refused(boundaries, num_stages)
    return [
        Boundary(
            tuple(row),
            tuple(
                at
                for at, spec in enumerate(row)
                if training and (spec.dtype.is_floating_point or spec.dtype.is_complex)
            ),
        )
        for row in rows
    ]


def _refused(boundaries: Any, num_stages: int) -> PipelineError:
    return PipelineError(
        code="boundaries",
        argument="boundaries",
        got=repr(boundaries),
        expected="TensorSpecs for all boundaries, or a list of TensorSpecs for each of the "
        f"{num_stages - 1} boundaries",
    )


def dry_forward(
    module: nn.Module, inputs: Sequence[Any], kwargs: dict[str, Any], *, training: bool
) -> Boundary:
    """Runs a stage once to see what it returns.

    Tensors among its arguments, buffers and the state of the random generators are as they were
    afterwards; forward hooks fire, and what else a module changes in its forward stays changed.
    """
    buffers = Buffers.of([module])
    given = [_copy(value) for value in inputs]
    named = {name: _copy(value) for name, value in kwargs.items()}
    try:
        with torch.random.fork_rng(_generators()), torch.set_grad_enabled(training):
            return Boundary.of(as_outputs(module(*given, **named)))
    finally:
        buffers.restore()


def _copy(value: Any) -> Any:
    """A tensor that a module may write into."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def _generators() -> list[int]:
    """The GPU whose random generator a forward may use, beside the CPU's."""
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return [torch.cuda.current_device()] if started else []
