"""The computation of experts, grouped by slot: a gated feed-forward, forward and backward.

Its backward has two parts that may run at different times: one for the rows, which others wait for,
and one for the weights.

Letters: N rows on this rank, S slots, H hidden size, I intermediate size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from eplb_rs.moe.rows import Activation, RowFunctions

__all__ = ["ExpertsBackward", "Groups", "experts_backward", "experts_forward"]


@dataclass(frozen=True, slots=True)
class Groups:
    """Which rows belong to which slot: those of a slot lie together, slots in order.

    Attributes:
        end_S: `[S]` int32, on the device: where each slot's rows end.
        sizes: The same as sizes on the host; ``None`` where the host does not know.
        multiple: Each slot's rows fill a multiple of this, with zeros.
        kept: What kernels have worked out of it, for their next call.
    """

    end_S: Tensor
    sizes: Sequence[int] | None
    multiple: int = 1
    kept: dict[str, Tensor] = field(default_factory=dict)

    def known(self) -> list[int]:
        """The sizes; waits for the device if the host does not know them."""
        if self.sizes is not None:
            return list(self.sizes)
        ends: list[int] = self.end_S.tolist()
        return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


def experts_forward(
    rows_NH: Tensor,
    gate_up: Tensor,
    down: Tensor,
    groups: Groups,
    rows: RowFunctions,
    activation: Activation = "silu",
) -> tuple[Tensor, Tensor]:
    """`down(activation(gate(x)) * up(x))` of each row's expert.

    Args:
        rows_NH: `[N, H]`, grouped. Rows behind the last group come out undefined.
        gate_up: `[S, 2I, H]`, gate above up.
        down: `[S, H, I]`.
        groups: Which rows belong to which slot.
        rows: What multiplies and activates.
        activation: Of the gate.

    Returns:
        `[N, H]`, and `[N, 2I]`, gate and up before the activation, for the backward.
    """
    inner = rows.product(rows_NH, gate_up, groups, transposed=True)
    hidden = rows.gated(inner, activation)
    return rows.product(hidden, down, groups, transposed=True), inner


@dataclass(slots=True)
class ExpertsBackward:
    """The backward of experts after its first part: what the weights' part needs.

    Attributes:
        grad_rows_NH: `[N, H]`, the gradient of the rows.
    """

    grad_rows_NH: Tensor
    _rows: Tensor
    _hidden: Tensor
    _grad_inner: Tensor
    _grad_out: Tensor
    _groups: Groups
    _functions: RowFunctions

    def weights(self) -> tuple[Tensor, Tensor]:
        """The gradients of `gate_up` and `down`, zeros for slots without rows."""
        return (
            self._functions.outer(self._grad_inner, self._rows, self._groups),
            self._functions.outer(self._grad_out, self._hidden, self._groups),
        )


def experts_backward(
    grad_NH: Tensor,
    rows_NH: Tensor,
    inner: Tensor,
    gate_up: Tensor,
    down: Tensor,
    groups: Groups,
    rows: RowFunctions,
    activation: Activation = "silu",
) -> ExpertsBackward:
    """The part of the backward that gives the rows' gradient; `weights()` of it is the rest."""
    grad_hidden = rows.product(grad_NH, down, groups, transposed=False)
    hidden, grad_inner = rows.gated_backward(grad_hidden, inner, activation)
    grad_rows = rows.product(grad_inner, gate_up, groups, transposed=False)
    return ExpertsBackward(grad_rows, rows_NH, hidden, grad_inner, grad_NH, groups, rows)
