"""Schedules as data: generated, proved, simulated, exchanged.

Letters: P ranks, S stages, C copies of every stage (2 for DualPipe and Chimera, else 1), M
micro-batches of all copies together, N computations of all ranks (a pair is one).

Times are in any one unit, the same throughout; bytes are bytes per micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from eplb_rs import _core

from dualpipe._arguments import byte_sizes, one_of, string, whole_number
from dualpipe._document import json_of, text_of
from dualpipe.costs import Costs, arrays_of
from dualpipe.errors import ScheduleError
from dualpipe.instruction import Instruction, Kind
from dualpipe.proof import Peaks, Proof
from dualpipe.timeline import Timeline

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

__all__ = ["METHODS", "Schedule"]

METHODS: tuple[str, ...] = tuple(_core.schedule_methods())
"""Every schedule that :meth:`Schedule.generate` knows."""

Transport = Literal["eager", "rendezvous", "queue"]

_TRANSPORTS: tuple[Transport, ...] = ("eager", "rendezvous", "queue")


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
            whole_number(num_ranks, "num_ranks"),
            whole_number(num_micro_batches, "num_micro_batches"),
            None if stages_per_rank is None else whole_number(stages_per_rank, "stages_per_rank"),
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
        return cls._made(_core.Schedule.parse(string(text, "text")), check=check)

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
        core = _core.Schedule.from_csv(string(csv, "csv"), name)
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
        return cls._made(_core.Schedule.parse(text_of(string(text, "json"))), check=check)

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
        if not 0 <= whole_number(rank, "rank") < self.num_ranks:
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
        asked: object = transports
        listed = isinstance(asked, Iterable) and not isinstance(asked, str)
        if not listed or not transports or any(t not in _TRANSPORTS for t in transports):
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
        sizes = byte_sizes(activation_bytes, message_bytes, self.num_stages)
        activation, message = (None, None) if sizes is None else sizes
        peaks, proven, num_messages = self._inner.verify(
            list(transports),
            activation,
            message,
            None if max_activations is None else whole_number(max_activations, "max_activations"),
            None if max_bytes is None else whole_number(max_bytes, "max_bytes", 2**53),
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
            ScheduleError: ``costs``, ``negative_time``, ``length`` or ``not_a_number`` for costs
                that cannot be, ``too_long`` where they add up to infinity, ``stuck`` where blocking sends wait for one another, and as :meth:`verify`
                where the schedule cannot run to its end.

        Cost: O(instructions), about 40 ns each.
        """
        one_of("sends", sends, ("asynchronous", "blocking"))
        one_of("pairs", pairs, ("atomic", "early_forward"))
        costs = Costs() if costs is None else costs
        if not isinstance(costs, Costs):
            raise ScheduleError(
                code="costs",
                argument="costs",
                got=type(costs).__name__,
                expected="Costs",
                hint="write Costs(forward=..., ...)",
            )
        given = arrays_of(costs, self.num_stages, self.num_ranks)
        makespan, busy, bubble_ratio, peaks, spans, bounds = self._inner.simulate(
            *given,
            sends == "blocking",
            pairs == "early_forward",
            byte_sizes(activation_bytes, costs.message_bytes, self.num_stages),
        )
        halves = np.stack(given.times[:2])
        return Timeline(self, makespan, busy, bubble_ratio, Peaks(*peaks), *spans, bounds, halves)

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
        one_of("form", form, ("compute_only", "compute_comms"))
        one_of("dialect", dialect, ("current", "older"))
        return self._inner.to_csv(form == "compute_comms", dialect == "older", waits)

    def to_json(self) -> str:
        """The schedule as JSON that :meth:`from_json` reads back."""
        return json_of(self)

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


def _unpickle(text: str) -> Schedule:
    return Schedule.parse(text, check=False)
