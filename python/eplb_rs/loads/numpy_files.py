"""Recorded loads in NumPy's files: ``.npy`` and ``.npz``."""

from __future__ import annotations

import math
import zipfile
import zlib
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from eplb_rs._inputs import NUMBERS
from eplb_rs.errors import InvalidInputError
from eplb_rs.loads.file import Content, first_line, no_such_key

if TYPE_CHECKING:
    import numpy.typing as npt

    from eplb_rs.loads.file import LoadFile

__all__ = ["read_npy", "read_npz"]


def read_npy(file: LoadFile, key: str | None) -> Content:
    """Reads a file of one array."""
    if key is not None:
        raise InvalidInputError(
            code="missing_key",
            argument="key",
            got=repr(key),
            expected="left out, for a .npy file holds one array",
        )
    try:
        with file.path.open("rb") as stream:
            return Content(_npy_array(file, stream, file.size), None, "NumPy array")
    except OSError as error:
        raise file.refusal("unreadable_file", first_line(error), "readable") from None


def read_npz(file: LoadFile, key: str | None) -> Content:
    """Reads one array of an archive, the only one or that of a name."""
    try:
        with zipfile.ZipFile(file.path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if key is None and len(members) == 1:
                key = next(iter(members))
            if key not in members:
                raise no_such_key(key, members, "an array of the archive")
            with archive.open(members[key]) as stream:
                array = _npy_array(file, stream, members[key].file_size)
                stream.read(1)  # at its end, the checksum is compared
    except (OSError, EOFError, RuntimeError, NotImplementedError) as error:
        raise file.refusal("unreadable_file", first_line(error), "a whole .npz archive") from None
    except (zipfile.BadZipFile, zlib.error) as error:
        raise file.refusal(
            "truncated",
            first_line(error),
            "a whole .npz archive",
            "it was cut short, or is something else",
        ) from None
    return Content(array, None, f"NumPy archive, {key}")


def _npy_array(file: LoadFile, stream: IO[bytes], size: int) -> npt.NDArray[Any]:
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
            first_line(error),
            "an array that numpy.save wrote",
        ) from error
    if dtype.kind not in NUMBERS:
        raise file.refusal(
            "wrong_dtype",
            f"dtype {dtype}",
            "of integers or floating-point numbers",
            "Python objects are never unpickled; save an array of numbers"
            if dtype.hasobject
            else "",
        )
    num_bytes = math.prod(shape) * dtype.itemsize
    file.check_size(num_bytes, file.MAX_ARRAY_BYTES)
    if num_bytes > size - stream.tell():
        raise file.refusal(
            "truncated",
            f"{size - stream.tell():,} bytes for an array {shape} of {num_bytes:,}",
            "a whole file",
        )
    stream.seek(0)
    return np.lib.format.read_array(stream, allow_pickle=False)
