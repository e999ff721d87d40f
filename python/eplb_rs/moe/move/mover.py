"""The mover: from plan to plan, layer by layer, all ranks together.

A layer's move is atomic. Every rank receives what is new to it beside what it holds, writes a
commit record to a store, and only when the records of all ranks are there does any rank overwrite
an old expert. Should a rank be lost, the records decide, the same way for all: a layer is wholly
new if every rank had committed, else wholly old.
"""

from __future__ import annotations

import time
import traceback
from collections import deque
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from torch import distributed
from torch.distributed.distributed_c10d import Store, _get_default_store, get_backend_config

from eplb_rs._inputs import wrong_type
from eplb_rs.errors import InvalidInputError
from eplb_rs.moe.move.error import MoveError, StoreLostError, account
from eplb_rs.moe.move.records import MoveRecords
from eplb_rs.moe.move.tasks import layer_tasks, most_arriving
from eplb_rs.moe.move.transit import Cargo, Transit
from eplb_rs.moe.sites import Sites, members
from eplb_rs.moe.weights import ExpertWeights, checksum
from eplb_rs.plan import Plan, as_plan

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["ExpertMover", "MoveStats"]

_TO_MEET = timedelta(minutes=1)
"""How long ranks may take to make a group, at least: much longer than a transfer."""


@dataclass(slots=True)
class MoveStats:
    """What a move has cost this rank so far."""

    layers: int = 0
    """Layers switched."""
    received: int = 0
    """Experts received from other ranks."""
    copied: int = 0
    """Experts copied from another slot of this rank."""
    loaded: int = 0
    """Experts read from storage."""
    bytes_received: int = 0
    """Bytes received from other ranks."""
    seconds: float = 0.0
    """Seconds that the host has spent in the mover."""


class ExpertMover:
    """Moves experts as plans say, with what this rank holds in place.

    All methods are called on all ranks, in the same order; a plan that one rank refuses must not be
    begun by the others (:class:`~eplb_rs.moe.Rebalancer` asks all).

    Args:
        weights: This rank's experts.
        group: The ranks; by default all of torch.distributed's. The mover makes a group of its
            own of its members, with the same backends.
        store: Where commit records are kept. For a move to survive the loss of any rank the store
            must live in none: a ``TCPStore`` of the launcher. By default torch.distributed's own.
        load: Reads an expert that no rank holds any more from storage: called with layer, expert
            and what to fill, by field. Without it such plans are refused.
        max_bytes_in_flight: How many bytes may be under way to this rank at once, and so how many
            at most a :meth:`step` adds to the pass after it; one expert always may. The same on
            all ranks.
        max_extra_bytes: The most memory beside the weights. A move needs room for what two layers
            bring to this rank; ``None`` takes what is needed.
        limit_s: How long any wait may take, in seconds.
        grace_s: How long a rank that knows of a failure waits for the others' word, in seconds.
            Those that have left none by then are taken for lost; between passes, allow for the
            longest pass.
        checksums: Compares every expert's CRC-32 at both ends. Slow; for tests and doubts.
        on_switch: Called with the layer and the new plan right after a layer's weights are new,
            at the same step on every rank: to route by it.

    Raises:
        InvalidInputError: ``not_positive`` for a limit, ``wrong_type`` for weights that are none,
            ``missing_group`` where torch.distributed is not initialised or this rank is not in the
            group.
    """

    def __init__(
        self,
        weights: ExpertWeights,
        *,
        group: distributed.ProcessGroup | None = None,
        store: Store | None = None,
        load: Callable[[int, int, dict[str, Tensor]], None] | None = None,
        max_bytes_in_flight: int = 1 << 28,
        max_extra_bytes: int | None = None,
        limit_s: float = 300.0,
        grace_s: float = 5.0,
        checksums: bool = False,
        on_switch: Callable[[int, Plan], None] | None = None,
    ) -> None:
        if not isinstance(weights, ExpertWeights):
            raise wrong_type(
                "weights",
                weights,
                "ExpertWeights",
                "`ExpertWeights.adopt` takes tensors as they are",
            )
        for name, value in (
            ("max_bytes_in_flight", max_bytes_in_flight),
            ("max_extra_bytes", 1 if max_extra_bytes is None else max_extra_bytes),
            ("limit_s", limit_s),
            ("grace_s", grace_s),
        ):
            if not value > 0:
                raise InvalidInputError(
                    code="not_positive", argument=name, got=repr(value), expected="above 0"
                )
        self._limit = timedelta(seconds=limit_s)
        self._grace_s = grace_s
        given = members(group)
        ranks = distributed.get_process_group_ranks(given)
        made: Any = distributed.new_group(
            ranks,
            timeout=max(self._limit, _TO_MEET),
            backend=get_backend_config(given),
            use_local_synchronization=True,
        )
        self._group: distributed.ProcessGroup = made
        self._records = MoveRecords(store or _get_default_store(), ranks, made.rank())
        self._weights = weights
        self._load = load
        self._extra = max_extra_bytes
        self._checksums = checksums
        self._on_switch = on_switch
        self._transit = Transit(
            weights,
            made,
            limit=self._limit,
            max_bytes_in_flight=max_bytes_in_flight,
            before_send=self._sign if checksums else None,
        )
        self._plans: tuple[Plan, Plan] | None = None
        self._closed = False
        self._step = 0
        self._waiting: deque[Cargo] = deque()
        self._moving: deque[_Moving] = deque()
        self._moved: list[int] = []
        self.stats = MoveStats()
        """Of the move under way, or the last."""

    @property
    def busy(self) -> bool:
        """Whether a move is under way."""
        return self._plans is not None

    def apply(self, old: Plan, new: Plan) -> MoveStats:
        """Moves all layers, and returns when they are in place.

        Args:
            old: The placement in force.
            new: The one to be, with the same layers, experts, ranks and slots.

        Raises:
            InvalidInputError: As :meth:`begin`.
            InfeasibleError: As :meth:`begin`.
            MoveError: A rank was lost, or a wait passed its limit.
            StoreLostError: So did the store, and nobody can say how far the move has come.

        Cost: the transfers, and for each layer two round trips to the store.
        """
        self.begin(old, new)
        self.finish()
        return self.stats

    def finish(self) -> None:
        """Ends the move under way, on all ranks at once, without waiting for the next pass.

        Raises:
            MoveError: As :meth:`apply`.
            StoreLostError: As :meth:`apply`.
        """
        while self.busy:
            self._advance(block=True)

    def begin(self, old: Plan, new: Plan) -> None:
        """Takes up a move that :meth:`step` carries out.

        Raises:
            InvalidInputError: ``wrong_type`` for what is no plan, ``wrong_shape`` for plans or
                weights that do not fit each other, ``in_use`` while another move is under way,
                ``closed`` after one has failed, ``too_large`` if it needs more memory than
                ``max_extra_bytes``.
            InfeasibleError: ``missing_expert`` if no rank holds an expert that is wanted and there
                is no ``load``.
        """
        self._check_open("new")
        if self.busy:
            raise InvalidInputError(
                code="in_use",
                argument="new",
                got="a plan while another is moved to",
                expected="given to a mover that is not busy",
                hint="`while mover.step(): ...`",
            )
        self._records.begin()  # even for a plan that only this rank refuses: all count alike
        self._check(old, new)
        transfers = new.transfers(old)
        tasks = layer_tasks(transfers, self._sites, can_load=self._load is not None)
        arriving = most_arriving(transfers)
        needed = int(arriving.max()) * self._weights.expert_bytes
        if self._extra is not None and needed > self._extra:
            raise InvalidInputError(
                code="too_large",
                argument="new",
                got=f"{needed:,} bytes beside the weights of a rank",
                expected=f"at most `max_extra_bytes`, {self._extra:,}",
                hint="fewer moves a layer, or more memory",
            )
        self._transit.reserve(int(arriving[self._sites.rank]))
        self._plans = old, new
        self._step = 0
        self._waiting = deque(Cargo(task) for task in tasks)
        self._moved = []
        self.stats = MoveStats()

    def step(self, *, whole: bool = False) -> bool:
        """Carries a move on, between two forward passes, at the same passes on all ranks: exactly
        one step between two collectives of theirs, or ranks wait for each other in a circle.

        Switches layers that all ranks had at the step before, begins transfers, looks what has
        come. Never waits for a transfer on a GPU; on a CPU, for those begun at the step before.

        Args:
            whole: Moves one layer from beginning to end within this step, and waits for it. In
                training: an optimizer's step in between would leave behind what was sent before.

        Returns:
            Whether a move is still under way.

        Raises:
            MoveError: A rank was lost, a wait passed its limit, or weights changed on their way.
            StoreLostError: As :meth:`apply`.
        """
        if self.busy:
            self._advance(block=whole, whole=whole)
        return self.busy

    def cancel(self) -> None:
        """Forgets a move that was begun, before any step; nothing has changed."""
        assert not self._moving, "before any step"
        self._waiting.clear()
        self._plans = None
        self._transit.free()

    def abort(self, reason: str, plan: Plan | None = None) -> MoveError:
        """Ends work that cannot go on, because a forward pass failed, say.

        Settles each layer as wholly old or wholly new, the same for all surviving ranks, closes
        the mover's group, and learns who is lost.

        Args:
            reason: What failed.
            plan: The placement in force, where no move is under way.

        Returns:
            What :meth:`step` would have raised.

        Raises:
            InvalidInputError: ``missing_plan`` if no move is under way and no plan is given,
                ``closed`` after a move has failed.
            StoreLostError: As :meth:`apply`.
        """
        self._check_open("reason")
        if self._plans is None and plan is None:
            raise InvalidInputError(
                code="missing_plan",
                argument="plan",
                got="None",
                expected="the placement in force, since no move is under way",
            )
        if self._plans is None and plan is not None:
            self._plans, self._moved = (plan, plan), []
            self._sites = Sites.of(plan, self._group)
        return self._settled(reason)

    # How a layer goes: begun, received, committed by this rank, decided for all, switched.

    def _advance(self, *, block: bool, whole: bool = False) -> None:
        begun = time.perf_counter()
        try:
            self._transit.begin_step()
            self._switch_decided(block=block)
            while self._waiting and len(self._moving) < (1 if whole else 2):
                cargo = self._waiting.popleft()
                self._moving.append(_Moving(cargo, self._weights.version(cargo.task.layer)))
                self._transit.take(cargo)
            self._transit.advance(block=block)
            for moving in self._moving:
                if moving.committed_at is None and moving.cargo.here:
                    self._commit(moving)
            if whole:
                self._switch_decided(block=True)
            self._records.tidy()
        except Exception as error:  # the caller's own load and on_switch may raise anything
            traceback.clear_frames(error.__traceback__)  # they hold works: see Transit.close
            raise self._settled(str(error) or type(error).__name__) from error
        finally:
            self.stats.seconds += time.perf_counter() - begun
        self._step += 1
        if not self._waiting and not self._moving:
            self._plans = None
            self._transit.free()

    def _commit(self, moving: _Moving) -> None:
        """Checks what has come, and says that this rank has it."""
        cargo, task = moving.cargo, moving.cargo.task
        self._refuse_if_changed(moving)
        for slot, source in task.senders.items() if self._checksums else ():
            self._compare(cargo, slot, source)
        self.stats.received += len(task.senders)
        self.stats.bytes_received += len(task.senders) * self._weights.expert_bytes
        for expert, slot in task.loads:
            assert self._load is not None, "begin() looked"
            cargo.staged[slot] = self._transit.room()
            self._load(task.layer, expert, cargo.staged[slot])
            self.stats.loaded += 1
        moving.committed_at = time.monotonic()
        # The others may be in the pass before: all switch after the next one.
        self._records.commit(task.layer, self._step + 1)

    def _switch_decided(self, *, block: bool) -> None:
        """Switches what is decided, in order."""
        while self._moving:
            first = self._moving[0]
            if first.committed_at is None:
                return
            layer = first.cargo.task.layer
            step = self._records.switch_step(layer, wait=self._limit if block else None)
            if step is None:
                waited_s = time.monotonic() - first.committed_at
                if waited_s > self._limit.total_seconds():
                    raise TimeoutError("another rank has not received its experts")
                return
            if not block and step > self._step:
                return
            self._refuse_if_changed(first)
            self._moving.popleft()
            self._switch(first.cargo)

    def _refuse_if_changed(self, moving: _Moving) -> None:
        layer = moving.cargo.task.layer
        if self._weights.version(layer) != moving.version:
            raise RuntimeError(
                f"the weights of layer {layer} changed while they were moved, so that what has come "
                f"is not what they are: in training, `step(whole=True)` or `apply`"
            )

    def _switch(self, cargo: Cargo) -> None:
        """Puts what has come in place of what was there."""
        layer = cargo.task.layer
        # Layers may be parts of one tensor: what is written here is no change to the others.
        others = [(one, self._weights.version(one.cargo.task.layer)) for one in self._moving]
        self._transit.unload(cargo)
        for moving, before in others:
            moving.version += self._weights.version(moving.cargo.task.layer) - before
        self.stats.layers += 1
        self.stats.copied += len(cargo.task.copies) + len(cargo.task.repeats)
        self._moved.append(layer)
        if self._on_switch is not None:
            assert self._plans is not None, "a move is under way"
            self._on_switch(layer, self._plans[1])

    # What can go wrong

    def _settled(self, reason: str) -> MoveError:
        """Ends the work the same way on all survivors."""
        assert self._plans is not None, "a move is under way"
        old, new = self._plans
        under_way = [moving.cargo for moving in self._moving]
        try:
            self._records.leave_word()
            for cargo in under_way:
                if self._records.settle(cargo.task.layer):
                    try:
                        self._switch(cargo)
                    except Exception as error:  # the caller's on_switch; the weights are new
                        reason += f"; and after that: {error}"
            self._transit.close()
            lost = tuple(self._sites.ranks[one] for one in self._records.lost(self._grace_s))
        except RuntimeError as error:
            layers = tuple(cargo.task.layer for cargo in under_way)
            raise StoreLostError(f"{reason}; {error}", layers) from error
        finally:
            self._waiting.clear()
            self._moving.clear()
            self._plans = None
            self._closed = True
        alive = [rank for rank in self._sites.ranks if rank not in lost]
        return account(reason, old, new, sorted(self._moved), lost=lost, alive=alive)

    def _sign(self, layer: int, slot: int) -> None:
        """Leaves an expert's checksum for who receives it."""
        self._records.sign(layer, self._sites.held[slot], self._weights.checksum(layer, slot))

    def _compare(self, cargo: Cargo, slot: int, source: int) -> None:
        """Compares what has come with its sender's checksum."""
        layer = cargo.task.layer
        signed, found = self._records.signed(layer, source), checksum(cargo.staged[slot].values())
        if found != signed:
            raise RuntimeError(
                f"slot {self._sites.held[slot]} of layer {layer} has come with checksum "
                f"{found:#010x}, but slot {source} was sent with {signed:#010x}"
            )

    # What fits

    def _check_open(self, argument: str) -> None:
        if self._closed:
            raise InvalidInputError(
                code="closed",
                argument=argument,
                got="a call after a failure",
                expected="for a mover whose ranks all live",
                hint="another mover, of the ranks that are left",
            )

    def _check(self, old: Plan, new: Plan) -> None:
        old, new = as_plan(old, "old"), as_plan(new, "new")
        same = (
            old.phy2log.shape == new.phy2log.shape
            and old.num_experts == new.num_experts
            and old.topology.slots == new.topology.slots
        )
        if not same:
            raise InvalidInputError(
                code="wrong_shape",
                argument="new",
                got=repr(new),
                expected=f"the layers, experts and slots of the plan in force, {old!r}",
            )
        sites = Sites.of(new, self._group)
        got = (new.num_layers, sites.num_slots)
        wanted = (self._weights.num_layers, self._weights.num_slots)
        if got != wanted:
            raise InvalidInputError(
                code="wrong_shape",
                argument="new",
                got="{} layers, {} slots on this rank".format(*got),
                expected="{} layers, {} slots, as the weights have".format(*wanted),
            )
        self._sites = sites


class _Moving:
    """A layer under way, until it is switched."""

    __slots__ = ("cargo", "committed_at", "version")

    def __init__(self, cargo: Cargo, version: int) -> None:
        self.cargo = cargo
        self.version = version
        """Of the weights when this rank began to send them."""
        self.committed_at: float | None = None
        """When this rank had it all; `time.monotonic`."""
