"""What :mod:`eplb_rs.moe.rows` does, on GPUs in one kernel each. Needs triton, which torch brings.

Every kernel reads and writes each row once, computes in float32 and adds in a fixed order: the same
input gives the same bits. Places may always be behind the last row; `gaps` changes nothing.

Letters: T tokens, K experts of a token, N rows, H hidden size, I intermediate size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from eplb_rs.moe import products
from eplb_rs.moe import rows as plain

if TYPE_CHECKING:
    from eplb_rs.moe.experts import Groups
    from eplb_rs.moe.rows import Activation

__all__ = [
    "gated",
    "gated_backward",
    "gather",
    "outer",
    "product",
    "spread",
    "step",
    "weighted_sum",
]

_BLOCK = 1024
"""Columns that a program takes at a time: 16 bytes of bfloat16 for each of 128 threads."""

_ROUNDED: dict[str, bool] = {"enable_fp_fusion": False}
"""Products are rounded before they are added, as in plain torch."""


def gather(rows_NH: Tensor, index: Tensor, *, gaps: bool, share: int = 1) -> Tensor:
    """As :func:`eplb_rs.moe.rows.gather`."""
    del gaps
    rows_NH = rows_NH.contiguous()
    out = rows_NH.new_empty(*index.shape, rows_NH.shape[1])
    if out.numel():
        _gather[(index.numel(),)](
            rows_NH,
            index.contiguous(),
            out,
            len(rows_NH),
            SHARE=share,
            WIDTH=rows_NH.shape[1],
            BLOCK=_BLOCK,
            **_ROUNDED,
        )
    return out


@triton.jit
def _gather(
    rows, index, out, num_rows, SHARE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(index + place) // SHARE
    held = tl.where(row < num_rows, WIDTH, 0)  # columns
    for begin in range(0, WIDTH, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < WIDTH
        part = tl.load(rows + row * WIDTH + column, mask=column < held, other=0.0)
        tl.store(out + place * WIDTH + column, part, mask=inside)


def weighted_sum(
    rows_NH: Tensor, place_TK: Tensor, gate_TK: Tensor | None, *, gaps: bool
) -> Tensor:
    """As :func:`eplb_rs.moe.rows.weighted_sum`."""
    del gaps
    tokens, top_k = place_TK.shape
    width = rows_NH.shape[1]
    out = rows_NH.new_empty(tokens, width)
    if out.numel():
        _weighted_sum[tokens, triton.cdiv(width, _BLOCK)](
            rows_NH.contiguous(),
            place_TK.contiguous(),
            None if gate_TK is None else gate_TK.contiguous(),
            out,
            len(rows_NH),
            K=top_k,
            GATED=gate_TK is not None,
            WIDTH=width,
            BLOCK=_BLOCK,
            **_ROUNDED,
        )
    return out


@triton.jit
def _weighted_sum(
    rows,
    places,
    gates,
    out,
    num_rows,
    K: tl.constexpr,
    GATED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        row = tl.load(places + token * K + k)
        held = tl.where(row < num_rows, WIDTH, 0)  # columns
        part = tl.load(rows + row * WIDTH + column, mask=column < held, other=0.0)
        if GATED:
            total += part.to(tl.float32) * tl.load(gates + token * K + k).to(tl.float32)
        else:
            total += part.to(tl.float32)
    tl.store(out + token * WIDTH + column, total, mask=inside)


def spread(
    grad_TH: Tensor, gate_TK: Tensor, rows_NH: Tensor, place_TK: Tensor, *, gaps: bool
) -> tuple[Tensor, Tensor]:
    """As :func:`eplb_rs.moe.rows.spread`; rows that no place names are left as they are."""
    del gaps
    out = torch.empty_like(rows_NH)
    gate_grad = torch.empty_like(gate_TK, memory_format=torch.contiguous_format)
    if place_TK.numel():
        _spread[(place_TK.numel(),)](
            grad_TH.contiguous(),
            gate_TK.contiguous(),
            rows_NH.contiguous(),
            place_TK.contiguous(),
            out,
            gate_grad,
            len(rows_NH),
            K=place_TK.shape[1],
            WIDTH=rows_NH.shape[1],
            BLOCK=_BLOCK,
            **_ROUNDED,
        )
    return out, gate_grad


@triton.jit
def _spread(
    grads,
    gates,
    rows,
    places,
    out,
    gate_grads,
    num_rows,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    choice = tl.program_id(0).to(tl.int64)
    row = tl.load(places + choice)
    held = tl.where(row < num_rows, WIDTH, 0)  # columns
    gate = tl.load(gates + choice).to(tl.float32)
    product = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, WIDTH, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < WIDTH
        grad = tl.load(grads + choice // K * WIDTH + column, mask=inside, other=0.0)
        part = tl.load(rows + row * WIDTH + column, mask=column < held, other=0.0)
        product += grad.to(tl.float32) * part.to(tl.float32)
        tl.store(out + row * WIDTH + column, grad.to(tl.float32) * gate, mask=column < held)
    tl.store(gate_grads + choice, tl.sum(product))


def step(weight_SOI: Tensor) -> int:
    """As :func:`eplb_rs.moe.rows.step`."""
    return products.STEP if products.fits(weight_SOI, weight_SOI) else 1


def product(rows_N: Tensor, weight_SOI: Tensor, groups: Groups, *, transposed: bool) -> Tensor:
    """As :func:`eplb_rs.moe.rows.product`."""
    if groups.multiple % products.STEP == 0 and products.fits(rows_N, weight_SOI):
        return products.product(rows_N, weight_SOI, groups, transposed=transposed)
    return plain.product(rows_N, weight_SOI, groups, transposed=transposed)


def outer(left_NO: Tensor, right_NI: Tensor, groups: Groups) -> Tensor:
    """As :func:`eplb_rs.moe.rows.outer`."""
    result = left_NO.new_empty(0, left_NO.shape[1], right_NI.shape[1])
    if groups.multiple % products.STEP == 0 and products.fits(left_NO, result):
        return products.outer(left_NO, right_NI, groups)
    return plain.outer(left_NO, right_NI, groups)


def gated(inner: Tensor, activation: Activation) -> Tensor:
    """As :func:`eplb_rs.moe.rows.gated`."""
    width = inner.shape[1] // 2
    out = inner.new_empty(len(inner), width)
    if out.numel():
        _gated[(len(inner),)](
            inner, out, ACTIVATION=activation, WIDTH=width, BLOCK=_BLOCK, **_ROUNDED
        )
    return out


@triton.jit
def _gated(inner, out, ACTIVATION: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    for begin in range(0, WIDTH, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < WIDTH
        gate = tl.load(inner + 2 * row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(inner + (2 * row + 1) * WIDTH + column, mask=inside, other=0.0)
        value, _ = _activated(gate, ACTIVATION)
        tl.store(out + row * WIDTH + column, value * up.to(tl.float32), mask=inside)


def gated_backward(grad: Tensor, inner: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """As :func:`eplb_rs.moe.rows.gated_backward`."""
    hidden, grad_inner = torch.empty_like(grad), torch.empty_like(inner)
    if grad.numel():
        _gated_backward[(len(inner),)](
            grad.contiguous(),
            inner,
            hidden,
            grad_inner,
            ACTIVATION=activation,
            WIDTH=grad.shape[1],
            BLOCK=_BLOCK,
            **_ROUNDED,
        )
    return hidden, grad_inner


@triton.jit
def _gated_backward(
    grads,
    inner,
    hidden,
    grad_inner,
    ACTIVATION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    for begin in range(0, WIDTH, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < WIDTH
        gates = 2 * row * WIDTH + column
        gate = tl.load(inner + gates, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(inner + gates + WIDTH, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grads + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        value, slope = _activated(gate, ACTIVATION)
        tl.store(hidden + row * WIDTH + column, value * up, mask=inside)
        tl.store(grad_inner + gates, grad * up * slope, mask=inside)
        tl.store(grad_inner + gates + WIDTH, grad * value, mask=inside)


@triton.jit
def _activated(gate, ACTIVATION: tl.constexpr):
    """The activation and its derivative."""
    if ACTIVATION == "silu":
        share = 1 / (1 + tl.exp(-gate))
        value = gate * share
        slope = share * (1 + gate * (1 - share))
    elif ACTIVATION == "relu":
        slope = tl.where(gate > 0, 1.0, 0.0)
        value = gate * slope
    else:
        share = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
        value = gate * share
        slope = share + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    return value, slope
