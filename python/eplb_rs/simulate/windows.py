"""The windows of a trace as they are replayed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from eplb_rs._inputs import as_load, wrong_type
from eplb_rs.errors import InvalidInputError
from eplb_rs.loads import LoadTrace

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from eplb_rs._inputs import Load

__all__ = ["Windows"]


class Windows:
    """Merged, float32, one at a time."""

    def __init__(self, trace: LoadTrace | npt.ArrayLike, merge: int) -> None:
        labels = trace.labels if isinstance(trace, LoadTrace) else None
        loads = trace.loads if isinstance(trace, LoadTrace) else _as_array(trace)
        if loads.ndim != 3:
            raise InvalidInputError(
                code="wrong_shape",
                argument="trace",
                got=f"{loads.ndim} dimensions, shape {loads.shape}",
                expected="of 3 dimensions, [windows, layers, experts]",
            )
        if 0 in loads.shape[1:]:
            raise InvalidInputError(
                code="empty",
                argument="trace",
                got=f"shape {loads.shape}",
                expected="windows of at least one layer of one expert",
            )
        if len(loads) // merge < 2:
            merged = f", of which {merge} make one" if merge > 1 else ""
            raise InvalidInputError(
                code="too_small",
                argument="trace",
                got=f"{len(loads)} windows{merged}",
                expected="at least 2: one to plan from, one to meet",
                hint="a recording in windows, or fewer merged into one",
            )
        self.merge = merge
        self.shape: tuple[int, int] = loads.shape[1:]
        self._loads = loads
        self.labels = None
        if labels is not None:
            starts = range(merge, len(self) * merge, merge)
            self.labels = tuple(_joined(labels[start : start + merge]) for start in starts)

    def __len__(self) -> int:
        return len(self._loads) // self.merge

    def __iter__(self) -> Iterator[Load]:
        for start in range(0, len(self) * self.merge, self.merge):
            window = self._loads[start]
            if self.merge > 1:
                window = self._loads[start : start + self.merge].sum(axis=0, dtype=np.float64)
            yield as_load(window, "trace")


def _as_array(trace: Any) -> npt.NDArray[Any]:
    try:
        return np.asarray(trace)
    except Exception as error:  # whatever an object's own conversion raises
        expected = "an array [windows, layers, experts], or what read_loads returns"
        raise wrong_type("trace", trace, expected) from error


def _joined(labels: Sequence[str]) -> str:
    return "/".join(dict.fromkeys(labels))
