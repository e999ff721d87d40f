"""Choosing: layers into stages, and a schedule with its number of micro-batches.

Letters: P ranks, S stages, L layers. Times are in any one unit, bytes in bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from eplb_rs import _core

from dualpipe._arguments import link_numbers, numbers, one_of, whole_number
from dualpipe._values import ByValue
from dualpipe.errors import ScheduleError
from dualpipe.schedule import METHODS, Schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Candidate", "Layers", "Machine", "Partition", "partition", "search"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Layers(ByValue):
    """What the layers of a model cost for one micro-batch, embedding and head included.

    A single number stands for all layers; one of the three times must be an array.
    """

    forward: npt.ArrayLike
    """Time of F, `[L]`."""
    backward_input: npt.ArrayLike | None = None
    """Time of I, `[L]`; by default that of F."""
    backward_weight: npt.ArrayLike | None = None
    """Time of W, `[L]`; by default that of F."""
    parameter_bytes: npt.ArrayLike = 0
    """Held all the time: parameters, gradients, optimizer state, `[L]`."""
    activation_bytes: npt.ArrayLike = 0
    """Kept by one micro-batch from F to the end of its backward, `[L]`."""
    message_bytes: npt.ArrayLike = 0
    """A layer's output, sent on where the next layer lives elsewhere, `[L]`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Machine(ByValue):
    """The ranks and the links between them."""

    rank_factor: npt.ArrayLike = 1.0
    """How many times slower each rank is, `[P]`."""
    latency: npt.ArrayLike = 0.0
    """Time from a message's last byte leaving to its being there, `[P, P]`."""
    bandwidth: npt.ArrayLike = math.inf
    """Bytes a unit of time, `[P, P]`."""
    overlap_factor: float = 1.0
    """What an overlapped pair takes, as a part of its halves one after the other."""
    pairs: Literal["atomic", "early_forward"] = "atomic"
    """When a pair hands out its forward's result; see :meth:`Schedule.simulate`."""
    sends: Literal["asynchronous", "blocking"] = "asynchronous"
    """When a rank goes on after a send."""
    max_bytes: int | None = None
    """What a rank may hold."""


@dataclass(frozen=True, eq=False)
class Partition(ByValue):
    """Layers cut into stages: stage s holds layers `bounds[s]` to `bounds[s + 1]`."""

    bounds: tuple[int, ...]
    """`[S + 1]`."""
    makespan: float
    """The simulated makespan."""
    lower_bound: float
    """No cut has a shorter makespan."""
    exact: bool
    """Whether every cut was tried, so that this one is optimal."""
    rank_bytes: npt.NDArray[np.uint64] = field(repr=False)
    """What each rank holds at most, parameters included, `[P]`."""
    bubble_ratio: float
    """The part of all ranks' time in which no one computes."""
    num_simulations: int = field(repr=False)
    """Cuts simulated."""
    gap: float
    """How far from optimal it may be at most, as a part; 0 where it is exact."""


@dataclass(frozen=True, eq=False)
class Candidate(ByValue):
    """One combination that :func:`search` has tried."""

    method: str
    """The schedule."""
    num_ranks: int
    """P."""
    num_micro_batches: int
    """M."""
    stages_per_rank: int | None
    """Stages a rank, where that was chosen."""
    partition: Partition | None
    """The cut; None where the combination cannot be or does not fit."""
    time_per_micro_batch: float
    """Makespan / M; infinite without a cut."""
    wins_below_overlap: float | None
    """For schedules with overlapped pairs: below this part of their halves' time they beat the
    best schedule without pairs at the same M."""
    why: str
    """Why it stands where it stands, in words."""

    def schedule(self) -> Schedule:
        """The schedule itself."""
        return Schedule.generate(
            self.method,
            self.num_ranks,
            self.num_micro_batches,
            stages_per_rank=self.stages_per_rank,
        )


def partition(
    layers: Layers,
    method: str,
    num_ranks: int,
    num_micro_batches: int,
    *,
    stages_per_rank: int | None = None,
    machine: Machine | None = None,
    max_simulations: int = 4000,
) -> Partition:
    """Cuts layers into the stages of a schedule so that its simulated makespan is shortest.

    All cuts are tried where there are at most `max_simulations`; otherwise layers are moved
    between stages, from two cuts that are optimal for bounds of the makespan, as long as that
    helps, and `gap` says how far from optimal the answer may be at most.

    Args:
        layers: What the layers cost for one micro-batch.
        method: The schedule, one of :data:`METHODS`.
        num_ranks: P.
        num_micro_batches: M.
        stages_per_rank: As for :meth:`Schedule.generate`.
        machine: Unequal ranks, links, overlap, memory; by default equal ranks and free links.
        max_simulations: How far to search.

    Raises:
        ScheduleError: ``too_few_layers``, ``memory`` where no cut that was found fits,
            ``negative_time``, ``length``; and as :meth:`Schedule.generate`.

    Cost: `max_simulations` times :meth:`Schedule.simulate` at most.
    """
    found = _core.partition_layers(
        _layer_arrays(layers),
        str(method),
        whole_number(num_ranks, "num_ranks"),
        whole_number(num_micro_batches, "num_micro_batches"),
        None if stages_per_rank is None else whole_number(stages_per_rank, "stages_per_rank"),
        _machine(machine, num_ranks, max_simulations),
    )
    return _partition(found)


def search(
    layers: Layers | Mapping[int, Layers],
    num_ranks: int,
    *,
    num_micro_batches: Sequence[int] | None = None,
    methods: Sequence[str] = METHODS,
    stages_per_rank: Sequence[int] = (2,),
    machine: Machine | None = None,
    max_simulations: int = 1000,
    progress: Callable[[int, int], object] | None = None,
) -> list[Candidate]:
    """Ranks schedules, partitions and numbers of micro-batches by time per micro-batch.

    Args:
        layers: What the layers cost for one micro-batch; or, where the batch is fixed and its
            micro-batches differ in size, that for every number of micro-batches; whole steps
            are compared then.
        num_ranks: P.
        num_micro_batches: The numbers to try; by default 2P and 4P, or the mapping's keys.
        methods: The schedules to try.
        stages_per_rank: Numbers to try for schedules that take any.
        machine: Unequal ranks, links, overlap, and the memory that a rank has.
        max_simulations: How far to search for each combination's partition.
        progress: Called after each combination with how many are done, and of how many. Its
            exceptions end the search.

    Returns:
        All combinations, the fastest a micro-batch (or a step) first; those that cannot be or do not fit come last. `why`
        says for each what decided, for example below which overlap DualPipeV would win.

    Raises:
        ScheduleError: ``nothing_to_try``, ``unknown_method``, ``negative_time``, ``length``;
            ``layers``, ``methods``, ``num_micro_batches``, ``stages_per_rank`` for what is not
            layers, or no sequence.

    Cost: `max_simulations` times :meth:`Schedule.simulate` at most, for every combination.
    """
    p = whole_number(num_ranks, "num_ranks")
    if isinstance(layers, Mapping):
        loads = [
            (whole_number(m, "num_micro_batches"), _layer_arrays(c)) for m, c in layers.items()
        ]
    else:
        counts = (2 * p, 4 * p) if num_micro_batches is None else num_micro_batches
        arrays = _layer_arrays(layers)
        several = _several(counts, "num_micro_batches")
        loads = [(whole_number(m, "num_micro_batches"), arrays) for m in several]
    tried = _core.search_schedules(
        p,
        [str(method) for method in _several(methods, "methods")],
        (loads, isinstance(layers, Mapping)),
        [whole_number(v, "stages_per_rank") for v in _several(stages_per_rank, "stages_per_rank")],
        _machine(machine, p, max_simulations),
        progress,
    )
    return [
        Candidate(method, p, m, v, None if cut is None else _partition(cut), time, wins, why)
        for method, m, v, cut, time, wins, why in tried
    ]


def _partition(found: tuple[Any, ...]) -> Partition:
    bounds, *rest = found
    return Partition(tuple(bounds), *rest)


def _several(values: object, argument: str) -> list[Any]:
    """Values of a sequence; a lone one is a mistake that would be read letter by letter, or fail."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ScheduleError(
            code=argument,
            argument=argument,
            got=repr(values),
            expected="a sequence",
            hint=f"write [{values!r}]",
        )
    return list(values)


def _layer_arrays(layers: Layers) -> Any:
    if not isinstance(layers, Layers):
        raise ScheduleError(
            code="layers",
            argument="layers",
            got=type(layers).__name__,
            expected="Layers",
            hint="write Layers(forward=[...])",
        )
    forward = layers.forward
    times = [
        forward,
        forward if layers.backward_input is None else layers.backward_input,
        forward if layers.backward_weight is None else layers.backward_weight,
    ]
    sizes = [layers.parameter_bytes, layers.activation_bytes, layers.message_bytes]
    lengths = [len(value) for value in times + sizes if np.ndim(value) == 1]  # type: ignore[arg-type]
    if not lengths:
        raise ScheduleError(
            code="length",
            argument="layers",
            got="single numbers only",
            expected="an array with one figure for every layer",
        )
    shape = (lengths[0],)
    names = ("forward", "backward_input", "backward_weight")
    figures = [numbers(time, name, shape) for time, name in zip(times, names, strict=True)]
    names = ("parameter_bytes", "activation_bytes", "message_bytes")
    counts = [numbers(size, name, shape) for size, name in zip(sizes, names, strict=True)]
    for count, name in zip(counts, names, strict=True):
        if not np.all((count >= 0) & (count < 2.0**53)):
            raise ScheduleError(
                code="sizes", argument=name, got=str(count), expected="0 to 2**53 bytes"
            )
    return tuple(figures), tuple(count.astype(np.uint64) for count in counts)


def _machine(machine: Machine | None, p: int, max_simulations: int) -> Any:
    machine = machine or Machine()
    one_of("pairs", machine.pairs, ("atomic", "early_forward"))
    one_of("sends", machine.sends, ("asynchronous", "blocking"))
    most = machine.max_bytes
    return (
        (
            # More ranks than fit here are refused by the core.
            numbers(machine.rank_factor, "rank_factor", (min(p, 2**16),)),
            link_numbers(machine.latency, "latency", p),
            link_numbers(machine.bandwidth, "bandwidth", p),
        ),
        (
            float(numbers(machine.overlap_factor, "overlap_factor", ())[0]),
            machine.pairs == "early_forward",
            machine.sends == "blocking",
        ),
        (
            None if most is None else whole_number(most, "max_bytes", 2**53),
            whole_number(max_simulations, "max_simulations"),
        ),
    )
