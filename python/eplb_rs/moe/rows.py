"""What a layer does with rows between exchanges: gather, multiply, activate, weigh, add.

Here in plain torch, to read and for every device. :mod:`eplb_rs.moe.kernels` has the same functions,
each a single kernel for GPUs.

Letters: T tokens, K experts of a token, N rows, H hidden size, I intermediate size, S slots; O and I
the height and width of a slot's matrix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable

    from eplb_rs.moe.experts import Groups

__all__ = [
    "Activation",
    "RowFunctions",
    "gated",
    "gated_backward",
    "gather",
    "outer",
    "product",
    "spread",
    "step",
    "weighted_sum",
]

Activation: TypeAlias = Literal["silu", "relu", "gelu"]


class RowFunctions(Protocol):
    """A module with the functions below."""

    def gather(self, rows_NH: Tensor, index: Tensor, *, gaps: bool, share: int = 1) -> Tensor: ...

    def weighted_sum(
        self, rows_NH: Tensor, place_TK: Tensor, gate_TK: Tensor | None, *, gaps: bool
    ) -> Tensor: ...

    def spread(
        self, grad_TH: Tensor, gate_TK: Tensor, rows_NH: Tensor, place_TK: Tensor, *, gaps: bool
    ) -> tuple[Tensor, Tensor]: ...

    def step(self, weight_SOI: Tensor) -> int: ...

    def product(
        self, rows: Tensor, weight_SOI: Tensor, groups: Groups, *, transposed: bool
    ) -> Tensor: ...

    def outer(self, left_NO: Tensor, right_NI: Tensor, groups: Groups) -> Tensor: ...

    def gated(self, inner: Tensor, activation: Activation) -> Tensor: ...

    def gated_backward(
        self, grad: Tensor, inner: Tensor, activation: Activation
    ) -> tuple[Tensor, Tensor]: ...


def gather(rows_NH: Tensor, index: Tensor, *, gaps: bool, share: int = 1) -> Tensor:
    """The rows at an index of any shape.

    Args:
        rows_NH: `[N, H]`.
        index: int64, each `share` times the row, or a little more.
        gaps: Whether some may point behind the last row: zeros are there.
        share: How many follow one another that mean the same row.
    """
    if share > 1:
        index = index // share
    if not gaps:
        return rows_NH[index]
    if len(rows_NH) == 0:
        return rows_NH.new_zeros(*index.shape, *rows_NH.shape[1:])
    behind = index >= len(rows_NH)
    found = rows_NH[index.clamp(max=len(rows_NH) - 1)]
    return found.masked_fill_(behind[..., None], 0)


def weighted_sum(
    rows_NH: Tensor, place_TK: Tensor, gate_TK: Tensor | None, *, gaps: bool
) -> Tensor:
    """Each token's rows times its gates, added first to last, whatever the size: the same bits
    everywhere.

    Args:
        rows_NH: `[N, H]`.
        place_TK: `[T, K]` int64, where each token's rows are.
        gate_TK: `[T, K]`; ``None`` counts all once.
        gaps: Whether some places may be behind the last row: they count nothing.

    Returns:
        `[T, H]`.
    """
    total: Tensor | None = None
    for k in range(place_TK.shape[1]):
        part = gather(rows_NH, place_TK[:, k], gaps=gaps)
        if gate_TK is not None:
            part = part * gate_TK[:, k : k + 1]
        total = part if total is None else total.add_(part)
    assert total is not None, "a token has one choice at least"
    return total


def spread(
    grad_TH: Tensor, gate_TK: Tensor, rows_NH: Tensor, place_TK: Tensor, *, gaps: bool
) -> tuple[Tensor, Tensor]:
    """The backward of :func:`weighted_sum`.

    Args:
        grad_TH: `[T, H]`, the gradient of the sums.
        gate_TK: `[T, K]`.
        rows_NH: `[N, H]`.
        place_TK: `[T, K]` int64.
        gaps: As there.

    Returns:
        `[N, H]`, the gradient of the rows, undefined where no token has a place; and `[T, K]`, of
        the gates.
    """
    gate_grad = torch.einsum("th,tkh->tk", grad_TH, gather(rows_NH, place_TK, gaps=gaps))
    # One row more takes what has no place.
    out = rows_NH.new_zeros(len(rows_NH) + 1, rows_NH.shape[1])
    out[place_TK.clamp(max=len(rows_NH))] = (grad_TH[:, None] * gate_TK[..., None]).to(out.dtype)
    return out[:-1], gate_grad


def step(weight_SOI: Tensor) -> int:
    """What each slot's rows should fill a multiple of, for :func:`product` and :func:`outer`."""
    del weight_SOI
    return 1


def product(rows: Tensor, weight_SOI: Tensor, groups: Groups, *, transposed: bool) -> Tensor:
    """Each row times its slot's matrix.

    Args:
        rows: `[N, I]` if transposed, else `[N, O]`, grouped by slot.
        weight_SOI: `[S, O, I]`.
        groups: Which rows belong to which slot.
        transposed: Whether rows are multiplied by the transposed matrices.

    Returns:
        `[N, O]` or `[N, I]`; undefined behind the last slot's rows.
    """
    right = weight_SOI.transpose(1, 2) if transposed else weight_SOI
    if _in_one(rows, *weight_SOI.shape[1:]):
        return _grouped_mm(rows, right, groups.end_S)
    out = rows.new_empty(len(rows), right.shape[2])
    begin = 0
    for matrix, size in zip(right, groups.known(), strict=True):
        if size:
            torch.mm(rows[begin : begin + size], matrix, out=out[begin : begin + size])
        begin += size
    return out


def outer(left_NO: Tensor, right_NI: Tensor, groups: Groups) -> Tensor:
    """For each slot, the sum over its rows of left times right: `[S, O, I]`, zeros for slots
    without rows."""
    if _in_one(left_NO, left_NO.shape[1], right_NI.shape[1]):
        return _grouped_mm(left_NO.t(), right_NI, groups.end_S)
    out = left_NO.new_zeros(len(groups.end_S), left_NO.shape[1], right_NI.shape[1])
    begin = 0
    for matrix, size in zip(out, groups.known(), strict=True):
        if size:
            end = begin + size
            torch.mm(left_NO[begin:end].t(), right_NI[begin:end], out=matrix)
        begin += size
    return out


def _in_one(rows: Tensor, *widths: int) -> bool:
    """Whether one grouped product serves all slots: on GPUs, where widths are whole 16 bytes."""
    on_device = rows.is_cuda and rows.dtype == torch.bfloat16
    return on_device and all(width % 8 == 0 for width in widths)


def _grouped_mm(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    grouped: Any = getattr(functional, "grouped_mm", None) or torch._grouped_mm  # before 2.10
    result: Tensor = grouped(left, right, offs=ends)
    return result


def gated(inner: Tensor, activation: Activation) -> Tensor:
    """`activation(gate) * up`.

    Args:
        inner: `[N, 2I]`, gate before up.
        activation: Of the gate.

    Returns:
        `[N, I]`.
    """
    gate, up = inner.chunk(2, dim=1)
    return _ACTIVATIONS[activation](gate) * up


def gated_backward(grad: Tensor, inner: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """The backward of :func:`gated`, and its forward again.

    Args:
        grad: `[N, I]`, the gradient of what it gave.
        inner: `[N, 2I]`.
        activation: Of the gate.

    Returns:
        What :func:`gated` gives, `[N, I]`; and the gradient of `inner`, `[N, 2I]`.
    """
    gate, up = inner.chunk(2, dim=1)
    activated = _ACTIVATIONS[activation](gate)
    grad_gate = _activation_backward(grad * up, gate, activation)
    return activated * up, torch.cat((grad_gate, grad * activated), dim=1)


_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "relu": functional.relu,
    "gelu": functional.gelu,
}


def _activation_backward(grad: Tensor, gate: Tensor, activation: Activation) -> Tensor:
    aten: Any = torch.ops.aten
    result: Tensor
    if activation == "silu":
        result = aten.silu_backward(grad, gate)
    elif activation == "relu":
        result = aten.threshold_backward(grad, gate, 0)
    else:
        result = aten.gelu_backward(grad, gate)
    return result
