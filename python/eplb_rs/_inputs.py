"""What callers hand over, made into what the native module takes.

Letters: L layers, E logical experts, R slots.
"""

from __future__ import annotations

import contextlib
import math
import operator
import sys
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from eplb_rs import _core
from eplb_rs.errors import InvalidInputError

if TYPE_CHECKING:
    import torch

    LoadLike: TypeAlias = npt.ArrayLike | torch.Tensor

Load: TypeAlias = npt.NDArray[np.float32]

NUMBERS = "iuf"  # NumPy's kinds: signed, unsigned, floating


def as_load(load: LoadLike, argument: str = "load") -> Load:
    """A load as a C-contiguous float32 array `[L, E]`, without a copy where it is one already.

    Its values are not looked at here: the native module refuses what is negative or not finite.

    Raises:
        InvalidInputError: ``wrong_dtype``, ``wrong_shape``, ``empty``, ``ragged`` or, for a
            tensor that holds no numbers of its own, ``unsupported_tensor``.
    """
    array = load if type(load) is np.ndarray else as_array(load, argument)
    if array.ndim != 2:
        if array.ndim == 0 and array.dtype.kind not in NUMBERS:
            raise _no_array(load, argument)
        raise InvalidInputError(
            code="wrong_shape",
            argument=argument,
            got=f"{array.ndim} dimensions, shape {array.shape}",
            expected="of 2 dimensions, [layers, experts]",
            hint=_SHAPE_HINTS.get(array.ndim, ""),
        )
    if array.size == 0:
        raise InvalidInputError(
            code="empty",
            argument=argument,
            got=f"shape {array.shape}",
            expected="at least one layer of one expert",
        )
    if array.dtype == np.float32 and array.flags.c_contiguous and array.flags.aligned:
        return array
    if array.dtype.kind not in NUMBERS:
        raise InvalidInputError(
            code="wrong_dtype",
            argument=argument,
            got=f"dtype {array.dtype}",
            expected="of integers or floating-point numbers",
            hint="rows of unequal length and numbers beyond 64 bits become dtype object"
            if array.dtype == object
            else "",
        )
    with np.errstate(all="ignore"):  # what overflows becomes infinite, and is refused as such
        return np.array(array, dtype=np.float32, order="C")


_SHAPE_HINTS = {
    1: "for a single layer, load[None, :]",
    3: "for a series of windows, load.sum(0), or one window at a time",
}


def is_tensor(value: object) -> bool:
    """Whether a value is a torch tensor; torch is not imported to find out."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def as_array(load: Any, argument: str) -> npt.NDArray[Any]:
    """An array of any shape and dtype; of a tensor, its values as float32.

    Raises:
        InvalidInputError: ``wrong_type``, ``ragged``, ``masked``, ``wrong_dtype`` or
            ``unsupported_tensor``.
    """
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
    return converted(load, argument)


def converted(value: Any, argument: str) -> npt.NDArray[Any]:
    """What NumPy makes of a value.

    Raises:
        InvalidInputError: ``wrong_type`` or ``ragged``.
    """
    try:
        return np.asarray(value)
    except Exception as error:  # whatever an object's own conversion raises
        raise _no_array(value, argument, error) from error


def _no_array(value: object, argument: str, error: Exception | None = None) -> InvalidInputError:
    return InvalidInputError(
        code="ragged" if "inhomogeneous" in str(error) else "wrong_type",
        argument=argument,
        got=type(value).__name__ if error is None else f"{type(value).__name__}: {_reason(error)}",
        expected="an array, a tensor or a list of equally long rows",
    )


def _reason(error: Exception) -> str:
    """The first line of what an error says, or its name where it says nothing."""
    return str(error).partition("\n")[0] or type(error).__name__


def _from_tensor(tensor: torch.Tensor, argument: str) -> npt.NDArray[Any]:
    import torch

    form = type(tensor).__name__
    try:
        form = f"{tensor.dtype} tensor on {tensor.device}"
        numbers = not (tensor.dtype.is_complex or tensor.dtype == torch.bool)
        plain = tensor.detach()
        if plain.layout != torch.strided:
            plain = plain.to_dense()
        if numbers:
            plain = plain.to(device="cpu", dtype=torch.float32).resolve_neg().contiguous()
            return plain.numpy()
    except Exception as error:  # tensors without storage, of packed dtypes, under tracing
        raise InvalidInputError(
            code="unsupported_tensor",
            argument=argument,
            got=f"{form}: {_reason(error)}",
            expected="a tensor whose values can be copied to the CPU as float32",
        ) from error
    raise InvalidInputError(
        code="wrong_dtype",
        argument=argument,
        got=f"dtype {tensor.dtype}",
        expected="of integers or floating-point numbers",
    )


def wrong_type(argument: str, value: object, expected: str, hint: str = "") -> InvalidInputError:
    """What is said of a value of another type than expected."""
    return InvalidInputError(
        code="wrong_type",
        argument=argument,
        got=type(value).__name__,
        expected=expected,
        hint=hint,
    )


def as_topology(topology: object) -> _core.Topology:
    """A topology.

    Raises:
        InvalidInputError: ``wrong_type``.
    """
    if not isinstance(topology, _core.Topology):
        hint = "eplb_rs.Topology(num_nodes, gpus_per_node, slots_per_gpu)"
        raise wrong_type("topology", topology, "an eplb_rs.Topology", hint)
    return topology


def as_count(value: object, argument: str, least: int = 1) -> int:
    """A whole number of at least ``least``, taken as the native module takes counts.

    Raises:
        InvalidInputError: ``not_integer``, ``not_positive``, ``negative`` or ``too_large``.
    """
    count = None
    if not isinstance(value, bool):
        with contextlib.suppress(Exception):  # whatever an object's own conversion raises
            count = operator.index(value)  # type: ignore[arg-type]
    if count is not None and least <= count <= sys.maxsize:
        return count
    if count is None:
        code = "not_integer"
    elif count > sys.maxsize:
        code = "too_large"
    else:
        code = "not_positive" if least else "negative"
    try:
        got = repr(value)[:100]
    except Exception:  # whatever an object's own raises
        got = type(value).__name__
    size = "of 64 bits" if code == "too_large" else f"of at least {least}"
    expected = f"a whole number {size}"
    raise InvalidInputError(code=code, argument=argument, got=got, expected=expected)


def as_number(value: Any, argument: str, *, least: float = 0.0, above: bool = False) -> float:
    """A finite number of at least ``least``, or ``above`` it.

    Raises:
        InvalidInputError: ``wrong_type`` or ``out_of_range``.
    """
    try:
        number = float(value)
    except Exception:  # whatever an object's own conversion raises
        raise wrong_type(argument, value, "a number") from None
    if least < number < math.inf or (number == least and not above):
        return number
    expected = f"finite and {'above' if above else 'at least'} {least:g}"
    raise InvalidInputError(
        code="out_of_range", argument=argument, got=repr(number), expected=expected
    )


def as_part(value: Any, argument: str) -> float:
    """A number from 0 to 1.

    Raises:
        InvalidInputError: ``wrong_type`` or ``out_of_range``.
    """
    part = as_number(value, argument)
    if part <= 1.0:
        return part
    raise InvalidInputError(
        code="out_of_range", argument=argument, got=repr(part), expected="from 0 to 1"
    )


def as_expert_bytes(value: Any, num_layers: int) -> npt.NDArray[np.float64]:
    """The bytes of an expert of each layer, from one number for all or one for each.

    Raises:
        InvalidInputError: ``wrong_type``, ``wrong_shape`` or ``out_of_range``.
    """
    array = converted(value, "expert_bytes")
    if array.dtype.kind not in NUMBERS:
        raise _no_array(value, "expert_bytes")
    if array.shape not in {(), (num_layers,)}:
        raise InvalidInputError(
            code="wrong_shape",
            argument="expert_bytes",
            got=f"shape {array.shape}",
            expected=f"one number, or one for each of {num_layers} layers",
        )
    for number in (array.min(), array.max()):
        as_number(number, "expert_bytes", above=True)
    return np.full(num_layers, array, dtype=np.float64)


def as_integers(values: LoadLike, argument: str, expected: str = "of integers") -> npt.NDArray[Any]:
    """An array of integers, of any shape and size of integer; a tensor is read where it is.

    Raises:
        InvalidInputError: ``wrong_type``, ``ragged``, ``masked`` or ``wrong_dtype``.
    """
    if is_tensor(values):
        with contextlib.suppress(Exception):  # NumPy's own attempt says what is wrong
            values = values.detach().cpu()  # type: ignore[union-attr]
        array = converted(values, argument)
    else:
        array = as_array(values, argument)
    if array.dtype.kind not in "iu":
        raise InvalidInputError(
            code="wrong_dtype", argument=argument, got=f"dtype {array.dtype}", expected=expected
        )
    return array


def check_int64(array: npt.NDArray[Any], argument: str) -> None:
    """Refuses integers that int64 cannot hold.

    Raises:
        InvalidInputError: ``too_large``.
    """
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise InvalidInputError(
            code="too_large",
            argument=argument,
            got=str(array.max()),
            expected="small enough for int64",
        )


def as_slots(phy2log: npt.ArrayLike, shape: tuple[int, int]) -> npt.NDArray[np.int64]:
    """A map `[L, R]` as C-contiguous int64. Its content is checked by the native module.

    Raises:
        InvalidInputError: ``wrong_type``, ``ragged``, ``masked``, ``wrong_dtype`` or
            ``wrong_shape``.
    """
    array = as_integers(phy2log, "phy2log")
    if array.shape != shape:
        raise InvalidInputError(
            code="wrong_shape",
            argument="phy2log",
            got=f"shape {array.shape}",
            expected=f"of shape {shape}, the layers of the load by the slots of the topology",
        )
    return np.array(array, dtype=np.int64, order="C")
