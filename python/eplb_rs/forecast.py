"""What the next window's load will be, from the windows that have passed.

A plan is made from the past and used in the future. An estimator says what the future is taken to
be, and how uncertain that is:

=================  =================================================================================
``last``           The last window.
``average:N``      The mean of the last N windows (8 if left out).
``mean``           The mean of all windows since the last shift of the domain.
``exponential:N``  An exponential average over a span of N windows (7 if left out): each weighs
                   `(N - 1) / (N + 1)` of the one after it.
``trend:N``        A straight line through the last N windows (4 if left out), one window on.
``shrinkage``      The last window, drawn towards the mean of all windows ever, by as much as would
                   have served best so far.
``backtest``       In each layer, whichever of :data:`BACKTESTED` has forecast best so far.
=================  =================================================================================

All but ``shrinkage`` forget what was before the last shift of the domain. Windows are added as they
are: one with more tokens weighs more.

>>> from eplb_rs.forecast import Forecaster
>>> forecaster = Forecaster(num_layers=1, num_experts=3, estimator="average:2")
>>> for window in [[[30, 20, 10]], [[20, 30, 10]]]:
...     shifted = forecaster.observe(window)
>>> forecaster.estimate()
array([[25., 25., 10.]], dtype=float32)

Letters: T windows, L layers, E logical experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from eplb_rs import _core
from eplb_rs._inputs import as_count, as_load
from eplb_rs.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from eplb_rs._inputs import Load, LoadLike

__all__ = ["BACKTESTED", "SHIFT_THRESHOLD", "Forecast", "Forecaster", "forecast", "total_variation"]

BACKTESTED = (
    "last",
    "average:2",
    "average:4",
    "average:8",
    "average:16",
    "mean",
    "exponential:3",
    "exponential:7",
    "trend:4",
    "trend:8",
    "shrinkage",
)
"""What ``backtest`` chooses from; of several that are equally good, the first."""

SHIFT_THRESHOLD = 0.15
"""By how much a window's distance must exceed the usual one for the domain to have shifted: see
:class:`Forecaster`."""

_WINDOWS = {"average": 8, "exponential": 7, "trend": 4}
"""The estimators that look back on some number of windows, and on how many by default."""


class Forecast(NamedTuple):
    """An estimate of the next window."""

    estimate: Load
    """`[L, E]` float32, in the unit of the windows."""
    uncertainty: Load
    """`[L, E]` float32, the standard deviation of its error, in the same unit."""


class Forecaster:
    """Estimates the next window's load from those it has been fed, one at a time.

    May be used from several threads; they take turns. The same windows give the same bytes on every
    machine.

    Args:
        num_layers: L.
        num_experts: E.
        estimator: As the module lists them.
        shift_threshold: When the domain has shifted, so that all windows before are forgotten.
            The distance of a window from those since the last shift is their total variation (see
            :func:`total_variation`), averaged over layers. How large it would be if each token
            chose its expert by itself follows from their numbers; the usual one is the median
            multiple of that in the last 8 windows, and once before. The domain has shifted where
            the distance exceeds the usual one by more than this. ``None`` never forgets.

    Raises:
        InvalidInputError: ``not_integer``, ``not_positive`` or ``too_large`` for a size;
            ``wrong_type``, ``unknown``, ``not_integer`` or ``out_of_range`` for the estimator;
            ``wrong_type`` or ``out_of_range`` for the threshold.

    Cost: a window of 58 layers of 256 experts takes 0.1 to 0.2 ms, under ``backtest`` 1 ms; memory for
    as many windows as the estimator looks back on (``backtest``: 16).
    """

    __slots__ = ("_core", "_estimator", "_shape")

    def __init__(
        self,
        *,
        num_layers: int,
        num_experts: int,
        estimator: str = "backtest",
        shift_threshold: float | None = SHIFT_THRESHOLD,
    ) -> None:
        name, windows = _parsed(estimator)
        self._shape = (as_count(num_layers, "num_layers"), as_count(num_experts, "num_experts"))
        threshold = as_shift_threshold(shift_threshold)
        self._core = _core.Forecaster(*self._shape, name, windows, threshold)
        self._estimator = f"{name}:{windows}" if windows else name

    @property
    def estimator(self) -> str:
        """How it estimates."""
        return self._estimator

    @property
    def num_windows(self) -> int:
        """How many windows it has been fed; those without any load do not count."""
        return self._core.num_windows

    @property
    def windows_since_shift(self) -> int:
        """How many of them came since the last shift, the first after it included."""
        return self._core.windows_since_shift

    @property
    def distance(self) -> npt.NDArray[np.float64]:
        """`[L]` float64, 0 to 1: how far each layer of the window that came last was from the mean
        of those since the last shift before it. 0 before two windows have come."""
        return self._core.distance

    @property
    def chosen(self) -> list[str]:
        """`[L]`, by which estimator each layer is estimated."""
        return [f"{name}:{windows}" if windows else name for name, windows in self._core.chosen]

    def observe(self, window: LoadLike) -> bool:
        """Feeds the window that has come.

        Past forecasts are scored before anything is learnt from it; not by a window with which the
        domain shifted, for none could know. A window without any load says nothing, and is passed
        over.

        Args:
            window: `[L, E]`, tokens, as for :meth:`eplb_rs.Planner.plan`.

        Returns:
            Whether the domain shifted with it.

        Raises:
            InvalidInputError: For the window, as :meth:`eplb_rs.Planner.plan` for its load. The
                forecaster is then as it was.
        """
        array = as_load(window, "window")
        try:
            return self._core.observe(array)
        except InvalidInputError as error:
            raise error.renamed("window") from None

    def estimate(self, out: Load | None = None) -> Load:
        """The estimate of the next window, `[L, E]` float32.

        Args:
            out: Where to write it; a new array if left out.

        Raises:
            InvalidInputError: ``too_small`` before any window has come; ``wrong_type``,
                ``wrong_dtype``, ``wrong_shape``, ``read_only``, ``not_contiguous`` or ``in_use``
                for ``out``.
        """
        if out is None:
            out = np.empty(self._shape, dtype=np.float32)
        self._core.estimate_into(out)
        return out

    def uncertainty(self, out: Load | None = None) -> Load:
        """The standard deviation of the estimate's error, `[L, E]` float32, once the layer's total
        is known.

        It is measured: from the errors of the forecasts made so far, which fade over about 16
        windows; as long as they are few, drawn towards what the errors of the whole layer say of
        an expert of this size. Before any forecast could be scored it is as large as the estimate.
        That the domain may shift is not in it.

        Args:
            out: Where to write it; a new array if left out.

        Raises:
            InvalidInputError: As :meth:`estimate`.
        """
        if out is None:
            out = np.empty(self._shape, dtype=np.float32)
        self._core.uncertainty_into(out)
        return out

    def __repr__(self) -> str:
        layers, experts = self._shape
        return (
            f"<Forecaster of {layers} layers x {experts} experts by {self._estimator}, "
            f"{self.num_windows} windows seen>"
        )


def forecast(
    windows: npt.ArrayLike | Iterable[LoadLike],
    estimator: str = "backtest",
    *,
    shift_threshold: float | None = SHIFT_THRESHOLD,
) -> Forecast:
    """The estimate of the window that follows some.

    Args:
        windows: `[T, L, E]`, or T windows `[L, E]` one after the other, oldest first.
        estimator: As the module lists them.
        shift_threshold: As for :class:`Forecaster`.

    Raises:
        InvalidInputError: As :class:`Forecaster` and :meth:`Forecaster.observe`; ``too_small`` if
            there is no window with any load, ``wrong_type`` for what is no series.

    Cost: T times that of :class:`Forecaster`.
    """
    try:
        series = iter(windows)  # type: ignore[arg-type]
    except TypeError:
        raise InvalidInputError(
            code="wrong_type",
            argument="windows",
            got=type(windows).__name__,
            expected="windows, one after the other: [windows, layers, experts]",
        ) from None
    forecaster: Forecaster | None = None
    for window in series:
        array = as_load(window, "windows")
        if forecaster is None:
            forecaster = Forecaster(
                num_layers=array.shape[0],
                num_experts=array.shape[1],
                estimator=estimator,
                shift_threshold=shift_threshold,
            )
        forecaster.observe(array)
    if forecaster is None:
        raise InvalidInputError(
            code="too_small", argument="windows", got="none", expected="at least 1"
        )
    return Forecast(forecaster.estimate(), forecaster.uncertainty())


def total_variation(load: LoadLike, other: LoadLike) -> npt.NDArray[np.float64]:
    """How far two loads are apart in each layer, `[L]` float64: the share of the tokens that would
    have to go to other experts for one to become the other, 0 to 1.

    Of a layer, the totals play no part; it is 1 where only one of the two has any load.

    Args:
        load: `[L, E]`.
        other: `[L, E]`.

    Raises:
        InvalidInputError: As :meth:`eplb_rs.Planner.plan` for its load; ``wrong_shape`` if the
            two differ in shape.
    """
    return _core.total_variation(as_load(load), as_load(other, "other"))


def _parsed(estimator: str) -> tuple[str, int]:
    """An estimator's name, and the windows it looks back on; 0 for those without."""
    if not isinstance(estimator, str):
        raise InvalidInputError(
            code="wrong_type",
            argument="estimator",
            got=type(estimator).__name__,
            expected="a name, such as 'average:8'",
        )
    known = estimator.encode(errors="replace").decode()  # lone surrogates have no UTF-8
    name, colon, number = known.partition(":")
    if name not in _WINDOWS:
        return (known if colon else name), 0  # the native module knows the other names
    if not colon:
        return name, _WINDOWS[name]
    try:
        return name, as_count(int(number), "estimator")
    except (ValueError, InvalidInputError):
        raise InvalidInputError(
            code="not_integer",
            argument="estimator",
            got=repr(known),
            expected=f"{name}:N with a whole number N of at least 1",
        ) from None


def as_shift_threshold(threshold: float | None) -> float | None:
    """The same as a float, if it is a number; the native module knows which are in range."""
    if threshold is None:
        return None
    try:
        return float(threshold)
    except (TypeError, ValueError):
        raise InvalidInputError(
            code="wrong_type",
            argument="shift_threshold",
            got=type(threshold).__name__,
            expected="a number or None",
        ) from None
