"""What the next window may bring: scenarios for :meth:`eplb_rs.Planner.plan_scenarios`.

>>> import numpy as np
>>> from eplb_rs.scenarios import Outlook
>>> windows = np.array([[[90, 10, 0]], [[10, 20, 60]], [[0, 30, 60]]])  # the load shifted once
>>> outlook = Outlook(copies=5)
>>> outlook.since_shift(windows)
1
>>> outlook.scenarios(windows).shape  # two windows and five copies
(7, 1, 3)

Letters: T windows, K scenarios, L layers, E logical experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from eplb_rs import _core
from eplb_rs._inputs import as_array, as_count, as_load, as_number, is_tensor
from eplb_rs.errors import InvalidInputError
from eplb_rs.forecast import SHIFT_THRESHOLD, as_shift_threshold

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eplb_rs._inputs import Load, LoadLike

__all__ = ["Outlook"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """Makes scenarios of windows: those since the load last shifted, and copies that differ from
    them, each from one in turn, as a window to come may.

    The copies are drawn with fixed seeds: the same windows give the same scenarios, everywhere.

    How far windows differ follows from how much they hold: a count of n tokens scatters by the root
    of n if each token chooses by itself, and by some multiple of that, which several windows show,
    as tokens come in texts and loads drift. So copies of windows of a thousand tokens differ much,
    and those of millions hardly at all, unless they did before.

    Attributes:
        shift_threshold: When the load has shifted: as for
            :class:`~eplb_rs.forecast.Forecaster`, ``None`` for never.
        most_windows: The most windows that are taken, from the last back.
        copies: How many copies there are.
        spread: How many times as far copies scatter as windows have done; 0 to 100. What they
            scatter about is drawn to an even load, by as much as an expert of mean load scatters,
            as a part of its load. That part is at most .3: to plan for more gains nothing.
    """

    shift_threshold: float | None = SHIFT_THRESHOLD
    most_windows: int = 8
    copies: int = 24
    spread: float = 3.0

    @classmethod
    def for_split(cls, split: str) -> Outlook:
        """What :meth:`eplb_rs.Planner.plan_windows` uses unless it is told otherwise.

        Tokens that are split anew reach balance in all windows that have been: what helps is to
        plan for many that differ from these, the default. Even splits gain little by that: 16
        copies, which scatter less.
        """
        return cls() if split == "shares" else cls(copies=16, spread=0.6)

    def since_shift(self, windows: LoadLike) -> int:
        """The first window after the last shift; 0 if there was none.

        Args:
            windows: `[T, L, E]`, tokens per expert and layer in each window, the last one last.

        Raises:
            InvalidInputError: As :meth:`scenarios`.
        """
        array = as_scenarios(windows, "windows")
        try:
            return _core.windows_since_shift(array, as_shift_threshold(self.shift_threshold))
        except InvalidInputError as error:
            raise _of_windows(error) from None

    def scenarios(self, windows: LoadLike) -> Load:
        """The scenarios, `[K, L, E]` float32: windows from the last back, then copies.

        Args:
            windows: `[T, L, E]`, as for :meth:`since_shift`.

        Raises:
            InvalidInputError: For the windows, as for a load of :meth:`eplb_rs.Planner.plan`, of
                3 dimensions; ``out_of_range``, ``wrong_type``, ``not_integer``, ``not_positive``,
                ``negative`` or ``too_large`` for a setting.
        """
        array = as_scenarios(windows, "windows")
        settings = (
            as_shift_threshold(self.shift_threshold),
            as_count(self.most_windows, "most_windows"),
            as_count(self.copies, "copies", least=0),
            as_number(self.spread, "spread"),
        )
        try:
            return _core.outlook_scenarios(array, *settings)
        except InvalidInputError as error:
            raise _of_windows(error) from None


def as_scenarios(loads: LoadLike, argument: str) -> Load:
    """Loads `[K, L, E]` as a C-contiguous float32 array."""
    array: Any = loads if is_tensor(loads) else as_array(loads, argument)
    if array.ndim != 3:
        raise InvalidInputError(
            code="wrong_shape",
            argument=argument,
            got=f"{array.ndim} dimensions, shape {tuple(array.shape)}",
            expected=f"of 3 dimensions, [{argument}, layers, experts]",
            hint="for one load, load[None]" if array.ndim == 2 else "",
        )
    count, layers, experts = array.shape
    if 0 in (count, layers, experts):
        raise InvalidInputError(
            code="empty",
            argument=argument,
            got=f"shape {tuple(array.shape)}",
            expected="at least one load of one layer of one expert",
        )
    flat = as_load(array.reshape(count * layers, experts), argument)
    return flat.reshape(count, layers, experts)


def as_weights(
    weights: Sequence[float] | npt.NDArray[Any] | None, count: int
) -> npt.NDArray[np.float64] | None:
    """Weights `[K]` as float64."""
    if weights is None:
        return None
    array = as_array(weights, "weights")
    if array.dtype.kind not in "iuf":
        raise InvalidInputError(
            code="wrong_type",
            argument="weights",
            got=f"dtype {array.dtype}",
            expected="numbers, one for each scenario",
        )
    if array.shape != (count,):
        raise InvalidInputError(
            code="wrong_shape",
            argument="weights",
            got=f"shape {array.shape}",
            expected=f"of shape ({count},), one for each scenario",
        )
    return array.astype(np.float64)


def _of_windows(error: InvalidInputError) -> InvalidInputError:
    """The same error, where the native module speaks of scenarios and the caller of windows."""
    if error.argument != "scenarios":
        return error
    renamed = error.renamed("windows")
    assert isinstance(renamed, InvalidInputError)
    return renamed
