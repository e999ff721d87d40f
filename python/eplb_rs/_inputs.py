"""What callers hand over as a load, made into what the native module takes.

Letters: L layers, E logical experts.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from eplb_rs.errors import InvalidInputError

if TYPE_CHECKING:
    import torch

    LoadLike: TypeAlias = npt.ArrayLike | torch.Tensor

Load: TypeAlias = npt.NDArray[np.float32]

_NUMBERS = "iuf"  # NumPy's kinds: signed, unsigned, floating


def as_load(load: LoadLike, argument: str = "load") -> Load:
    """A load as a C-contiguous float32 array `[L, E]`, without a copy where it is one already.

    Its values are not looked at here: the native module refuses what is negative or not finite.

    Raises:
        InvalidInputError: ``wrong_dtype``, ``wrong_shape``, ``empty``, ``ragged`` or, for a
            tensor that holds no numbers of its own, ``unsupported_tensor``.
    """
    if type(load) is not np.ndarray:
        load = _as_array(load, argument)
    if load.ndim != 2:
        raise InvalidInputError(
            code="wrong_shape",
            argument=argument,
            got=f"{load.ndim} dimensions, shape {load.shape}",
            expected="of 2 dimensions, [layers, experts]",
            hint=_SHAPE_HINTS.get(load.ndim, ""),
        )
    if load.size == 0:
        raise InvalidInputError(
            code="empty",
            argument=argument,
            got=f"shape {load.shape}",
            expected="at least one layer of one expert",
        )
    if load.dtype == np.float32 and load.dtype.isnative:
        return np.ascontiguousarray(load)
    if load.dtype.kind not in _NUMBERS:
        raise InvalidInputError(
            code="wrong_dtype",
            argument=argument,
            got=f"dtype {load.dtype}",
            expected="of integers or floating-point numbers",
            hint="rows of unequal length and numbers beyond 64 bits become dtype object"
            if load.dtype == object
            else "",
        )
    with np.errstate(over="ignore"):  # becomes infinite, and is refused as such
        return np.ascontiguousarray(load, dtype=np.float32)


_SHAPE_HINTS = {
    1: "for a single layer, load[None, :]",
    3: "for a series of windows, load.sum(0), or one window at a time",
}


def is_tensor(value: object) -> bool:
    """Whether a value is a torch tensor; torch is not imported to find out."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _as_array(load: Any, argument: str) -> npt.NDArray[Any]:
    if is_tensor(load):
        return _from_tensor(load, argument)
    if isinstance(load, np.ma.MaskedArray):
        if np.ma.is_masked(load):
            raise InvalidInputError(
                code="masked",
                argument=argument,
                got="an array with masked values",
                expected="an array without any",
                hint="fill them in first, for example with load.filled(0)",
            )
        return np.asarray(load.data)
    try:
        return np.asarray(load)
    except Exception as error:  # whatever an object's own conversion raises
        raise InvalidInputError(
            code="ragged" if "inhomogeneous" in str(error) else "wrong_type",
            argument=argument,
            got=f"{type(load).__name__}: {error}",
            expected="an array, a tensor or a list of equally long rows, [layers, experts]",
        ) from error


def _from_tensor(tensor: torch.Tensor, argument: str) -> npt.NDArray[Any]:
    import torch

    if tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise InvalidInputError(
            code="wrong_dtype",
            argument=argument,
            got=f"dtype {tensor.dtype}",
            expected="of integers or floating-point numbers",
        )
    try:
        plain = tensor.detach()
        if plain.layout != torch.strided:
            plain = plain.to_dense()
        return plain.to(device="cpu", dtype=torch.float32).contiguous().numpy()
    except Exception as error:  # tensors without storage, of packed dtypes, under tracing
        raise InvalidInputError(
            code="unsupported_tensor",
            argument=argument,
            got=f"{tensor.dtype} tensor on {tensor.device}: {str(error).splitlines()[0]}",
            expected="a tensor whose values can be copied to the CPU as float32",
        ) from error
