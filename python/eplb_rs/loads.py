"""Recorded expert loads, read from the files that engines and benchmarks write.

Letters: T windows, L layers, E logical experts.

=============  ====================================================================
``.npy``       An array `[L, E]` or `[T, L, E]`.
``.npz``       The same, chosen by ``key`` where the archive holds several.
``.json``      SGLang's recorder (``logical_count``, `[L, E]` or `[T, L, E]`), the
               public EPLB benchmark (``load_history``), a field chosen by ``key``,
               or a bare nested list.
``.pt, .pth``  SGLang's recorder, a dictionary with ``key``, or a tensor. Needs torch.
=============  ====================================================================

No file is trusted: none is unpickled into anything but numbers, and what a file claims to hold
is compared with its size before memory is asked for.
"""

from __future__ import annotations

import json
import math
import operator
import os
import pickle
import stat
import zipfile
import zlib
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from eplb_rs.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

__all__ = ["LoadTrace", "WindowChoice", "read_loads"]

WindowChoice: TypeAlias = str | int | slice | None

_MAX_JSON_BYTES = 2**30  # parsed, it takes some ten times that much memory
_MAX_ARRAY_BYTES = 2**32  # 4,000 windows of 58 layers x 256 experts take a tenth of it
_NUMBERS = "iuf"  # NumPy's kinds: signed, unsigned, floating


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
    file = _File(path)
    array, labels, kind = file.reader(file, key)
    array = _windowed(file, array)
    _check_values(file, array)
    if labels is not None and len(labels) != len(array):
        raise file.refusal(
            "inconsistent",
            f"{len(labels)} labels for {len(array)} windows",
            "a trace with one label for each window",
        )
    chosen = _chosen_windows(windows, len(array), labels)

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


class _Content(NamedTuple):
    """What a reader found: an array of any shape and of numbers, checked no further."""

    array: npt.NDArray[Any]
    labels: list[str] | None
    kind: str


class _File:
    """A regular file with a known extension."""

    path: Path
    size: int
    reader: Callable[[_File, str | None], _Content]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            self.path = Path(os.fsdecode(path))
        except TypeError:
            raise InvalidInputError(
                code="wrong_type", argument="path", got=repr(path), expected="the path of a file"
            ) from None
        try:
            status = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            raise self.refusal("missing_file", "no such file", "a file that exists") from None
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
            raise self.refusal("unreadable_file", _first_line(error), "a file's path") from None
        if not stat.S_ISREG(status.st_mode):
            what = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise self.refusal("not_a_file", what, "a file of recorded loads")
        reader = _READERS.get(self.path.suffix.lower())
        if reader is None:
            raise self.refusal(
                "unknown_format",
                f"extension {self.path.suffix!r}",
                "a file named .npy, .npz, .json, .pt or .pth",
            )
        if status.st_size == 0:
            raise self.refusal("empty", "0 bytes", "a file of recorded loads")
        self.size = status.st_size
        self.reader = reader

    def refusal(self, code: str, got: str, expected: str, hint: str = "") -> InvalidInputError:
        """What is wrong with this file."""
        return InvalidInputError(
            code=code, argument="path", got=f"{self.path}: {got}", expected=expected, hint=hint
        )

    def check_size(self, num_bytes: int, limit: int) -> None:
        """Refuses content too large to be recorded loads."""
        if num_bytes > limit:
            raise self.refusal(
                "too_large",
                f"{num_bytes:,} bytes",
                f"at most {limit:,} bytes",
                "choose or sum the windows before saving them",
            )


# Readers, one for each kind of file


def _read_npy(file: _File, key: str | None) -> _Content:
    if key is not None:
        raise InvalidInputError(
            code="missing_key",
            argument="key",
            got=repr(key),
            expected="left out, for a .npy file holds one array",
        )
    try:
        with file.path.open("rb") as stream:
            return _Content(_npy_array(file, stream, file.size), None, "NumPy array")
    except OSError as error:
        raise file.refusal("unreadable_file", _first_line(error), "readable") from None


def _read_npz(file: _File, key: str | None) -> _Content:
    try:
        with zipfile.ZipFile(file.path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if key is None and len(members) == 1:
                key = next(iter(members))
            if key not in members:
                raise _no_such_key(key, members, "an array of the archive")
            with archive.open(members[key]) as stream:
                array = _npy_array(file, stream, members[key].file_size)
                stream.read(1)  # at its end, the checksum is compared
    except (OSError, EOFError, RuntimeError, NotImplementedError) as error:
        raise file.refusal("unreadable_file", _first_line(error), "a whole .npz archive") from None
    except (zipfile.BadZipFile, zlib.error) as error:
        raise file.refusal(
            "truncated",
            _first_line(error),
            "a whole .npz archive",
            "it was cut short, or is something else",
        ) from None
    return _Content(array, None, f"NumPy archive, {key}")


def _read_json(file: _File, key: str | None) -> _Content:
    file.check_size(file.size, _MAX_JSON_BYTES)
    try:
        text = file.path.read_bytes()
    except OSError as error:
        raise file.refusal("unreadable_file", _first_line(error), "readable") from None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        cut = isinstance(error, json.JSONDecodeError) and not error.doc[error.pos :].strip()
        raise file.refusal(
            "truncated" if cut else "not_json",
            _first_line(error),
            "JSON that is whole",
            "it ends too early" if cut else "",
        ) from None
    del text
    if isinstance(content, list):
        if key is not None:
            raise _no_such_key(key, (), "a field; this file holds a bare list")
        return _Content(_array_of_lists(file, content), None, "JSON list")
    if not isinstance(content, dict):
        raise file.refusal("wrong_format", f"JSON of one {type(content).__name__}", _EXPECTED_JSON)
    if key is None and "load_history" in content:
        counts = _load_history(file, content["load_history"])
        return _Content(counts, _labels(content), "load history")
    value, kind = _chosen_field(file, content, key)
    if not isinstance(value, list):
        raise file.refusal(
            "wrong_format", f"{kind} is no list, but {type(value).__name__}", _EXPECTED_JSON
        )
    return _Content(_array_of_lists(file, value), _labels(content), kind)


def _read_torch(file: _File, key: str | None) -> _Content:
    file.check_size(file.size, _MAX_ARRAY_BYTES)
    try:
        import torch
    except ImportError:
        raise file.refusal(
            "missing_dependency",
            "torch is not installed",
            "read by torch",
            "pip install 'eplb-rs[torch]'",
        ) from None
    try:
        content = torch.load(file.path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # What else torch says is advice to unpickle it all the same.
        reason = str(error).partition("WeightsUnpickler error: ")[2].partition("\n")[0]
        raise file.refusal(
            "unsafe_pickle",
            _shortened(reason, 160) or "a pickle of something else",
            "a file of tensors, lists and numbers alone",
            "nothing else is unpickled, for that could run code",
        ) from error
    except Exception as error:  # torch says what it finds in a broken file in many ways
        raise file.refusal(
            "unreadable_file",
            _first_line(error),
            "a file that torch.save wrote",
            "it was cut short, or is something else",
        ) from error
    kind = "torch tensor"
    if isinstance(content, dict):
        content, kind = _chosen_field(file, content, key)
    elif key is not None:
        raise _no_such_key(key, (), "a field; this file holds no dictionary")
    if isinstance(content, list):
        return _Content(_array_of_lists(file, content), None, kind)
    if not isinstance(content, torch.Tensor):
        raise file.refusal("wrong_format", f"a {type(content).__name__}", "a tensor of counts")
    return _Content(_array_of_tensor(file, content), None, kind)


_READERS: dict[str, Callable[[_File, str | None], _Content]] = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".json": _read_json,
    ".pt": _read_torch,
    ".pth": _read_torch,
}


# What readers share

_EXPECTED_LISTS = "lists of numbers, [layers][experts] or [windows][layers][experts]"
_EXPECTED_JSON = (
    "JSON with `logical_count` (SGLang's recorder) or `load_history` (the EPLB benchmark), "
    f"or {_EXPECTED_LISTS}"
)


def _npy_array(file: _File, stream: IO[bytes], size: int) -> npt.NDArray[Any]:
    """The array in a stream of `size` bytes; its header is compared with them beforehand."""
    try:
        # Version 2.0 is for long headers. Later ones are for fields with names, not for numbers.
        version = np.lib.format.read_magic(stream)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, _, dtype = read_header(stream)
        if min(shape, default=0) < 0:
            raise ValueError(f"shape {shape}")  # refused like any bad header
    except (OSError, zipfile.BadZipFile, zlib.error):
        raise
    except Exception as error:  # a header is parsed as Python, and fails in as many ways
        cut = size < 128
        raise file.refusal(
            "truncated" if cut else "wrong_format",
            _first_line(error),
            "an array that numpy.save wrote",
        ) from error
    if dtype.kind not in _NUMBERS:
        raise file.refusal(
            "wrong_dtype",
            f"dtype {dtype}",
            "of integers or floating-point numbers",
            "Python objects are never unpickled; save an array of numbers"
            if dtype.hasobject
            else "",
        )
    num_bytes = math.prod(shape) * dtype.itemsize
    file.check_size(num_bytes, _MAX_ARRAY_BYTES)
    if num_bytes > size - stream.tell():
        raise file.refusal(
            "truncated",
            f"{size - stream.tell():,} bytes for an array {shape} of {num_bytes:,}",
            "a whole file",
        )
    stream.seek(0)
    return np.lib.format.read_array(stream, allow_pickle=False)


def _array_of_tensor(file: _File, tensor: torch.Tensor) -> npt.NDArray[Any]:
    import torch

    if tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise file.refusal(
            "wrong_dtype", f"dtype {tensor.dtype}", "of integers or floating-point numbers"
        )
    file.check_size(tensor.numel() * 8, _MAX_ARRAY_BYTES)  # a view may claim more than it stores
    try:
        return tensor.detach().to(device="cpu", dtype=torch.float64).numpy()
    except Exception as error:  # tensors without storage, sparse ones
        raise file.refusal(
            "wrong_dtype",
            f"{tensor.dtype} tensor on {tensor.device}: {_first_line(error)}",
            "a tensor of plain numbers",
        ) from error


def _array_of_lists(file: _File, rows: list[Any]) -> npt.NDArray[np.float64]:
    """Nested lists of numbers as an array.

    Level by level and by hand, since NumPy would read strings as numbers and truth values as
    counts, and cannot say which row is ragged.
    """
    shape = [len(rows)]
    level = rows
    while level and isinstance(level[0], list):
        if len(shape) == 3:
            raise file.refusal("wrong_shape", "lists of more than three levels", _EXPECTED_LISTS)
        lengths = [len(row) if isinstance(row, list) else -1 for row in level]
        if min(lengths) != max(lengths):
            row = next(index for index, length in enumerate(lengths) if length != lengths[0])
            raise file.refusal(
                "ragged",
                f"row {list(map(int, np.unravel_index(row, shape)))} has "
                + (f"{lengths[row]} entries" if lengths[row] >= 0 else "no entries: a number")
                + f", the first {lengths[0]}",
                f"{_EXPECTED_LISTS}, all of one length",
            )
        shape.append(lengths[0])
        level = list(chain.from_iterable(level))
    others = set(map(type, level)) - {int, float}
    if others:
        names = ", ".join(sorted(_JSON_NAMES.get(other, other.__name__) for other in others))
        raise file.refusal("wrong_dtype", f"entries that are {names}", "of numbers alone")
    try:
        return np.fromiter(level, dtype=np.float64, count=len(level)).reshape(shape)
    except OverflowError as error:
        raise file.refusal("not_finite", _first_line(error), "of numbers within float64") from None


_JSON_NAMES = {bool: "true or false", dict: "objects", list: "lists", str: "strings"} | {
    type(None): "null"
}


def _load_history(file: _File, history: Any) -> npt.NDArray[np.float64]:
    """The counts of each window, in the public benchmark's format."""
    if not isinstance(history, list):
        got = f"load_history is no list, but {type(history).__name__}"
        raise file.refusal("wrong_format", got, "a list of windows")
    for number, window in enumerate(history):
        if not isinstance(window, dict) or not isinstance(window.get("logical_expert_load"), list):
            raise file.refusal(
                "wrong_format",
                f"window {number} of load_history has no list `logical_expert_load`",
                'a list of windows, each {"logical_expert_load": [layers][experts]}',
            )
    counts = _array_of_lists(file, [window["logical_expert_load"] for window in history])
    if counts.size and counts.ndim != 3:
        raise file.refusal(
            "wrong_shape",
            f"load_history of shape {counts.shape}",
            "a list of windows, each [layers][experts]",
        )
    return counts


def _labels(content: dict[str, Any]) -> list[str] | None:
    labels = content.get("labels")
    if isinstance(labels, list) and labels and all(isinstance(label, str) for label in labels):
        return labels
    return None


def _chosen_field(file: _File, content: dict[Any, Any], key: str | None) -> tuple[Any, str]:
    """The counts in a dictionary, and where they were found, in words."""
    if key is not None:
        if key not in content:
            raise _no_such_key(key, content, "a field of the file")
        return content[key], f"field {key}"
    if "logical_count" in content:
        return content["logical_count"], "SGLang recorder"
    raise file.refusal(
        "wrong_format",
        f"fields {_listed(content)}",
        _EXPECTED_JSON,
        "SGLang: record with --expert-distribution-recorder-mode stat"
        if "records" in content
        else "key chooses another field",
    )


def _no_such_key(key: str | None, keys: Any, expected: str) -> InvalidInputError:
    return InvalidInputError(
        code="missing_key",
        argument="key",
        got=repr(key),
        expected=expected,
        hint=f"there are: {_listed(keys)}" if keys else "leave it out",
    )


def _listed(names: Any, most: int = 8) -> str:
    texts = [_shortened(str(name), 40) for name in names]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" * (len(texts) > most))


# What every file goes through


def _windowed(file: _File, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
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


def _check_values(file: _File, array: npt.NDArray[Any]) -> None:
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


def _chosen_windows(choice: WindowChoice, num: int, labels: list[str] | None) -> list[int]:
    numbers = list(range(num))
    wanted = _selection(choice, labels)
    if isinstance(wanted, str):
        chosen = [number for number in numbers if labels is not None and labels[number] == wanted]
    elif isinstance(wanted, slice):
        chosen = numbers[wanted]
    else:
        chosen = [numbers[wanted]] if -num <= wanted < num else []
    if not chosen:
        raise InvalidInputError(
            code="out_of_range",
            argument="windows",
            got=repr(choice),
            expected=f"one of the file's {num} windows at least",
            hint=f"they are numbered 0 to {num - 1}",
        )
    return chosen


def _selection(choice: WindowChoice, labels: list[str] | None) -> str | int | slice:
    """What is chosen: a label, a number or a range."""
    text = choice.strip() if isinstance(choice, str) else None
    if choice is None or text == "all":
        return slice(None)
    if text == "last":
        return -1
    if text is not None and labels is not None and text in labels:
        return text
    try:
        if isinstance(choice, slice):
            choice.indices(1)  # refuses bounds that are no numbers, and steps of 0
            return choice
        if text is None:
            return operator.index(choice)  # type: ignore[arg-type]  # refuses what is no number
        start, colon, stop = text.partition(":")
        if not colon:
            return int(text)
        return slice(int(start) if start else None, int(stop) if stop else None)
    except (TypeError, ValueError):
        names = ", ".join(dict.fromkeys(labels)) if labels else ""
        raise InvalidInputError(
            code="wrong_type",
            argument="windows",
            got=_shortened(repr(choice), 80),
            expected="all, last, a number such as 3 or -1, or a range such as 0:4",
            hint=f"or a label: {_shortened(names, 120)}" if names else "",
        ) from None


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return _shortened(lines[0], 160) if lines else type(error).__name__


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."
