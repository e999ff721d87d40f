"""What comes in: counts, loads, tensors and buffers, mostly sound."""

from __future__ import annotations

import math
import sys
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from fuzzing.case import Case

__all__ = [
    "ODD_LOADS",
    "ODD_NUMBERS",
    "Floats",
    "buffer",
    "load",
    "num_experts_for",
    "number",
    "sizes",
    "values",
]

Floats = npt.NDArray[np.float32]

ODD_NUMBERS: list[Any] = [
    0, -1, 1, 2, 3, 5, 7, 2**20 + 1, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**30, 10**400,
    True, False, None, "8", b"8", 8.0, 1.5, math.nan, math.inf, 8j, [8], (8,), {}, object(), int,
    Decimal(8), Fraction(8), np.float32(8), np.int8(-3), np.array(2), np.array([2, 2]), np.array([]),
]  # fmt: skip

ODD_LOADS: list[Any] = [
    None, 0, 1.5, "load", b"load", [], [[]], [[], []], {}, {"a": [1]}, set(), object(), int, True,
    [1, 2, 3], [[1, 2], [3]], [[1], 2], [[None]], [["1"]], [[1j]], [[True]], [[10**30, 1]],
    [[Decimal(1)]], [[[1.0]]], np.array(1.0), np.ones(3), np.ones((2, 2, 2)), np.ones((0, 3)),
    np.ones((3, 0)), np.ones((2, 2), dtype=object), np.ones((2, 2), dtype="S1"),
    np.ones((2, 2), dtype="M8[s]"), np.ones((2, 2), dtype=complex), np.ones((2, 2), dtype=bool),
    np.zeros((2, 2), dtype=[("a", "f4")]), np.ma.masked_equal([[1, 2], [3, 4]], 3),
]  # fmt: skip

ODD_VALUES = [math.nan, math.inf, -math.inf, -1.0, -1e-45, -3e38, 1e39, 1e300]

DTYPES = ["f2", "f4", "f8", "g", ">f4", ">f8", "i1", "i2", "i4", "i8", ">i4", "u1", "u4", "u8"]


def number(case: Case, sound: int, odd: float = 0.03) -> Any:
    """A count: mostly the sound one, at times as another type, at times one that is not."""
    if not case.chance(odd):
        return sound if case.chance(0.97) else np.int64(sound)
    return case.pick(ODD_NUMBERS) if case.chance(0.7) else sound + case.pick([-2, -1, 1, 2])


def sizes(case: Case) -> tuple[int, int, int]:
    """Nodes, GPUs per node and slots per GPU: mostly few."""
    most = 4 if case.chance(0.98) else 9
    return case.upto(most), case.upto(most), case.upto(most)


def num_experts_for(case: Case, num_slots: int, num_groups: int) -> int:
    """Experts that fit the slots and divide into the groups; at times that do not."""
    if case.chance(0.03):
        return case.upto(num_slots + 3)
    return num_groups * case.upto(max(num_slots // num_groups, 1))


def values(case: Case, num_layers: int, num_experts: int) -> list[list[float]]:
    """Loads of one of many kinds, as numbers that are exact in float32."""
    draw = case.random.random
    kind = case.upto(8)

    def value() -> float:
        match kind:
            case 1:
                return float(int(draw() * 4))  # ties
            case 2:
                return float(int(draw() * 120))
            case 3:
                return float(int(math.exp(draw() * 12)))  # skewed
            case 4:
                return 0.0 if draw() < 0.7 else float(int(draw() * 9))
            case 5:
                return -0.0 if draw() < 0.5 else 0.0
            case 6:
                return math.ldexp(int(draw() * 2**24), 80)  # huge
            case 7:
                return math.ldexp(int(draw() * 2**10), -149)  # denormal
            case _:
                return math.ldexp(int(draw() * 2**24), -10)

    return [[value() for _ in range(num_experts)] for _ in range(num_layers)]


def load(case: Case, num_experts: int) -> tuple[Any, Floats | None]:
    """A load as a caller might hand it over, and what it is in float32 if it is one."""
    if case.chance(0.04):
        return case.pick(ODD_LOADS), None
    rows = values(case, case.upto(3) if case.chance(0.98) else 9, num_experts)
    if case.chance(0.05):
        case.pick(rows)[case.upto(num_experts) - 1] = case.pick(ODD_VALUES)
        if case.chance(0.2):
            return rows, None
        with np.errstate(over="ignore"):
            return np.array(rows, dtype=case.pick(["f4", "f8"])), None
    plain = np.array(rows, dtype=np.float32)
    form = case.upto(10)
    if form == 1:
        return rows, plain
    if form == 2:
        with np.errstate(all="ignore"):
            given = plain.astype(case.pick(DTYPES))
            plain = given.astype(np.float32)
        return given, plain if (plain >= 0).all() and np.isfinite(plain).all() else None
    if form == 3:
        return np.asfortranarray(plain), plain
    if form == 4:
        return np.repeat(plain, 2, axis=1)[:, ::2], plain
    if form == 5 and case.chance(0.2):
        return plain[::-1], plain[::-1]
    if form == 6 and case.chance(0.2) and sys.modules.get("torch"):
        return tensor(case, plain), plain
    return plain, plain


def tensor(case: Case, plain: Floats) -> Any:
    import torch

    result = torch.from_numpy(plain.copy())
    form = case.upto(5)
    if form == 1:
        return result.double()
    if form == 2:
        return result.T.contiguous().T
    return result.requires_grad_() if form == 3 else result


def buffer(case: Case, shape: tuple[int, ...]) -> Any:
    """An array to write into, at times one that cannot be."""
    if not case.chance(0.05):
        return np.full(shape, -7)
    kind = case.upto(8)
    if kind == 1:
        return np.full(shape, -7).astype(case.pick(["i4", "f8", ">i8", "O", "u8", "?"]))
    if kind == 2:
        array = np.full(shape, -7)
        array.flags.writeable = False
        return array
    if kind == 3:
        return np.full(shape[::-1], -7).T
    if kind == 4:
        return np.full((*shape[:-1], shape[-1] * 2), -7)[..., ::2]
    if kind == 5:
        return np.full(tuple(max(size + case.pick([-1, 0, 1]), 0) for size in shape), -7)
    if kind == 6:
        return np.full(math.prod(shape), -7)
    if kind == 7:
        return np.full((1, *shape), -7)
    return case.pick([None, [], "x", object(), 3, [[0] * shape[-1]] * shape[0]])
