"""Products of rows with the matrices of their experts, slot by slot, one kernel each: for Hopper
GPUs.

torch's grouped product fills each slot's rows up to pairs of tiles, 256 rows: at 512 rows a slot it
computes a quarter more than there is, and where load is uneven still more. Here a tile of rows has
128 or, at the end of a slot, 64.

A slot with many rows keeps the tensor cores busy, one with few the memory, whose matrix is read all
the same. So slots are taken in order of their rows and from both ends: most multiprocessors begin
with the largest, some with the smallest, until they meet.

Every number is one sum in float32 in the order of the contracted dimension. A row's result has the
same bits wherever it stands, and the same as torch's; the host waits for nothing.

Letters: N rows, S slots, O and I the height and width of a slot's matrix.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

if TYPE_CHECKING:
    from eplb_rs.moe.experts import Groups

__all__ = ["STEP", "fits", "outer", "product"]

STEP = 64
"""Each slot's rows fill a multiple of this; those that are added are zeros."""

_ROWS, _COLUMNS, _DEPTH = 128, 256, 64
"""A tile of rows times matrices, and how much of the contracted dimension is taken at a time."""

_SIDE, _FEW = 128, 32
"""A tile of a slot's sum, and how many rows are taken at a time."""

_NEAR = 8
"""How many tiles of rows are taken for the same columns before the next columns: they find the
matrix in the cache."""

_FROM_END = 4
"""One multiprocessor of so many begins with the smallest slots."""

_BLOCK = 32
"""How many tiles a program lists."""


def fits(rows: Tensor, weight_SOI: Tensor) -> bool:
    """Whether there are kernels for such rows and weights."""
    return (
        rows.is_cuda
        and rows.dtype in (torch.bfloat16, torch.float16)
        and all(width % _SIDE == 0 for width in weight_SOI.shape[1:])
        and weight_SOI.is_contiguous()
        and weight_SOI.data_ptr() % 16 == 0
        and _is_hopper(rows.device)
    )


@lru_cache
def _is_hopper(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


def product(rows_N: Tensor, weight_SOI: Tensor, groups: Groups, *, transposed: bool) -> Tensor:
    """As :func:`eplb_rs.moe.rows.product`, where :func:`fits` says so and slots' rows fill a
    multiple of :data:`STEP`."""
    slots, height, width = weight_SOI.shape
    columns, deep = (height, width) if transposed else (width, height)
    out = rows_N.new_empty(len(rows_N), columns)
    if not out.numel():
        return out
    rows_N = rows_N.contiguous()
    matrices = weight_SOI.view(slots * height, width)
    listed = _listed(groups, len(rows_N))
    _product[((len(listed) - 1) * triton.cdiv(columns, _COLUMNS),)](
        TensorDescriptor.from_tensor(rows_N, [_ROWS, _DEPTH]),
        TensorDescriptor.from_tensor(rows_N, [_ROWS // 2, _DEPTH]),
        TensorDescriptor.from_tensor(
            matrices, [_COLUMNS, _DEPTH] if transposed else [_DEPTH, _COLUMNS]
        ),
        TensorDescriptor.from_tensor(out, [_ROWS, _COLUMNS]),
        TensorDescriptor.from_tensor(out, [_ROWS // 2, _COLUMNS]),
        listed,
        torch.zeros(1, dtype=torch.int64, device=out.device),
        HEIGHT=height,
        WIDTH=columns,
        DEEP=deep,
        TRANSPOSED=transposed,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        DEPTH=_DEPTH,
        NEAR=_NEAR,
        FROM_END=_FROM_END,
        ON_GPU=out.is_cuda,
        num_warps=8,
        num_stages=4,
    )
    return out


def outer(left_NO: Tensor, right_NI: Tensor, groups: Groups) -> Tensor:
    """As :func:`eplb_rs.moe.rows.outer`, where :func:`fits` says so of the result and slots' rows
    fill a multiple of :data:`STEP`."""
    slots, height, width = len(groups.end_S), left_NO.shape[1], right_NI.shape[1]
    out = left_NO.new_empty(slots, height, width)
    if not len(left_NO):
        return out.zero_()
    _outer[(slots * triton.cdiv(height, _SIDE) * triton.cdiv(width, _SIDE),)](
        TensorDescriptor.from_tensor(left_NO.contiguous(), [_FEW, _SIDE]),
        TensorDescriptor.from_tensor(right_NI.contiguous(), [_FEW, _SIDE]),
        TensorDescriptor.from_tensor(out.view(slots * height, width), [_SIDE, _SIDE]),
        groups.end_S,
        _order(groups),
        HEIGHT=height,
        WIDTH=width,
        SIDE=_SIDE,
        FEW=_FEW,
        NEAR=_NEAR,
        num_warps=4,
        num_stages=4,
    )
    return out


def _order(groups: Groups) -> Tensor:
    """`[S]`, slots by their rows, most first."""
    if "order" not in groups.kept:
        end_S = groups.end_S
        size_S = end_S.diff(prepend=end_S.new_zeros(1))
        groups.kept["order"] = size_S.argsort(descending=True, stable=True).int()
    return groups.kept["order"]


def _listed(groups: Groups, num_rows: int) -> Tensor:
    """int32: how many tiles of rows there are, and for each its slot, where it begins and where
    the slot ends; by slot in that order. Room for as many as there can be."""
    if "listed" not in groups.kept:
        slots = len(groups.end_S)
        most = triton.cdiv(triton.cdiv(num_rows, _ROWS) + slots, _BLOCK)
        listed = torch.empty(most * _BLOCK + 1, 3, dtype=torch.int32, device=groups.end_S.device)
        _list_tiles[(most,)](
            groups.end_S,
            _order(groups),
            listed,
            slots,
            SLOTS=triton.next_power_of_2(slots),
            ROWS=_ROWS,
            BLOCK=_BLOCK,
        )
        groups.kept["listed"] = listed
    return groups.kept["listed"]


@triton.jit
def _list_tiles(
    ends, order, listed, num_slots, SLOTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.arange(0, SLOTS)
    real = place < num_slots
    slot = tl.load(order + place, mask=real, other=0)
    end = tl.load(ends + slot, mask=real, other=0)
    begin = tl.load(ends + slot - 1, mask=real & (slot > 0), other=0)
    tiles = tl.where(real, (end - begin + ROWS - 1) // ROWS, 0)
    passed = (tl.cumsum(tiles, 0)[None, :] <= tile[:, None]) & real[None, :]
    within = tile - tl.sum(tl.where(passed, tiles[None, :], 0), 1)
    here = place[None, :] == tl.sum(passed.to(tl.int32), 1)[:, None]
    entry = listed + 3 * (tile + 1)
    tl.store(entry, tl.sum(tl.where(here, slot[None, :], 0), 1))
    tl.store(entry + 1, tl.sum(tl.where(here, begin[None, :], 0), 1) + within * ROWS)
    tl.store(entry + 2, tl.sum(tl.where(here, end[None, :], 0), 1))
    tl.store(listed, tl.sum(tiles), mask=tl.program_id(0) == 0)


@triton.jit
def _taken(queue, total, FROM_END: tl.constexpr, ON_GPU: tl.constexpr):
    """The number of the piece of work that this program takes, from one end or from the other;
    `total` if there is none left. The queue counts those taken from both ends."""
    if ON_GPU:
        multiprocessor = tl.inline_asm_elementwise(
            "mov.u32 $0, %smid;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        multiprocessor = tl.program_id(0)
    from_end = multiprocessor % FROM_END == FROM_END - 1
    before = tl.atomic_add(queue, tl.where(from_end, 1 << 32, 1).to(tl.int64), sem="relaxed")
    front, back = before & 0xFFFFFFFF, before >> 32
    number = tl.where(from_end, total - 1 - back, front)
    return tl.where(front + back < total, number, total).to(tl.int32)


@triton.jit
def _product(
    rows,
    half_rows,
    weight,
    out,
    half_out,
    listed,
    queue,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEEP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    NEAR: tl.constexpr,
    FROM_END: tl.constexpr,
    ON_GPU: tl.constexpr,
):
    across: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    tiles = tl.load(listed)
    number = _taken(queue, tiles * across, FROM_END, ON_GPU)
    if number >= tiles * across:
        return
    chunk = number // (NEAR * across) * NEAR
    near = min(tiles - chunk, NEAR)
    within = number - chunk * across
    entry = listed + 3 * (chunk + within % near + 1)
    column = within // near * COLUMNS
    top = tl.load(entry) * HEIGHT
    row = tl.load(entry + 1)
    if tl.load(entry + 2) - row < ROWS:
        half = _sum(
            half_rows, weight, row, top, column, DEEP, TRANSPOSED, ROWS // 2, COLUMNS, DEPTH
        )
        half_out.store([row, column], half.to(half_out.dtype))
    else:
        whole = _sum(rows, weight, row, top, column, DEEP, TRANSPOSED, ROWS, COLUMNS, DEPTH)
        out.store([row, column], whole.to(out.dtype))


@triton.jit
def _sum(
    rows,
    weight,
    row,
    top,
    column,
    DEEP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A tile. With a length known only at run time the compiler would not overlap its products."""
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(0, DEEP, DEPTH):
        part = rows.load([row, k])
        if TRANSPOSED:
            total = tl.dot(part, weight.load([top + column, k]).T, total)
        else:
            total = tl.dot(part, weight.load([top + k, column]), total)
    return total


@triton.jit
def _outer(
    left,
    right,
    out,
    ends,
    order,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    SIDE: tl.constexpr,
    FEW: tl.constexpr,
    NEAR: tl.constexpr,
):
    down: tl.constexpr = (HEIGHT + SIDE - 1) // SIDE
    across: tl.constexpr = (WIDTH + SIDE - 1) // SIDE
    number = tl.program_id(0) % (down * across)
    chunk = number // (NEAR * across) * NEAR
    near = min(down - chunk, NEAR)
    within = number - chunk * across
    top = (chunk + within % near) * SIDE
    column = within // near * SIDE
    slot = tl.load(order + tl.program_id(0) // (down * across))
    begin = tl.load(ends + slot - 1, mask=slot > 0, other=0)
    end = tl.load(ends + slot)
    total = tl.zeros([SIDE, SIDE], tl.float32)
    for k in range(begin, end, FEW):
        total = tl.dot(left.load([k, top]).T, right.load([k, column]), total)
    out.store([slot * HEIGHT + top, column], total.to(out.dtype))
