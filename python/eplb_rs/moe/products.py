"""Products of rows with the matrices of their experts, slot by slot, in one kernel: for Hopper GPUs.

torch's grouped product fills each slot's rows up to whole pairs of tiles, 256 rows: with 512 rows a
slot it computes a quarter more than there is, and more the less even slots are. Here a tile has 128
rows, and what is left of a slot is a tile of 64 where that is enough.

Every number is one sum in float32, in the order of the contracted dimension: a row's result has the
same bits wherever it stands, and the same as torch's. The host waits for nothing.

Letters: N rows, S slots, O and I the height and width of a slot's matrix.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["fits", "outer", "product"]

_ROWS, _COLUMNS, _DEPTH = 128, 256, 64
"""A tile of a result, and how much of the contracted dimension is multiplied at a time."""

_NEAR = 8
"""How many tiles of rows go with the same columns before the next: they share a matrix in the
cache."""

_LAUNCH = {"num_warps": 8, "num_stages": 3}
_TILES = 32
"""How many entries of the list of tiles a program makes."""


@lru_cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


def fits(rows: Tensor, weight_SOI: Tensor) -> bool:
    """Whether these kernels are for such rows and matrices (or results, for :func:`outer`)."""
    return (
        rows.is_cuda
        and rows.dtype in (torch.bfloat16, torch.float16)
        and all(width % _DEPTH == 0 for width in weight_SOI.shape[1:])
        and weight_SOI.is_contiguous()
        and weight_SOI.data_ptr() % 16 == 0
        and _is_hopper(rows.device)
    )


def product(rows_N: Tensor, weight_SOI: Tensor, end_S: Tensor, *, transposed: bool) -> Tensor:
    """Each row times its slot's matrix.

    Args:
        rows_N: `[N, I]` if transposed, else `[N, O]`, grouped by slot.
        weight_SOI: `[S, O, I]`, contiguous.
        end_S: `[S]` int32, where each slot's rows end.
        transposed: Whether rows are multiplied by the transposed matrices.

    Returns:
        `[N, O]` or `[N, I]`; undefined behind the last slot's rows.
    """
    slots, height, width = weight_SOI.shape
    columns, depth = (height, width) if transposed else (width, height)
    out = rows_N.new_empty(len(rows_N), columns)
    if not out.numel():
        return out
    rows_N = rows_N.contiguous()
    tiles = triton.cdiv(len(rows_N), _ROWS) + slots  # at most: the host does not know
    listed = torch.empty(triton.cdiv(tiles, _TILES) * _TILES, 3, dtype=torch.int32,
                         device=out.device)  # fmt: skip
    _list_tiles[(len(listed) // _TILES,)](
        end_S, listed, slots, SLOTS=triton.next_power_of_2(slots), ROWS=_ROWS, BLOCK=_TILES
    )
    flat = weight_SOI.view(slots * height, width)
    block = [_COLUMNS, _DEPTH] if transposed else [_DEPTH, _COLUMNS]
    _product[(triton.cdiv(tiles, _NEAR) * _NEAR * triton.cdiv(columns, _COLUMNS),)](
        TensorDescriptor.from_tensor(rows_N, [_ROWS, _DEPTH]),
        TensorDescriptor.from_tensor(rows_N, [_ROWS // 2, _DEPTH]),
        TensorDescriptor.from_tensor(flat, block),
        TensorDescriptor.from_tensor(out, [_ROWS, _COLUMNS]),
        out,
        listed,
        len(listed),
        HEIGHT=height,
        WIDTH=columns,
        DEEP=depth,
        TRANSPOSED=transposed,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        DEPTH=_DEPTH,
        NEAR=_NEAR,
        **_LAUNCH,
    )
    return out


@triton.jit
def _list_tiles(
    ends, listed, num_slots, SLOTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """For each tile of rows: its slot, its first row, and where the slot's rows end."""
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.arange(0, SLOTS)
    real = slot < num_slots
    end = tl.load(ends + slot, mask=real, other=0)
    begin = tl.load(ends + slot - 1, mask=real & (slot > 0), other=0)
    tiles = tl.where(real, (end - begin + ROWS - 1) // ROWS, 0)
    passed = (tl.cumsum(tiles, 0)[None, :] <= tile[:, None]) & real[None, :]
    found = tl.sum(passed.to(tl.int32), 1)
    within = tile - tl.sum(tl.where(passed, tiles[None, :], 0), 1)
    first = tl.max(tl.where(passed, end[None, :], 0), 1) + within * ROWS
    last = tl.sum(tl.where(slot[None, :] == found[:, None], end[None, :], 0), 1)
    tl.store(listed + 3 * tile, tl.where(found < num_slots, found, -1))
    tl.store(listed + 3 * tile + 1, first)
    tl.store(listed + 3 * tile + 2, last)


@triton.jit(do_not_specialize=["num_tiles"])
def _product(
    rows,
    half_rows,
    weight,
    whole,
    out,
    listed,
    num_tiles,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEEP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    NEAR: tl.constexpr,
):
    across: tl.constexpr = tl.cdiv(WIDTH, COLUMNS)
    within = tl.program_id(0) % (NEAR * across)
    tile = tl.program_id(0) // (NEAR * across) * NEAR + within % NEAR
    column = within // NEAR * COLUMNS
    if tile >= num_tiles:
        return
    slot = tl.load(listed + 3 * tile)
    if slot < 0:
        return
    first = tl.load(listed + 3 * tile + 1)
    last = tl.load(listed + 3 * tile + 2)
    top = slot * HEIGHT
    if last - first <= ROWS // 2:
        total = _sum(half_rows, weight, first, top, column, DEEP, TRANSPOSED, ROWS // 2, COLUMNS,
                     DEPTH)  # fmt: skip
        _store(out, total, first, last, column, WIDTH, ROWS // 2, COLUMNS)
        return
    total = _sum(rows, weight, first, top, column, DEEP, TRANSPOSED, ROWS, COLUMNS, DEPTH)
    if last - first >= ROWS:
        whole.store([first, column], total.to(out.dtype.element_ty))
    else:
        _store(out, total, first, last, column, WIDTH, ROWS, COLUMNS)


@triton.jit
def _sum(
    rows,
    weight,
    first,
    top,
    column,
    DEEP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A tile. That the loop's length is known at compile time keeps its products in flight."""
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(0, DEEP, DEPTH):
        part = rows.load([first, k])
        if TRANSPOSED:
            total = tl.dot(part, weight.load([top + column, k]).T, total)
        else:
            total = tl.dot(part, weight.load([top + k, column]), total)
    return total


@triton.jit
def _store(
    out, total, first, last, column, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The rows of a tile that are this slot's."""
    row = first + tl.arange(0, ROWS)
    columns = column + tl.arange(0, COLUMNS)
    tl.store(
        out + row.to(tl.int64)[:, None] * WIDTH + columns[None, :],
        total.to(out.dtype.element_ty),
        mask=(row < last)[:, None] & (columns < WIDTH)[None, :],
    )


def outer(left_NO: Tensor, right_NI: Tensor, end_S: Tensor) -> Tensor:
    """For each slot, the sum over its rows of left times right.

    Args:
        left_NO: `[N, O]`, grouped by slot.
        right_NI: `[N, I]`, likewise.
        end_S: `[S]` int32, where each slot's rows end.

    Returns:
        `[S, O, I]`, zeros for slots without rows.
    """
    slots, height, width = len(end_S), left_NO.shape[1], right_NI.shape[1]
    out = left_NO.new_empty(slots, height, width)
    if not len(left_NO):
        return out.zero_()
    left_NO, right_NI = left_NO.contiguous(), right_NI.contiguous()
    # Slots with many rows first: they would hold up the end.
    order = end_S.diff(prepend=end_S.new_zeros(1)).argsort(descending=True)
    tiles = triton.cdiv(height, _ROWS) * triton.cdiv(width, _COLUMNS)
    _outer[(slots * tiles,)](
        TensorDescriptor.from_tensor(left_NO, [_DEPTH, _ROWS]),
        TensorDescriptor.from_tensor(right_NI, [_DEPTH, _COLUMNS]),
        left_NO,
        right_NI,
        out,
        end_S,
        order,
        HEIGHT=height,
        WIDTH=width,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        DEPTH=_DEPTH,
        NEAR=_NEAR,
        **_LAUNCH,
    )
    return out


@triton.jit
def _outer(
    left,
    right,
    left_rows,
    right_rows,
    out,
    ends,
    order,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    NEAR: tl.constexpr,
):
    down: tl.constexpr = tl.cdiv(HEIGHT, ROWS)
    across: tl.constexpr = tl.cdiv(WIDTH, COLUMNS)
    slot = tl.load(order + tl.program_id(0) // (down * across)).to(tl.int32)
    within = tl.program_id(0) % (down * across)
    chunk = within // (NEAR * across) * NEAR
    near = min(down - chunk, NEAR)
    top = (chunk + within % (NEAR * across) % near) * ROWS
    column = within % (NEAR * across) // near * COLUMNS
    begin = tl.load(ends + slot - 1, mask=slot > 0, other=0)
    end = tl.load(ends + slot)
    full = begin + (end - begin) // DEPTH * DEPTH
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(begin, full, DEPTH):
        total = tl.dot(left.load([k, top]).T, right.load([k, column]), total)
    rows = top + tl.arange(0, ROWS)
    columns = column + tl.arange(0, COLUMNS)
    if full < end:  # what is not a whole step: rows behind it are another slot's
        rest = full + tl.arange(0, DEPTH)
        there = (rest < end)[:, None]
        at = rest.to(tl.int64)[:, None]
        a = tl.load(left_rows + at * HEIGHT + rows[None, :], other=0.0,
                    mask=there & (rows < HEIGHT)[None, :])  # fmt: skip
        b = tl.load(right_rows + at * WIDTH + columns[None, :], other=0.0,
                    mask=there & (columns < WIDTH)[None, :])  # fmt: skip
        total = tl.dot(a.T, b, total)
    tl.store(
        out + (slot.to(tl.int64) * HEIGHT + rows)[:, None] * WIDTH + columns[None, :],
        total.to(out.dtype.element_ty),
        mask=(rows < HEIGHT)[:, None] & (columns < WIDTH)[None, :],
    )
