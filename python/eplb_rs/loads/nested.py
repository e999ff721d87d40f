"""Counts in dictionaries and nested lists, as JSON and torch files hold them."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from eplb_rs.loads.file import first_line, listed, no_such_key

if TYPE_CHECKING:
    import numpy.typing as npt

    from eplb_rs.loads.file import LoadFile

__all__ = ["EXPECTED_JSON", "array_of_lists", "chosen_field"]

_EXPECTED_LISTS = "lists of numbers, [layers][experts] or [windows][layers][experts]"
EXPECTED_JSON = (
    "JSON with `logical_count` (SGLang's recorder) or `load_history` (the EPLB benchmark), "
    f"or {_EXPECTED_LISTS}"
)


def chosen_field(file: LoadFile, content: dict[Any, Any], key: str | None) -> tuple[Any, str]:
    """The counts in a dictionary, and where they were found, in words."""
    if key is not None:
        if key not in content:
            raise no_such_key(key, content, "a field of the file")
        return content[key], f"field {key}"
    if "logical_count" in content:
        return content["logical_count"], "SGLang recorder"
    raise file.refusal(
        "wrong_format",
        f"fields {listed(content)}",
        EXPECTED_JSON,
        "SGLang: record with --expert-distribution-recorder-mode stat"
        if "records" in content
        else "key chooses another field",
    )


def array_of_lists(file: LoadFile, rows: list[Any]) -> npt.NDArray[np.float64]:
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
        raise file.refusal("not_finite", first_line(error), "of numbers within float64") from None


_JSON_NAMES = {bool: "true or false", dict: "objects", list: "lists", str: "strings"} | {
    type(None): "null"
}
