"""Tokens over replicas: how much of each expert's load each of its slots takes.

A plan is made from the past; the load that arrives is another. Splitting each expert's tokens over
the replicas it already has, as the load now is, mends much of the difference without moving a
weight. The best split of a load is exact, and comes with a proof: a set of ranks that hold some
experts alone.

>>> import eplb_rs
>>> topology = eplb_rs.Topology(num_nodes=1, gpus_per_node=2, slots_per_gpu=2)
>>> plan = eplb_rs.Plan.from_phy2log(topology, [[0, 1, 0, 2]], [[60, 30, 10]])
>>> plan.rank_load  # split evenly
array([[60., 40.]])
>>> from eplb_rs.shares import Splitter
>>> shares = Splitter(plan).split(plan.expert_load)
>>> shares.by_slot.round(2)
array([[0.33, 1.  , 0.67, 1.  ]])
>>> shares.rank_load
array([[50., 50.]])

Letters: L layers, E logical experts, R slots, D ranks (GPUs), K entries of a table.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from eplb_rs import _core
from eplb_rs._inputs import as_count, as_integers, as_load, check_int64, converted, is_tensor
from eplb_rs.errors import InvalidInputError
from eplb_rs.plan import Plan, as_plan, rank_times

if TYPE_CHECKING:
    from eplb_rs._inputs import Load, LoadLike

__all__ = ["Shares", "Splitter"]


class Splitter:
    """Splits loads over the replicas of one plan, prepared once.

    An expert that is on a rank several times counts there once, and its slots there get equal
    parts. Where ranks differ in speed, what is least is the longest rank time, as
    :attr:`Plan.rank_time <eplb_rs.Plan.rank_time>` has it. Slots of dead ranks get nothing.

    Of the splits with the least largest rank load the answer is the one that a fixed rule finds
    (see the page on shares): the same input gives the same bytes on every machine. An expert
    without load is split evenly.

    A splitter may be used from several threads; they take turns.

    Args:
        plan: Where the experts are. Its load plays no part.

    Raises:
        InvalidInputError: ``wrong_type`` for the plan.

    Cost: O(L R); for 58 layers of 288 slots about 0.2 ms.
    """

    __slots__ = ("_core", "_plan")

    def __init__(self, plan: Plan) -> None:
        self._plan = as_plan(plan)
        self._core = _core.Splitter(self._plan._placement)

    @property
    def plan(self) -> Plan:
        """The plan whose replicas it splits over."""
        return self._plan

    def split(self, load: LoadLike) -> Shares:
        """The best split of a load: no split of this placement has a smaller largest rank load.

        Args:
            load: `[L, E]`, as for :meth:`eplb_rs.Planner.plan`.

        Raises:
            InvalidInputError: For the load, as :meth:`eplb_rs.Planner.plan`; ``wrong_shape`` for
                other layers or experts than the plan's.

        Cost: 58 layers of 256 experts on 288 slots of 32 ranks take about 0.1 ms: see
        ``benches/results/shares.json``. Lets go of the interpreter above about 50 us of work.
        """
        array = as_load(load)
        by_slot, level, rank_load, tight = self._core.split(array)
        return Shares(self, array + np.float32(0), by_slot, rank_load, level, tight)

    def uniform(self, load: LoadLike) -> Shares:
        """The split that engines make unless told otherwise: replicas share evenly.

        Args:
            load: `[L, E]`, to judge it by.

        Raises:
            InvalidInputError: As :meth:`split`.
        """
        return self._fixed(self._core.uniform(), load)

    def split_into(
        self,
        load: LoadLike,
        by_slot: npt.NDArray[np.float64],
        level: npt.NDArray[np.float64],
    ) -> None:
        """The best split of a load into arrays that are given; allocates nothing for a
        C-contiguous float32 load. Keeps the interpreter.

        Args:
            load: `[L, E]`.
            by_slot: `[L, R]` float64, C-contiguous: gets the share of each slot.
            level: `[L]` float64: gets the largest rank load, or the longest rank time where ranks
                differ in speed, in the unit of the load.

        Raises:
            InvalidInputError: As :meth:`split`; ``wrong_type``, ``wrong_dtype``, ``wrong_shape``,
                ``read_only``, ``not_contiguous`` or ``in_use`` for an array. The arrays are then
                as they were.
        """
        self._core.split_into(as_load(load), by_slot, level)

    def split_step(
        self,
        load: LoadLike,
        *,
        layer: int = 0,
        out: npt.NDArray[np.float64] | None = None,
    ) -> tuple[npt.NDArray[np.float64], float]:
        """The best split of one layer, for a serving loop.

        Args:
            load: `[E]`, tokens of each expert. Converted unless it is C-contiguous float32.
            layer: Which layer of the plan.
            out: `[R]` float64, C-contiguous: gets the shares; a new array if left out.

        Returns:
            The share of each slot, `[R]`, and the largest rank load, or the longest rank time, in
            the unit of the load.

        Raises:
            InvalidInputError: As :meth:`split`; ``out_of_range``, ``not_integer`` or
                ``negative`` for the layer; as :meth:`split_into` for ``out``.

        Cost: a few microseconds for 288 slots on 32 ranks.
        """
        row: Any = load
        if type(row) is not np.ndarray or row.dtype != np.float32 or row.ndim != 1:
            row = _as_row(load)
        elif not row.flags.c_contiguous:
            row = np.ascontiguousarray(row)
        if out is None:
            out = np.empty(self._plan.topology.num_slots)
        return out, self._core.split_step(row, layer, out)

    def split_tokens(
        self,
        tokens: npt.ArrayLike,
        *,
        layer: int = 0,
        out: npt.NDArray[np.int64] | None = None,
    ) -> tuple[npt.NDArray[np.int64], int]:
        """The best split of one layer into whole tokens.

        Args:
            tokens: `[E]`, whole numbers.
            layer: Which layer of the plan.
            out: `[R]` int64, C-contiguous: gets the tokens; a new array if left out.

        Returns:
            The tokens of each slot, `[R]`, those of an expert adding up to exactly its tokens, and
            the largest number of tokens on a rank. No split into whole tokens has a smaller one;
            or, where ranks differ in speed, a shorter longest rank time.

        Raises:
            InvalidInputError: ``wrong_dtype``, ``wrong_shape``, ``negative`` or ``too_large`` for
                the tokens; else as :meth:`split_step`.
        """
        counts = _as_tokens(tokens, 1)
        if out is None:
            out = np.empty(self._plan.topology.num_slots, dtype=np.int64)
        return out, self._core.split_tokens(counts, layer, out)

    def _fixed(self, by_slot: npt.NDArray[np.float64], load: LoadLike) -> Shares:
        array = as_load(load)
        rank_load = self._core.rank_load(array, by_slot)
        return Shares(self, array + np.float32(0), by_slot, rank_load, None, None)

    def __repr__(self) -> str:
        return f"Splitter({self._plan!r})"

    def __reduce__(self) -> tuple[type[Splitter], tuple[Plan]]:
        return Splitter, (self._plan,)


class Shares:
    """How each expert's tokens are split over its slots, and what ranks then carry.

    Comes from a :class:`Splitter`. Its arrays are read-only.
    """

    def __init__(
        self,
        splitter: Splitter,
        expert_load: Load,
        by_slot: npt.NDArray[np.float64],
        rank_load: npt.NDArray[np.float64],
        level: npt.NDArray[np.float64] | None,
        tight: npt.NDArray[np.bool_] | None,
    ) -> None:
        for array in (expert_load, by_slot, rank_load, level, tight):
            if array is not None:
                array.flags.writeable = False
        self._splitter = splitter
        self._expert_load = expert_load
        self._by_slot = by_slot
        self._rank_load = rank_load
        self._level = level
        self._tight = tight

    @property
    def plan(self) -> Plan:
        """The plan whose replicas share."""
        return self._splitter.plan

    @property
    def expert_load(self) -> Load:
        """`[L, E]` float32, the load that ranks are judged by."""
        return self._expert_load

    @property
    def by_slot(self) -> npt.NDArray[np.float64]:
        """`[L, R]` float64, the share of its expert's tokens that each slot takes; those of an
        expert add up to 1."""
        return self._by_slot

    @property
    def rank_load(self) -> npt.NDArray[np.float64]:
        """`[L, D]` float64, what each rank carries, in the unit of the load."""
        return self._rank_load

    @property
    def rank_time(self) -> npt.NDArray[np.float64]:
        """`[L, D]` float64, how long each rank takes: its load over its speed, where the mean speed
        of the ranks that are not dead counts as 1."""
        return rank_times(self.plan.topology, self._rank_load)

    @property
    def lower_bound(self) -> npt.NDArray[np.float64]:
        """`[L]` float64, the largest rank load, or the longest rank time, of the best split of this
        load: no split of this placement is below it."""
        return self._best._level  # type: ignore[return-value]

    @property
    def tight(self) -> npt.NDArray[np.bool_]:
        """`[L, D]` bool, the proof of :attr:`lower_bound`: ranks that hold some experts alone,
        whose loads, divided by the number of these ranks (or the sum of their speeds), are the
        bound. To do better, one of these experts needs a replica elsewhere."""
        return self._best._tight  # type: ignore[return-value]

    @cached_property
    def _best(self) -> Shares:
        return self if self._level is not None else self._splitter.split(self._expert_load)

    @property
    def balance(self) -> float:
        """Sum over layers of the mean rank load / sum over layers of the largest; 1 is perfect.
        Where ranks differ in speed, their times count for their loads; dead ranks count for
        nothing."""
        topology = self.plan.topology
        largest = float(self.rank_time.max(axis=1).sum())
        mean = float(self._rank_load.sum()) / (topology.num_gpus - len(topology.dead))
        return min(mean / largest, 1.0) if largest > 0 else 1.0

    @property
    def imbalance(self) -> float:
        """The inverse of the balance."""
        return 1.0 / self.balance

    def applied_to(self, load: LoadLike) -> Shares:
        """The same shares under another load: a split fixed from an estimate, judged by what came.

        Args:
            load: `[L, E]`.

        Raises:
            InvalidInputError: As :meth:`Splitter.split`.
        """
        return self._splitter._fixed(self._by_slot, load)

    def log2phy(self, width: int) -> npt.NDArray[np.int64]:
        """The shares as repeated entries of `log2phy`, `[L, E, K]` int64, -1 pads: a slot is listed
        as often as its share of the entries comes nearest.

        For engines that count an expert's non-negative entries and pick one of them: a slot that
        is listed twice gets two shares of the tokens.

        Args:
            width: K, the most entries of an expert. Each has as many of them as bring its shares
                nearest; the fewest of several. 8 entries tell shares apart to about 1/16.

        Raises:
            InvalidInputError: ``not_integer``, ``not_positive`` or ``too_large`` for the width.
        """
        return self._splitter._core.entries(self._by_slot, as_count(width, "width"))

    def quotas(self, tokens: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Tokens split by these shares into whole numbers, `[L, R]` int64.

        Each expert's add up to exactly its tokens: each slot gets the whole part of its share, and
        those with the largest remainders one more; ties go to the lowest replica.

        Args:
            tokens: `[L, E]`, whole numbers.

        Raises:
            InvalidInputError: ``wrong_dtype``, ``wrong_shape``, ``negative`` or ``too_large``.
        """
        return self._splitter._core.quotas(self._by_slot, _as_tokens(tokens, 2))

    def __reduce__(self) -> tuple[Any, ...]:
        arrays = (self._expert_load, self._by_slot, self._rank_load, self._level, self._tight)
        return Shares, (self._splitter, *arrays)

    def __repr__(self) -> str:
        layers, slots = self._by_slot.shape
        return f"<Shares of {layers} layers x {slots} slots: balance {self.balance:.4f}>"


def _as_row(load: LoadLike) -> Load:
    """One layer's load `[E]`, as C-contiguous float32."""
    array: Any = load if is_tensor(load) else converted(load, "load")
    if array.ndim != 1:
        raise InvalidInputError(
            code="wrong_shape",
            argument="load",
            got=f"{array.ndim} dimensions, shape {tuple(array.shape)}",
            expected="of 1 dimension, [experts]",
            hint="Splitter.split takes all layers",
        )
    row: Load = as_load(array[None])[0]
    return row


def _as_tokens(tokens: npt.ArrayLike, dimensions: int) -> npt.NDArray[np.int64]:
    """Whole numbers as C-contiguous int64."""
    array = as_integers(tokens, "tokens")
    if array.ndim != dimensions:
        raise InvalidInputError(
            code="wrong_shape",
            argument="tokens",
            got=f"{array.ndim} dimensions, shape {array.shape}",
            expected=f"of {dimensions} dimension{'s' * (dimensions > 1)}",
        )
    check_int64(array, "tokens")
    return np.ascontiguousarray(array, dtype=np.int64)
