"""Loads as they were recorded, checked.

Letters: T windows, L layers, E logical experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from eplb_rs.loads.file import LoadFile
from eplb_rs.loads.json_files import read_json
from eplb_rs.loads.numpy_files import read_npy, read_npz
from eplb_rs.loads.torch_files import read_torch
from eplb_rs.loads.windows import chosen_windows

if TYPE_CHECKING:
    import os
    from pathlib import Path

    from eplb_rs.loads.file import Reader
    from eplb_rs.loads.windows import WindowChoice

__all__ = ["LoadTrace", "read_loads"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadTrace:
    """Expert loads as they were recorded.

    Attributes:
        loads: `[T, L, E]` float64, read-only: tokens per window, layer and expert, in the file's
            unit. T is 1 where the file has no windows.
        layer_ids: `[L]`, the number of each layer in the file, and so in the model.
        empty_layers: Layers of the file that carry no load in any of its windows (a model's dense
            layers) and were left out.
        windows: `[T]`, the number of each window in the file.
        num_windows_in_file: How many windows the file has.
        labels: `[T]`, what the file calls each window; ``None`` where it names none.
        path: The file.
        format: What kind of file it is, in words.
    """

    loads: npt.NDArray[np.float64]
    layer_ids: tuple[int, ...]
    empty_layers: tuple[int, ...]
    windows: tuple[int, ...]
    num_windows_in_file: int
    labels: tuple[str, ...] | None
    path: Path
    format: str

    @property
    def total(self) -> npt.NDArray[np.float64]:
        """`[L, E]` float64, the sum over the windows: what :meth:`eplb_rs.Planner.plan` takes."""
        total: npt.NDArray[np.float64] = self.loads.sum(axis=0)
        return total

    def __repr__(self) -> str:
        windows, layers, experts = self.loads.shape
        return (
            f"<LoadTrace of {windows} windows x {layers} layers x {experts} experts "
            f"from {str(self.path)!r}>"
        )


def read_loads(
    path: str | os.PathLike[str],
    *,
    windows: WindowChoice = None,
    key: str | None = None,
    keep_empty_layers: bool = False,
    allow_zero: bool = False,
) -> LoadTrace:
    """Reads recorded loads from a file; its name's extension says how.

    Args:
        path: A ``.npy``, ``.npz``, ``.json``, ``.pt`` or ``.pth`` file; see the module.
        windows: Which windows to take: ``None`` or ``"all"``; ``"last"``; a number, from the end
            if negative (``3``, ``"-1"``); a range (``"0:4"``, ``slice(0, 4)``), read as Python
            reads it; or the label of some (``"law"``).
        key: Which array of an ``.npz``, or which field of a ``.json`` or ``.pt``; needed where
            that is not plain.
        keep_empty_layers: Keep layers without any load. By default those that carry none in any
            window of the file, a model's dense layers, are left out.
        allow_zero: Take loads that are all zero, which give an even plan. By default they are
            refused, since recorders that were never started write such files.

    Returns:
        The loads of the chosen windows, with the numbers of their layers.

    Raises:
        InvalidInputError: For the file, ``missing_file``, ``not_a_file``, ``unreadable_file``,
            ``empty``, ``truncated``, ``too_large``, ``unknown_format``, ``not_json``,
            ``wrong_format``, ``unsafe_pickle`` or ``missing_dependency``; for what it holds,
            ``ragged``, ``wrong_dtype``, ``wrong_shape``, ``not_finite``, ``negative``,
            ``inconsistent`` or ``all_zero``; ``missing_key`` for a key; ``out_of_range`` or
            ``wrong_type`` for windows.

    Cost: for six million numbers, about 0.2 s from an array and 2.5 s from JSON.

    Example:
        >>> from eplb_rs.loads import read_loads
        >>> trace = read_loads("examples/data/deepseek_r1_1k1k.json")
        >>> trace.loads.shape, trace.empty_layers
        ((1, 58, 256), (0, 1, 2))
    """
    file = LoadFile(path, _READERS)
    array, labels, kind = _READERS[file.suffix](file, key)
    array = _windowed(file, array)
    _check_values(file, array)
    if labels is not None and len(labels) != len(array):
        raise file.refusal(
            "inconsistent",
            f"{len(labels)} labels for {len(array)} windows",
            "a trace with one label for each window",
        )
    chosen = chosen_windows(windows, len(array), labels)

    used: npt.NDArray[np.bool_] = np.asarray(array.any(axis=(0, 2)))
    kept = used | (keep_empty_layers or (allow_zero and not used.any()))
    layers, empty = np.flatnonzero(kept), np.flatnonzero(~kept)
    loads = array[np.ix_(np.array(chosen), layers)].astype(np.float64, copy=False)
    if not allow_zero and not loads.any():
        raise file.refusal(
            "all_zero",
            "every count is zero" + (f" in windows {windows}" if used.any() else ""),
            "a recording that counted something",
            "recorders that were never started write zeros; `allow_zero` takes them, as an even "
            "plan",
        )
    loads.flags.writeable = False
    return LoadTrace(
        loads=loads,
        layer_ids=tuple(layers.tolist()),
        empty_layers=tuple(empty.tolist()),
        windows=tuple(chosen),
        num_windows_in_file=len(array),
        labels=None if labels is None else tuple(labels[window] for window in chosen),
        path=file.path,
        format=kind,
    )


_READERS: dict[str, Reader] = {
    ".npy": read_npy,
    ".npz": read_npz,
    ".json": read_json,
    ".pt": read_torch,
    ".pth": read_torch,
}


def _windowed(file: LoadFile, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array as `[T, L, E]`."""
    if array.size == 0:
        raise file.refusal("empty", f"shape {array.shape}", "at least one layer of one expert")
    if array.ndim == 2:
        return array[None]
    if array.ndim != 3:
        raise file.refusal(
            "wrong_shape",
            f"{array.ndim} dimensions, shape {array.shape}",
            "of shape [layers, experts] or [windows, layers, experts]",
        )
    return array


def _check_values(file: LoadFile, array: npt.NDArray[Any]) -> None:
    # One pass for sound files: the smallest of numbers with a NaN among them is NaN.
    if array.min() >= 0 and (array.dtype.kind != "f" or array.max() < np.inf):
        return
    not_finite = ~np.isfinite(array)
    bad, code, expected = (
        (not_finite, "not_finite", "of finite loads")
        if not_finite.any()
        else (array < 0, "negative", "of loads of at least 0")
    )
    window, layer, expert = np.unravel_index(np.argmax(bad), bad.shape)
    value = array[window, layer, expert].item()
    where = f"window {window}, " * (len(array) > 1) + f"layer {layer}, expert {expert}"
    more = int(bad.sum()) - 1
    raise file.refusal(code, f"{value} at {where}" + f" and {more} more" * (more > 0), expected)
