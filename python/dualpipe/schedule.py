"""Schedules as data: generated, proved, simulated, exchanged.

Letters: P ranks, S stages, C copies of every stage (2 for DualPipe and Chimera, else 1), M
micro-batches of all copies together, N computations of all ranks (a pair is one).

Times are in any one unit, the same throughout; bytes are bytes per micro-batch.
"""

from __future__ import annotations

import json
import math
import operator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from eplb_rs import _core

from dualpipe.errors import ScheduleError
from dualpipe.instruction import Instruction, Kind

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

__all__ = ["METHODS", "Costs", "Peaks", "Proof", "Schedule", "Timeline"]

METHODS: tuple[str, ...] = tuple(_core.schedule_methods())
"""Every schedule that :meth:`Schedule.generate` knows."""

Transport = Literal["eager", "rendezvous", "queue"]

_TRANSPORTS: tuple[Transport, ...] = ("eager", "rendezvous", "queue")
_FORMAT = "dualpipe schedule"
_FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Costs:
    """How long instructions take, and what links cost.

    A single number stands for all stages, ranks or links.
    """

    forward: npt.ArrayLike = 1.0
    """F of every stage, `[S]`."""
    backward_input: npt.ArrayLike = 1.0
    """I of every stage, `[S]`."""
    backward_weight: npt.ArrayLike = 1.0
    """W of every stage, `[S]`."""
    backward: npt.ArrayLike | None = None
    """B of every stage, `[S]`; by default I + W."""
    overlap_factor: float = 1.0
    """What an overlapped pair takes, as a part of its forward and backward one after the other."""
    pair: npt.ArrayLike | None = None
    """Or what it takes outright, by the stage of its forward, `[S]`."""
    rank_factor: npt.ArrayLike = 1.0
    """How many times slower each rank is, `[P]`."""
    latency: npt.ArrayLike = 0.0
    """Time from a message's last byte leaving to its being there, `[P, P]`, from and to."""
    bandwidth: npt.ArrayLike = math.inf
    """Bytes a unit of time, `[P, P]`, from and to."""
    message_bytes: npt.ArrayLike = 0.0
    """The output of a stage, and so its gradient, `[S]`."""


@dataclass(frozen=True)
class Peaks:
    """The most that each rank holds at once, all `[P]`."""

    activations: npt.NDArray[np.int64]
    """Micro-batches times stages whose activations are alive: F done, B or W not."""
    kept: npt.NDArray[np.int64]
    """Of those, the most at once between I and W. I frees nothing."""
    receive_buffers: npt.NDArray[np.int64]
    """Receive buffers, from the post to the end of the instruction that uses them."""
    send_buffers: npt.NDArray[np.int64]
    """Send buffers, from the send to its wait."""
    bytes: npt.NDArray[np.uint64]
    """All of it together in bytes; 0 where no sizes were given."""


@dataclass(frozen=True)
class Proof:
    """What :meth:`Schedule.verify` has shown to hold."""

    peaks: Peaks
    """What each rank holds at most."""
    transports: tuple[str, ...]
    """The transports under which the schedule cannot deadlock."""
    num_messages: int
    """Messages between ranks."""


@dataclass(frozen=True)
class Timeline:
    """A schedule's predicted timeline.

    Not modelled: launch overhead, the time of reductions and of the optimizer, interference
    between computation and transfers, links shared by several pairs of ranks, and variation from
    one micro-batch to the next.
    """

    schedule: Schedule = field(repr=False)
    """The schedule."""
    makespan: float
    """When the last rank ends."""
    busy: npt.NDArray[np.float64] = field(repr=False)
    """Time that each rank computes, `[P]`."""
    bubble_ratio: float
    """The part of all ranks' time in which no one computes."""
    peaks: Peaks = field(repr=False)
    """What each rank holds at most."""
    op: npt.NDArray[np.int64] = field(repr=False)
    """Which instruction each computation is, of all ranks' instructions in a row, `[N]`."""
    start: npt.NDArray[np.float64] = field(repr=False)
    """When it starts, `[N]`."""
    end: npt.NDArray[np.float64] = field(repr=False)
    """When it ends, `[N]`."""
    bounds: npt.NDArray[np.int64] = field(repr=False)
    """Rank r's computations are `bounds[r]` to `bounds[r + 1]`, `[P + 1]`."""

    @property
    def idle(self) -> npt.NDArray[np.float64]:
        """Time that each rank does not compute, from 0 to the makespan, `[P]`."""
        return self.makespan - self.busy

    @property
    def bubble(self) -> float:
        """The least idle time of any rank: what the schedule itself costs, in units of time."""
        return float(self.idle.min())

    def plot(self, path: str | os.PathLike[str] | None = None, **options: Any) -> Any:
        """Draws it; see :func:`dualpipe.draw.plot`."""
        from dualpipe.draw import plot

        return plot(self, path, **options)

    def to_perfetto(self, path: str | os.PathLike[str] | None = None, **options: Any) -> str:
        """A trace for ui.perfetto.dev; see :func:`dualpipe.draw.to_perfetto`."""
        from dualpipe.draw import to_perfetto

        return to_perfetto(self, path, **options)


class Schedule:
    """The instruction stream of every rank.

    Schedules come from :meth:`generate`, :meth:`parse`, :meth:`from_csv`, :meth:`from_json` and
    :meth:`load`. They are well formed and do not change; unless ``check=False`` was asked for,
    they are also proved right. Two are equal if they have the same name, placement and streams.
    """

    _inner: _core.Schedule

    def __init__(self) -> None:
        raise TypeError("schedules come from Schedule.generate, parse, from_csv, from_json, load")

    @classmethod
    def _made(cls, core: _core.Schedule, *, check: bool) -> Self:
        schedule = object.__new__(cls)
        schedule._inner = core
        if check:
            schedule.verify()
        return schedule

    # Making one

    @classmethod
    def generate(
        cls,
        method: str,
        num_ranks: int,
        num_micro_batches: int,
        *,
        stages_per_rank: int | None = None,
        forward_only: bool = False,
        transfers: bool = True,
        check: bool = True,
    ) -> Self:
        """The streams of a schedule of the field, transfers placed and proved right.

        Args:
            method: One of :data:`METHODS`; ``"zb1p"`` is ``"zb_h1"``.
            num_ranks: P, even for ``"dualpipe"`` and ``"chimera"``.
            num_micro_batches: M, of both directions together; at least 1.
            stages_per_rank: For ``"looped_bfs"``, ``"interleaved_1f1b"`` and
                ``"interleaved_zero_bubble"``, 2 by default; the others have their own number.
            forward_only: Forwards only, for inference.
            transfers: Place the transfers too.
            check: Prove the result.

        Raises:
            ScheduleError: ``unknown_method``, ``num_ranks``, ``num_micro_batches``,
                ``odd_ranks``, ``stages_per_rank``, or ``layout`` where it would be too large.

        Cost: O(instructions). For DualPipeV with 64 ranks and 512 micro-batches (524,256
        instructions) 7 to 10 ms, and 15 to 20 ms for the proof.
        """
        core = _core.Schedule.generate(
            str(method),
            _count(num_ranks, "num_ranks"),
            _count(num_micro_batches, "num_micro_batches"),
            None if stages_per_rank is None else _count(stages_per_rank, "stages_per_rank"),
            forward_only,
            transfers,
        )
        return cls._made(core, check=check)

    @classmethod
    def parse(cls, text: str, *, check: bool = True) -> Self:
        """Reads what :meth:`text` gives.

        Raises:
            ScheduleError: ``unknown_line``, ``unknown_word``, ``unknown_place``, ``torn_pair`` or
                ``text_ends`` with line and word; with ``check``, as :meth:`verify`.
        """
        return cls._made(_core.Schedule.parse(_text(text, "text")), check=check)

    @classmethod
    def from_csv(
        cls,
        csv: str,
        *,
        name: str = "csv",
        num_ranks: int | None = None,
        check: bool = True,
    ) -> Self:
        """Reads the CSV of ``torch.distributed.pipelining``: one row a rank, no header.

        Both forms (``compute_only``, ``compute_comms``) and both dialects (B the whole backward;
        or, older, B the input part and BW the whole) are told apart by their content.

        Args:
            csv: The content of the file; :meth:`load` takes a path.
            name: What to call the schedule.
            num_ranks: How many rows there must be; by default as many as there are.
            check: Prove the schedule. PyTorch itself accepts files that cannot run.

        Raises:
            ScheduleError: ``unknown_word`` with row and cell, ``torn_pair``, ``missing_row``,
                ``two_ranks`` for a stage on two ranks, ``mixed_dialects``, ``idle_cells``,
                ``no_transfers``, ``name``; with ``check``, as :meth:`verify`.
        """
        core = _core.Schedule.from_csv(_text(csv, "csv"), name)
        if num_ranks is not None and core.num_ranks != num_ranks:
            raise ScheduleError(
                code="missing_row",
                argument="csv",
                got=f"{core.num_ranks} rows",
                expected=f"{num_ranks} rows, one for every rank",
                hint="the file is cut off, or was made for another number of ranks",
            )
        return cls._made(core, check=check)

    @classmethod
    def from_json(cls, text: str, *, check: bool = True) -> Self:
        """Reads what :meth:`to_json` gives.

        Raises:
            ScheduleError: ``json`` where it is not such a document; otherwise as :meth:`parse`.
        """
        try:
            document = json.loads(_text(text, "json"))
        except json.JSONDecodeError as error:
            raise _not_json(str(error)) from error
        return cls._made(_core.Schedule.parse(_text_of(document)), check=check)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, check: bool = True) -> Self:
        """Reads a file by its suffix: ``.csv``, ``.json``, or text.

        Raises:
            OSError: The file cannot be read.
            ScheduleError: As :meth:`from_csv`, :meth:`from_json`, :meth:`parse`; ``encoding`` if
                it is not UTF-8.
        """
        file = Path(path)
        try:
            # Line ends as they are: a text is read by lines, whatever ends them.
            content = file.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise ScheduleError(
                code="encoding",
                argument="path",
                got=f"{file}: {error}",
                expected="UTF-8 text",
                hint="is it a schedule at all?",
            ) from error
        if file.suffix == ".csv":
            printable = (c if c.isprintable() and c != "#" else "_" for c in file.stem.strip())
            return cls.from_csv(content, name="".join(printable) or "csv", check=check)
        if file.suffix == ".json":
            return cls.from_json(content, check=check)
        return cls.parse(content, check=check)

    # What it is

    @property
    def name(self) -> str:
        """What the schedule is called; the method, if it was generated."""
        return self._inner.name

    @property
    def num_ranks(self) -> int:
        """P."""
        return self._inner.num_ranks

    @property
    def num_stages(self) -> int:
        """S, copies not counted."""
        return self._inner.num_stages

    @property
    def num_copies(self) -> int:
        """C, how many ranks each stage lives on."""
        return self._inner.num_copies

    @property
    def micro_batches(self) -> tuple[int, ...]:
        """The micro-batches of each copy, `[C]`."""
        return tuple(self._inner.micro_batches)

    @property
    def num_micro_batches(self) -> int:
        """M, of all copies together."""
        return sum(self._inner.micro_batches)

    @cached_property
    def placement(self) -> npt.NDArray[np.int64]:
        """The rank of every copy of every stage, `[C, S]`, read-only."""
        ranks = np.array(self._inner.placement, dtype=np.int64)
        ranks = ranks.reshape(self.num_copies, self.num_stages)
        ranks.flags.writeable = False
        return ranks

    @property
    def has_transfers(self) -> bool:
        """Whether sends and receives are in the streams."""
        return self._inner.has_transfers

    @property
    def has_backward(self) -> bool:
        """Whether it trains; a schedule of forwards only is for inference."""
        return self._inner.has_backward

    def __len__(self) -> int:
        """Instructions of all ranks."""
        return len(self._inner)

    def instructions(self, rank: int) -> list[Instruction]:
        """The stream of one rank.

        Raises:
            ScheduleError: ``rank`` for one that does not exist.

        Cost: O(its instructions); the first call copies those of all ranks.
        """
        if not 0 <= _count(rank, "rank") < self.num_ranks:
            raise ScheduleError(
                code="rank",
                argument="rank",
                got=str(rank),
                expected=f"0 to {self.num_ranks - 1}",
            )
        begin, end = self._starts[rank : rank + 2]
        columns = (column[begin:end].tolist() for column in self._arrays)
        return [
            Instruction(Kind(kind), stage, micro_batch, copy)
            for kind, copy, stage, micro_batch in zip(*columns, strict=True)
        ]

    @cached_property
    def _arrays(self) -> tuple[npt.NDArray[Any], ...]:
        return self._inner.arrays()

    @cached_property
    def _starts(self) -> list[int]:
        starts: list[int] = self._inner.starts.tolist()
        return starts

    # What follows from it

    def verify(
        self,
        *,
        transports: Sequence[Transport] = _TRANSPORTS,
        activation_bytes: npt.ArrayLike | None = None,
        message_bytes: npt.ArrayLike = 0,
        max_activations: int | None = None,
        max_bytes: int | None = None,
    ) -> Proof:
        """Proves the schedule: complete, in order, paired, free of deadlock, copies reduced.

        Args:
            transports: How messages move: ``"eager"`` sends return at once, ``"rendezvous"``
                sends return once their receive is posted, ``"queue"`` has one queue for both
                directions of each pair of ranks, as an NCCL communicator has.
            activation_bytes: What one micro-batch keeps from F to the end of its backward,
                `[S]` or a number; needed for peaks in bytes.
            message_bytes: A stage's output for one micro-batch, `[S]` or a number.
            max_activations: Refuse a schedule that holds more on any rank.
            max_bytes: Likewise in bytes.

        Raises:
            DeadlockError: Ranks would wait for one another; ``waits`` says who for whom.
            ScheduleError: Another rule is broken, named by ``code``, at ``rank`` and ``index``;
                or ``transports``, ``sizes``, for arguments that cannot be.

        Cost: O(instructions), 30 to 40 ns each.
        """
        unknown = [transport for transport in transports if transport not in _TRANSPORTS]
        if unknown or not transports or isinstance(transports, str):
            raise ScheduleError(
                code="transports",
                argument="transports",
                got=repr(transports),
                expected=f"some of {', '.join(_TRANSPORTS)}",
            )
        if max_bytes is not None and activation_bytes is None:
            raise ScheduleError(
                code="sizes",
                argument="activation_bytes",
                got="None",
                expected="sizes, since `max_bytes` is given",
            )
        sizes = self._sizes(activation_bytes, message_bytes)
        activation, message = sizes if sizes is not None else (None, None)
        peaks, proven, num_messages = self._inner.verify(
            list(transports),
            activation,
            message,
            None if max_activations is None else _count(max_activations, "max_activations"),
            None if max_bytes is None else _count(max_bytes, "max_bytes", 2**53),
        )
        return Proof(Peaks(*peaks), tuple(proven), num_messages)

    def simulate(
        self,
        costs: Costs | None = None,
        *,
        sends: Literal["asynchronous", "blocking"] = "asynchronous",
        pairs: Literal["atomic", "early_forward"] = "atomic",
        activation_bytes: npt.ArrayLike | None = None,
    ) -> Timeline:
        """Predicts the timeline.

        Args:
            costs: What instructions and links take; by default F = I = W = 1 and free links.
            sends: ``"blocking"``: before its next computation a rank waits until everything it
                has sent has arrived.
            pairs: ``"atomic"``: an overlapped pair hands out both results at its end;
                ``"early_forward"``: its forward's before its backward starts.
            activation_bytes: As for :meth:`verify`; gives peaks in bytes.

        Raises:
            ScheduleError: ``negative_time``, ``length`` or ``not_a_number`` for costs that cannot
                be, ``stuck`` where blocking sends wait for one another, and as :meth:`verify`
                where the schedule cannot run to its end.

        Cost: O(instructions), about 40 ns each.
        """
        _one_of("sends", sends, ("asynchronous", "blocking"))
        _one_of("pairs", pairs, ("atomic", "early_forward"))
        costs = costs or Costs()
        s, p = self.num_stages, self.num_ranks

        def per_stage(value: npt.ArrayLike, argument: str) -> npt.NDArray[np.float64]:
            return _figures(value, argument, (s,))

        backward_input = per_stage(costs.backward_input, "backward_input")
        backward_weight = per_stage(costs.backward_weight, "backward_weight")
        backward = (
            backward_input + backward_weight
            if costs.backward is None
            else per_stage(costs.backward, "backward")
        )
        makespan, busy, bubble_ratio, peaks, spans, bounds = self._inner.simulate(
            (per_stage(costs.forward, "forward"), backward, backward_input, backward_weight),
            _figures(costs.rank_factor, "rank_factor", (p,)),
            float(_figures(costs.overlap_factor, "overlap_factor", ())[0]),
            None if costs.pair is None else per_stage(costs.pair, "pair"),
            _link_figures(costs.latency, "latency", p),
            _link_figures(costs.bandwidth, "bandwidth", p),
            per_stage(costs.message_bytes, "message_bytes"),
            sends == "blocking",
            pairs == "early_forward",
            self._sizes(activation_bytes, costs.message_bytes),
        )
        return Timeline(self, makespan, busy, bubble_ratio, Peaks(*peaks), *spans, bounds)

    def compute_only(self) -> Schedule:
        """The compute order alone: no transfers, waits or reductions."""
        return Schedule._made(self._inner.compute_only(), check=False)

    def forward_only(self) -> Schedule:
        """The forwards alone, for inference, with transfers where the schedule has them."""
        forwards = self._inner.forward_only()
        return Schedule._made(
            forwards.place_transfers() if self.has_transfers else forwards, check=False
        )

    def place_transfers(self) -> Schedule:
        """The same compute order with its transfers placed anew.

        Raises:
            ScheduleError: The compute order breaks a rule, as :meth:`verify`.
        """
        return Schedule._made(self._inner.place_transfers(), check=False)

    # Writing it

    def text(self) -> str:
        """The schedule as text that a person reads and :meth:`parse` reads back."""
        return self._inner.text()

    def to_csv(
        self,
        form: Literal["compute_only", "compute_comms"] = "compute_only",
        *,
        dialect: Literal["current", "older"] = "current",
        waits: bool = True,
    ) -> str:
        """The schedule as the CSV of ``torch.distributed.pipelining``.

        Args:
            form: With or without the transfers.
            dialect: ``"older"`` writes B for the input part and BW for the whole backward.
            waits: With ``"compute_comms"``, write WAIT_SEND_F, WAIT_SEND_B and WAIT_REDUCE_GRAD.
                PyTorch wants them from 2.14 on, and does not know them before.

        Raises:
            ScheduleError: ``bidirectional`` where stages live on two ranks, ``no_transfers``.
        """
        _one_of("form", form, ("compute_only", "compute_comms"))
        _one_of("dialect", dialect, ("current", "older"))
        return self._inner.to_csv(form == "compute_comms", dialect == "older", waits)

    def to_json(self) -> str:
        """The schedule as JSON that :meth:`from_json` reads back."""
        lines = self.text().splitlines()[-self.num_ranks :]
        document = {
            "format": _FORMAT,
            "version": _FORMAT_VERSION,
            "name": self.name,
            "num_ranks": self.num_ranks,
            "num_stages": self.num_stages,
            "micro_batches": list(self.micro_batches),
            "placement": self.placement.tolist(),
            "ranks": [line.partition(":")[2].split() for line in lines],
        }
        return json.dumps(document)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a file by its suffix: ``.csv`` (with transfers if there are any), ``.json``, text.

        Raises:
            OSError: The file cannot be written.
            ScheduleError: As :meth:`to_csv`.
        """
        file = Path(path)
        if file.suffix == ".csv":
            content = self.to_csv("compute_comms" if self.has_transfers else "compute_only")
        else:
            content = self.to_json() if file.suffix == ".json" else self.text()
        file.write_bytes(content.encode())

    def plot(self, path: str | os.PathLike[str] | None = None, **options: Any) -> Any:
        """Draws the timeline with F = I = W = 1; :meth:`Timeline.plot` for other times."""
        return self.simulate().plot(path, **options)

    def to_perfetto(self, path: str | os.PathLike[str] | None = None, **options: Any) -> str:
        """A trace for ui.perfetto.dev with F = I = W = 1; :meth:`Timeline.to_perfetto` for others."""
        return self.simulate().to_perfetto(path, **options)

    # As a value

    def __eq__(self, other: object) -> bool:
        return self._inner == other._inner if isinstance(other, Schedule) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.name, self.num_ranks, self.num_stages, self.micro_batches, len(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (self.text(),)

    def __repr__(self) -> str:
        copies = f", {self.num_copies} copies" if self.num_copies > 1 else ""
        return (
            f"<Schedule {self.name}: {self.num_ranks} ranks, {self.num_stages} stages{copies}, "
            f"{self.num_micro_batches} micro-batches, {len(self)} instructions>"
        )

    def _sizes(
        self, activation_bytes: npt.ArrayLike | None, message_bytes: npt.ArrayLike
    ) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]] | None:
        if activation_bytes is None:
            return None
        shape = (self.num_stages,)
        activation = _figures(activation_bytes, "activation_bytes", shape)
        message = _figures(message_bytes, "message_bytes", shape)
        for argument, sizes in (("activation_bytes", activation), ("message_bytes", message)):
            if not np.all((sizes >= 0) & (sizes < 2.0**53)):
                raise ScheduleError(
                    code="sizes",
                    argument=argument,
                    got=str(sizes[~((sizes >= 0) & (sizes < 2.0**53))][0]),
                    expected="0 to 2**53 bytes",
                )
        return activation.astype(np.uint64), message.astype(np.uint64)


def _unpickle(text: str) -> Schedule:
    return Schedule.parse(text, check=False)


def _count(value: object, argument: str, below: int = 2**32) -> int:
    """A whole number that is not negative and fits the core."""
    try:
        count = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        count = -1
    if isinstance(value, bool) or not 0 <= count < below:
        raise ScheduleError(
            code=argument, argument=argument, got=repr(value), expected="a whole number, 0 or more"
        )
    return count


def _text(value: object, argument: str) -> str:
    if not isinstance(value, str):
        raise ScheduleError(
            code="not_text",
            argument=argument,
            got=type(value).__name__,
            expected="a str",
            hint="Schedule.load reads files",
        )
    return value


def _one_of(argument: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ScheduleError(
            code=argument, argument=argument, got=repr(value), expected=" or ".join(known)
        )


def _figures(
    value: npt.ArrayLike, argument: str, shape: tuple[int, ...]
) -> npt.NDArray[np.float64]:
    """Numbers of a shape, flat; a single number stands for all."""
    try:
        figures = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ScheduleError(
            code="not_a_number", argument=argument, got=repr(value), expected="numbers"
        ) from error
    if figures.ndim == 0:
        figures = np.full(shape, figures)
    if figures.shape != shape:
        raise ScheduleError(
            code="length",
            argument=argument,
            got=f"shape {list(figures.shape)}",
            expected=f"a number, or shape {list(shape)}",
        )
    return np.ascontiguousarray(figures).ravel()


def _link_figures(value: npt.ArrayLike, argument: str, p: int) -> npt.NDArray[np.float64]:
    """One figure for all links as it is; one for each, flat."""
    single = np.ndim(value) == 0
    return _figures(value, argument, () if single else (p, p))


def _text_of(document: object) -> str:
    """A JSON document as the text that the core parses, and so checks."""
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise _not_json("not a document of that format")
    if document.get("version") != _FORMAT_VERSION:
        raise _not_json(f"version {document.get('version')!r}, not {_FORMAT_VERSION}")
    try:
        return _lines_of(document)
    except (KeyError, TypeError, ValueError) as error:
        raise _not_json(f"{type(error).__name__}: {error}") from error


def _lines_of(document: Mapping[str, Any]) -> str:
    copies = zip(document["micro_batches"], document["placement"], strict=True)
    words = [
        f"schedule {document['name']}",
        f"ranks {document['num_ranks']}, stages {document['num_stages']}",
        *(
            f"copy {copy}: {count} micro-batches through ranks {' '.join(map(str, ranks))}"
            for copy, (count, ranks) in enumerate(copies)
        ),
        *(f"rank {rank}: {' '.join(stream)}" for rank, stream in enumerate(document["ranks"])),
    ]
    return "\n".join(words)


def _not_json(what: str) -> ScheduleError:
    return ScheduleError(
        code="json",
        argument="json",
        got=what,
        expected=f"JSON with the format {_FORMAT!r}",
        hint="Schedule.to_json writes it",
    )
