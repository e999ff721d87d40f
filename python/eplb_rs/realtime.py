"""Real time: one layer, planned in microseconds from the exact load of this micro-batch.

Experts keep their home slots: expert `e` lives on rank `e // home_slots`. Each rank has a few spare
slots as well, which are filled anew for each layer and micro-batch. The plan says which expert is
copied into which spare slot and how many of its tokens each copy takes, so that the largest rank
load is small with few copies.

>>> from eplb_rs.realtime import StepPlanner
>>> planner = StepPlanner(num_ranks=3, home_slots=2, spare_slots=1)
>>> step = planner.plan([90, 30, 20, 10, 15, 15])
>>> step.experts.tolist()  # of each rank, what its spare slot gets; -1 is nothing
[[-1], [0], [0]]
>>> step.tokens.tolist()
[[0], [30], [30]]
>>> step.level, step.imbalance
(60, 1.0)

Letters: D ranks, E experts, S spare slots a rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from eplb_rs import _core
from eplb_rs._inputs import as_count, as_integers, check_int64, wrong_type
from eplb_rs.errors import InvalidInputError

if TYPE_CHECKING:
    from eplb_rs._inputs import LoadLike

__all__ = ["Step", "StepBuffers", "StepLimits", "StepPlanner", "StepResult"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLimits:
    """What a plan of a step may use; by default all there is.

    Attributes:
        target_imbalance: The largest over the mean rank load at which more copies are not worth
            it; 1 asks for the least there is. 1.01 saves up to a third of the copies.
        max_copies: The most copies in all; ``None`` for no limit.
        max_out: The most copies of the experts of one home rank, which has to send their weights.
        max_in: The most copies into one rank, spare slots permitting.
        min_tokens: The fewest tokens that a copy is worth.
    """

    target_imbalance: float = 1.0
    max_copies: int | None = None
    max_out: int | None = None
    max_in: int | None = None
    min_tokens: int = 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepBuffers:
    """Arrays that :meth:`StepPlanner.plan_into` writes into; C-contiguous.

    Attributes:
        experts: `[D, S]` int64, the expert that is copied into each spare slot; -1 for none.
        tokens: `[D, S]` int64, how many tokens the copy takes. Its home takes what is left.
        by_source: `[D, S, D]` of the load's dtype, how many of them come from each source rank;
            or ``None``.
    """

    experts: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    by_source: npt.NDArray[Any] | None = None


class StepResult(NamedTuple):
    """What a plan achieves."""

    level: int
    """The largest number of tokens on a rank."""
    total: int
    """All tokens."""
    num_copies: int
    """How many copies are made."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """A plan of a step.

    Attributes:
        experts: `[D, S]` int64, the expert that is copied into each spare slot; -1 for none.
        tokens: `[D, S]` int64, how many tokens the copy takes. Its home takes what is left.
        by_source: `[D, S, D]`, how many of them come from each source rank; ``None`` if the load
            did not say.
        level: The largest number of tokens on a rank.
        total: All tokens.
        num_copies: How many copies are made.
    """

    experts: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    by_source: npt.NDArray[Any] | None
    level: int
    total: int
    num_copies: int

    @property
    def imbalance(self) -> float:
        """Largest over mean rank load; 1 is perfect, and what no load has."""
        return self.level * len(self.experts) / self.total if self.total else 1.0


class StepPlanner:
    """Plans one layer of experts that keep their home slots.

    At a given level, the rank furthest above it sheds tokens of its largest expert to a copy on the
    rank whose gap below the level they fit best. Where none below the level has a spare slot left, a
    rank that has one takes the copy and hands as many tokens of its own on to a copy it already
    has there. A few rounds look for the least level. Ties go to the lowest rank and expert: the same
    load gives the same bytes on every machine.

    A planner may be used from several threads; they take turns. It keeps the interpreter.

    Args:
        num_ranks: D, at most 1,024.
        home_slots: How many experts each rank is home to: `E = D x home_slots`.
        spare_slots: S.
        limits: What plans may use.

    Raises:
        InvalidInputError: ``not_positive``, ``not_integer`` or ``too_large`` for a count,
            ``out_of_range`` for a target below 1, ``wrong_type``, ``not_integer`` or ``negative``
            for a limit.

    Source: the setting is UltraEP's (2026).
    """

    __slots__ = ("_core", "_limits", "_shape")

    def __init__(
        self,
        num_ranks: int,
        home_slots: int,
        spare_slots: int,
        *,
        limits: StepLimits | None = None,
    ) -> None:
        limits = StepLimits() if limits is None else limits
        if not isinstance(limits, StepLimits):
            raise wrong_type("limits", limits, "an eplb_rs.realtime.StepLimits")
        target = limits.target_imbalance
        if isinstance(target, bool) or not isinstance(target, int | float | np.floating):
            raise wrong_type("target_imbalance", target, "a number of at least 1")
        if not math.isfinite(target) or target < 1:
            raise InvalidInputError(
                code="out_of_range",
                argument="target_imbalance",
                got=repr(target),
                expected="a number of at least 1",
                hint="it is the largest rank load over the mean",
            )
        most = (
            None if limit is None else as_count(limit, name, least=0)
            for name, limit in (
                ("max_copies", limits.max_copies),
                ("max_out", limits.max_out),
                ("max_in", limits.max_in),
            )
        )
        self._core = _core.StepPlanner(
            num_ranks,
            home_slots,
            spare_slots,
            float(target),
            (next(most), next(most), next(most)),
            as_count(limits.min_tokens, "min_tokens"),
        )
        self._limits = limits
        self._shape = (num_ranks, home_slots, spare_slots)

    @property
    def num_ranks(self) -> int:
        """D."""
        return self._shape[0]

    @property
    def home_slots(self) -> int:
        """How many experts each rank is home to."""
        return self._shape[1]

    @property
    def spare_slots(self) -> int:
        """S."""
        return self._shape[2]

    @property
    def limits(self) -> StepLimits:
        """What plans may use."""
        return self._limits

    def allocate(self, dtype: npt.DTypeLike = np.int32, *, by_source: bool = True) -> StepBuffers:
        """Buffers for :meth:`plan_into`.

        Args:
            dtype: That of the load, int32 or int64.
            by_source: Whether the load says where tokens come from.
        """
        ranks, _, spare = self._shape
        return StepBuffers(
            experts=np.full((ranks, spare), -1, dtype=np.int64),
            tokens=np.zeros((ranks, spare), dtype=np.int64),
            by_source=np.zeros((ranks, spare, ranks), dtype=dtype) if by_source else None,
        )

    def plan(self, load: LoadLike) -> Step:
        """Plans a load into new arrays.

        Args:
            load: Tokens by expert, `[E]`, or by source rank and expert, `[D, E]`; integers. With
                sources, each copy's tokens are split by source, a rank's own copy first.

        Raises:
            InvalidInputError: ``wrong_shape``, ``wrong_dtype``, ``negative`` or ``too_large`` for
                the load.
        """
        array = _as_counts(load)
        out = self.allocate(array.dtype, by_source=array.ndim == 2)
        level, total, copies = self._core.plan_into(array, out.experts, out.tokens, out.by_source)
        return Step(
            experts=out.experts,
            tokens=out.tokens,
            by_source=out.by_source,
            level=level,
            total=total,
            num_copies=copies,
        )

    def plan_into(self, load: LoadLike, out: StepBuffers) -> StepResult:
        """Plans a load into buffers, and allocates nothing for a C-contiguous int32 or int64 load.

        Args:
            load: As for :meth:`plan`; pinned memory of an engine, say.
            out: From :meth:`allocate`, or elsewhere.

        Raises:
            InvalidInputError: As :meth:`plan`; ``inconsistent`` if ``out.by_source`` is given
                for a load by expert alone; ``wrong_type``, ``wrong_dtype``, ``wrong_shape``,
                ``read_only``, ``not_contiguous`` or ``in_use`` for a buffer. The buffers are then
                as they were.

        Cost: 8 to 14 us for 256 experts on 32 ranks, with quotas by source: see
        ``benches/results/realtime.json``.
        """
        if not isinstance(out, StepBuffers):
            raise wrong_type("out", out, "a StepBuffers", "StepPlanner.allocate makes them")
        if type(load) is not np.ndarray or load.dtype not in _COUNTS or not load.flags.c_contiguous:
            load = _as_counts(load)
        return StepResult(*self._core.plan_into(load, out.experts, out.tokens, out.by_source))

    def __repr__(self) -> str:
        ranks, home, spare = self._shape
        return f"StepPlanner({ranks}, {home}, {spare}, limits={self._limits!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (*self._shape, self._limits)


_COUNTS = (np.dtype(np.int32), np.dtype(np.int64))


@lru_cache(maxsize=16)
def _made(num_ranks: int, home_slots: int, spare_slots: int, limits: StepLimits) -> StepPlanner:
    return StepPlanner(num_ranks, home_slots, spare_slots, limits=limits)


def step_planner(
    topology: _core.Topology, load: LoadLike, limits: StepLimits | None
) -> StepPlanner:
    """The planner for a load on machines whose ranks have more slots than experts at home.

    Raises:
        InvalidInputError: ``inconsistent``, ``not_multiple`` or ``too_small``, else as :class:`StepPlanner`.
    """
    if not topology.is_even:
        raise InvalidInputError(
            code="inconsistent",
            argument="topology",
            got="GPUs of unequal slots or speed, or dead ones",
            expected="GPUs that are all alike for a plan of one step",
        )
    ranks, slots = topology.num_gpus, topology.slots_per_gpu
    shape = np.shape(load)
    experts = shape[-1] if shape else 0
    if experts == 0 or experts % ranks:
        raise InvalidInputError(
            code="not_multiple",
            argument="load",
            got=f"{experts} experts",
            expected=f"of a multiple of {ranks} experts, the ranks of the topology",
        )
    home = experts // ranks
    if slots <= home:
        raise InvalidInputError(
            code="too_small",
            argument="slots_per_gpu",
            got=str(slots),
            expected=f"more than the {home} experts at home on each rank",
            hint="plan_step copies experts into spare slots",
        )
    if limits is None:
        limits = StepLimits()
    try:
        return _made(ranks, home, slots - home, limits)
    except TypeError:  # limits that cannot be hashed, whose checks say what is wrong with them
        return StepPlanner(ranks, home, slots - home, limits=limits)


def _rebuild(num_ranks: int, home_slots: int, spare_slots: int, limits: StepLimits) -> StepPlanner:
    return StepPlanner(num_ranks, home_slots, spare_slots, limits=limits)


def _as_counts(load: LoadLike) -> npt.NDArray[Any]:
    """Counts as C-contiguous int32 or int64."""
    array = as_integers(load, "load", "of integers: tokens")
    check_int64(array, "load")
    return np.ascontiguousarray(array, array.dtype if array.dtype in _COUNTS else np.int64)
