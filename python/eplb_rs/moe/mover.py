"""Experts from one placement to another while they serve.

A layer's move is atomic. Every rank receives what is new to it beside what it holds, writes a
commit record to a store, and only when the records of all ranks are there does any rank overwrite
an old expert. Should a rank be lost, the records decide, the same way for all: a layer is wholly
new if every rank had committed, else wholly old.

Letters: L layers, S slots of this rank.
"""

from __future__ import annotations

import time
import traceback
from collections import deque
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, distributed
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from eplb_rs.errors import InfeasibleError, InvalidInputError
from eplb_rs.moe.weights import ExpertWeights, checksum, slots_of
from eplb_rs.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ExpertMover", "MoveError", "MoveStats"]

_NEW, _OLD = "new", "old"
_GRACE_S = 1.5
"""How long survivors wait for one another's word, after one of them has noticed."""


class MoveError(RuntimeError):
    """A move that could not be ended; every surviving rank raises one, with the same placement.

    Attributes:
        plan: The placement now: each layer wholly as it was, or wholly as it was to be.
        moved: The layers that are as they were to be.
        lost_ranks: The ranks that left no word.
        lost_experts: `(layer, expert)` of which no surviving rank has a replica.
    """

    def __init__(
        self,
        reason: str,
        *,
        plan: Plan,
        moved: tuple[int, ...],
        lost_ranks: tuple[int, ...],
        lost_experts: tuple[tuple[int, int], ...],
    ) -> None:
        self.reason = reason
        self.plan = plan
        self.moved = moved
        self.lost_ranks = lost_ranks
        self.lost_experts = lost_experts
        lost = f"lost: rank {', '.join(map(str, lost_ranks))}; " if lost_ranks else ""
        gone = f"; {len(lost_experts)} experts have no replica left" if lost_experts else ""
        super().__init__(
            f"the move failed: {reason}; {lost}{len(moved)} layers are as planned, the others as "
            f"they were{gone}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (
            self.reason,
            self.plan,
            self.moved,
            self.lost_ranks,
            self.lost_experts,
        )


def _rebuilt(reason: str, plan: Plan, *rest: tuple[Any, ...]) -> MoveError:
    moved, ranks, experts = rest
    return MoveError(reason, plan=plan, moved=moved, lost_ranks=ranks, lost_experts=experts)


@dataclass(slots=True)
class MoveStats:
    """What a move has cost this rank so far."""

    layers: int = 0
    """Layers switched."""
    received: int = 0
    """Experts received from other ranks."""
    copied: int = 0
    """Experts copied from another slot of this rank."""
    bytes_received: int = 0
    """Bytes received from other ranks."""
    seconds: float = 0.0
    """Seconds that the host has spent in the mover."""


@dataclass(slots=True)
class _Layer:
    """One layer on its way, as this rank sees it; slots are numbered from this rank's first."""

    layer: int
    rounds: deque[list[tuple[str, int, int]]]
    """What is not begun: in each round ("send", slot, rank) and ("receive", slot, rank)."""
    copies: list[tuple[int, int]]
    """From slot, to slot."""
    loads: list[tuple[int, int]]
    """Expert, slot: from storage."""
    staged: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """What has come, by the slot it is for."""
    senders: dict[int, int] = field(default_factory=dict)
    """The slot, in the numbering of the plan, that each of these came from."""
    works: list[distributed.Work] = field(default_factory=list)
    event: Any = None
    """A CUDA event behind what is in flight."""
    committed_at: float | None = None
    """When this rank had it all; `time.monotonic`."""

    @property
    def num_staged(self) -> int:
        """How many experts are kept beside the weights."""
        receives = sum(way == "receive" for round_ in self.rounds for way, _, _ in round_)
        return receives + len(self.copies) + len(self.loads)


class ExpertMover:
    """Moves experts as plans say, with what this rank holds in place.

    All methods are called on all ranks, in the same order.

    Args:
        weights: This rank's experts.
        group: The ranks; by default all of torch.distributed's. The mover makes a group of its
            own of its members.
        store: Where commit records are kept. For a move to survive the loss of any rank the store
            must live in none: a ``TCPStore`` of the launcher. By default torch.distributed's own.
        load: Reads an expert that no rank holds any more from storage: called with layer, expert
            and what to fill, by field. Without it such plans are refused.
        max_bytes_in_flight: How many bytes may be under way to this rank at once; one expert
            always may.
        max_extra_bytes: The most memory beside the weights. A move needs room for what two layers
            bring to this rank; ``None`` takes what is needed.
        limit_s: How long any wait may take, in seconds.
        checksums: Compares every expert's CRC-32 at both ends. Slow; for tests and doubts.
        on_switch: Called with the layer and the new plan right after a layer's weights are new,
            at the same step on every rank: to route by it.

    Raises:
        InvalidInputError: ``not_positive`` for a limit.
    """

    _made = 0

    def __init__(
        self,
        weights: ExpertWeights,
        *,
        group: distributed.ProcessGroup | None = None,
        store: Store | None = None,
        load: Callable[[int, int, dict[str, Tensor]], None] | None = None,
        max_bytes_in_flight: int = 1 << 30,
        max_extra_bytes: int | None = None,
        limit_s: float = 300.0,
        checksums: bool = False,
        on_switch: Callable[[int, Plan], None] | None = None,
    ) -> None:
        for name, value in (
            ("max_bytes_in_flight", max_bytes_in_flight),
            ("max_extra_bytes", 1 if max_extra_bytes is None else max_extra_bytes),
            ("limit_s", limit_s),
        ):
            if not value > 0:
                raise InvalidInputError(
                    code="not_positive", argument=name, got=repr(value), expected="above 0"
                )
        parent = group or distributed.group.WORLD
        assert parent is not None, "torch.distributed is initialised"
        self._limit = timedelta(seconds=limit_s)
        self._ranks = distributed.get_process_group_ranks(parent)
        made: Any = distributed.new_group(
            self._ranks, timeout=self._limit, use_local_synchronization=True
        )
        self._group: distributed.ProcessGroup = made
        self._rank: int = self._group.rank()
        ExpertMover._made += 1
        prefix = f"eplb-mover/{'-'.join(map(str, self._ranks))}/{ExpertMover._made}"
        self._store = PrefixStore(prefix, store or _get_default_store())
        self._weights = weights
        self._load = load
        self._in_flight = max_bytes_in_flight
        self._extra = max_extra_bytes
        self._checksums = checksums
        self._on_switch = on_switch
        self._stream: Any = None
        if weights.device.type == "cuda":
            self._stream = torch.cuda.Stream(weights.device)  # type: ignore[no-untyped-call]
        self._epoch = -1
        self._keys: tuple[list[str], list[str]] = [], []
        self._step = 0
        self._plans: tuple[Plan, Plan] | None = None
        self._waiting: deque[_Layer] = deque()
        self._moving: deque[_Layer] = deque()
        self._moved: list[int] = []
        self._free: list[dict[str, Tensor]] = []
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

        Cost: the transfers, and for each layer two round trips to the store.
        """
        self.begin(old, new)
        while self.busy:
            self._advance(block=True)
        return self.stats

    def begin(self, old: Plan, new: Plan) -> None:
        """Takes up a move that :meth:`step` carries out.

        Raises:
            InvalidInputError: ``wrong_shape`` for plans or weights that do not fit each other,
                ``in_use`` while another move is under way, ``too_large`` if it needs more memory
                than ``max_extra_bytes``.
            InfeasibleError: ``missing_expert`` if no rank holds an expert that is wanted and there
                is no ``load``.
        """
        if self.busy:
            raise InvalidInputError(
                code="in_use",
                argument="new",
                got="a plan while another is moved to",
                expected="a mover that is not busy",
                hint="`while mover.step(): ...`",
            )
        self._check(old, new)
        layers = self._layers(old, new)
        needed = sum(sorted(layer.num_staged for layer in layers)[-2:])
        needed *= self._weights.expert_bytes
        if self._extra is not None and needed > self._extra:
            raise InvalidInputError(
                code="too_large",
                argument="new",
                got=f"{needed:,} bytes beside the weights",
                expected=f"at most `max_extra_bytes`, {self._extra:,}",
                hint="fewer moves a layer, or more memory",
            )
        self._plans = old, new
        self._epoch += 1
        if self._rank == 0:  # nobody reads the keys of the move before the last
            for key in self._keys[0]:
                self._store.delete_key(key)
        keys = [self._key(layer, what) for layer in layers for what in ("commits", "fate")]
        self._keys = self._keys[1], keys
        self._step = 0
        self._waiting = deque(layers)
        self._moved = []
        self.stats = MoveStats()

    def step(self) -> bool:
        """Carries a move on, between two forward passes, at the same passes on all ranks.

        Switches layers that all ranks had at the step before, begins transfers, looks what has
        come. Never waits for a transfer on a GPU; on a CPU, for those begun at the step before.

        Returns:
            Whether a move is still under way.

        Raises:
            MoveError: A rank was lost, or a wait passed its limit.
        """
        if self.busy:
            self._advance(block=False)
        return self.busy

    def abort(self, reason: str) -> MoveError:
        """Ends a move that cannot go on, because a forward pass failed, say.

        Settles each layer as wholly old or wholly new, the same for all surviving ranks, closes
        the mover's group, and learns who is lost.

        Returns:
            What :meth:`step` would have raised.
        """
        return self._settled(reason)

    # How a layer goes: begun, received, committed by this rank, decided for all, switched.

    def _advance(self, *, block: bool) -> None:
        begun = time.perf_counter()
        try:
            self._switch_decided(block=block)
            while self._waiting and len(self._moving) < 2:
                self._moving.append(self._waiting.popleft())
            for layer in self._moving:
                if layer.committed_at is None and self._received(layer, block=block):
                    self._commit(layer)
        except (RuntimeError, TimeoutError) as error:
            traceback.clear_frames(error.__traceback__)  # they hold works: see _drop
            raise self._settled(str(error)) from error
        finally:
            self.stats.seconds += time.perf_counter() - begun
        self._step += 1
        if not self._waiting and not self._moving:
            self._plans = None
            self._free.clear()

    def _received(self, layer: _Layer, *, block: bool) -> bool:
        """Begins what may be begun, and says whether all of the layer is here."""
        while True:
            if layer.event is not None:
                if not block and not layer.event.query():
                    return False
                self._wait_for(layer.event)
                layer.event = None
            for work in layer.works:
                work.wait(self._limit)
            layer.works.clear()
            if not layer.rounds:
                return True
            self._begin_rounds(layer)
            if not block:
                return False

    def _begin_rounds(self, layer: _Layer) -> None:
        """Begins as many rounds as may be in flight."""
        tensors = self._weights[layer.layer]
        operations: list[distributed.P2POp] = []
        room = self._in_flight
        while layer.rounds and (not operations or room >= self._weights.expert_bytes):
            for way, slot, peer in layer.rounds.popleft():
                if way == "send":
                    self._sign(layer.layer, slot)
                    parts = {name: tensor[slot] for name, tensor in tensors.items()}
                else:
                    parts = self._staging()
                    layer.staged[slot] = parts
                    room -= self._weights.expert_bytes
                    self.stats.received += 1
                    self.stats.bytes_received += self._weights.expert_bytes
                call: Any = distributed.isend if way == "send" else distributed.irecv
                operations += [
                    distributed.P2POp(call, part, group=self._group, group_peer=peer)
                    for part in parts.values()
                ]
        if not operations:
            return
        if self._stream is None:
            layer.works = distributed.batch_isend_irecv(operations)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._weights.device))
        with torch.cuda.stream(self._stream):
            for work in distributed.batch_isend_irecv(operations):
                work.wait()
            layer.event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            layer.event.record(self._stream)

    def _wait_for(self, event: Any) -> None:
        """Polls, so that a lost peer cannot hold the host for ever."""
        until = time.monotonic() + self._limit.total_seconds()
        while not event.query():
            if time.monotonic() > until:
                raise TimeoutError("a transfer passed its limit")
            time.sleep(50e-6)

    def _commit(self, layer: _Layer) -> None:
        """Checks what has come, and says that this rank has it; the last to do so decides."""
        for expert, slot in layer.loads:
            assert self._load is not None, "begin() looked"
            layer.staged[slot] = self._staging()
            self._load(layer.layer, expert, layer.staged[slot])
        if self._checksums:
            self._compare(layer)
        layer.committed_at = time.monotonic()
        if self._store.add(self._key(layer, "commits"), 1) == len(self._ranks):
            # The others may be in the pass before: all switch after the next one.
            self._store.compare_set(self._key(layer, "fate"), "", f"{_NEW} {self._step + 1}")

    def _switch_decided(self, *, block: bool) -> None:
        """Switches what is decided, in order."""
        while self._moving and self._moving[0].committed_at is not None:
            key = self._key(self._moving[0], "fate")
            if block:
                self._store.wait([key], self._limit)
            elif not self._store.check([key]):
                if time.monotonic() - self._moving[0].committed_at > self._limit.total_seconds():
                    raise TimeoutError("another rank has not received its experts")
                return
            fate, _, step = self._store.get(key).decode().partition(" ")
            if fate != _NEW:
                raise RuntimeError("another rank gave up")
            if not block and int(step) > self._step:
                return
            self._switch(self._moving.popleft())

    @torch.no_grad()
    def _switch(self, layer: _Layer) -> None:
        """Puts what has come in place of what was there."""
        tensors = self._weights[layer.layer]
        if self._stream is not None:
            torch.cuda.current_stream(self._weights.device).wait_stream(self._stream)
        for source, slot in layer.copies:
            layer.staged[slot] = self._staging()
            for name, part in layer.staged[slot].items():
                part.copy_(tensors[name][source])
        for slot, parts in layer.staged.items():
            for name, part in parts.items():
                tensors[name][slot].copy_(part)
        self.stats.layers += 1
        self.stats.copied += len(layer.copies)
        self._free += layer.staged.values()
        self._moved.append(layer.layer)
        if self._on_switch is not None:
            assert self._plans is not None, "a move is under way"
            self._on_switch(layer.layer, self._plans[1])

    # What can go wrong

    def _settled(self, reason: str) -> MoveError:
        """Ends the move the same way on all survivors."""
        assert self._plans is not None, "a move is under way"
        old, new = self._plans
        self._store.set(f"{self._epoch}/word/{self._rank}", "")
        in_order = [*self._moving]
        try:
            for layer in in_order:
                # The first to say so decides; whoever comes later finds it decided.
                fate = self._store.compare_set(self._key(layer, "fate"), "", _OLD)
                if fate.decode().startswith(_NEW):
                    self._switch(layer)
            self._drop()
            lost = self._silent()
        except RuntimeError as error:
            raise RuntimeError(
                f"the move failed ({reason}), and so did the store ({error}): whether layers "
                f"{[layer.layer for layer in in_order]} are old or new on other ranks is unknown; "
                f"keep the store outside of all ranks"
            ) from error
        self._waiting.clear()
        self._moving.clear()
        self._free.clear()
        self._plans = None
        moved = tuple(sorted(self._moved))
        slots = np.array(old.phy2log)
        slots[list(moved)] = new.phy2log[list(moved)]
        alive = np.concatenate(
            [
                np.arange(slots.shape[1])[slots_of(old, r)]
                for r in range(len(self._ranks))
                if r not in lost
            ]
        )
        experts = np.arange(old.num_experts)
        gone = tuple(
            (layer, int(expert))
            for layer, row in enumerate(slots)
            for expert in np.setdiff1d(experts, row[alive])
        )
        plan = Plan.from_phy2log(
            new.topology, slots, new.expert_load, policy=new.policy, layer_ids=new.layer_ids
        )
        return MoveError(reason, plan=plan, moved=moved, lost_ranks=lost, lost_experts=gone)

    def _drop(self) -> None:
        """Closes the group: that wakes those who wait for this rank."""
        for layer in self._moving:
            layer.works.clear()  # held works would keep them waiting
        if self._stream is not None:
            self._group.abort()
        distributed.destroy_process_group(self._group)

    def _silent(self) -> tuple[int, ...]:
        """The ranks that leave no word."""
        keys = [f"{self._epoch}/word/{rank}" for rank in range(len(self._ranks))]
        until = time.monotonic() + _GRACE_S
        while not self._store.check(keys) and time.monotonic() < until:
            time.sleep(0.01)
        return tuple(rank for rank, key in enumerate(keys) if not self._store.check([key]))

    def _sign(self, layer: int, slot: int) -> None:
        """Leaves an expert's checksum for who receives it."""
        if self._checksums:
            key = f"{self._epoch}/{layer}/crc/{self._first_slot + slot}"
            self._store.set(key, str(self._weights.checksum(layer, slot)))

    def _compare(self, layer: _Layer) -> None:
        """Compares what has come with its sender's checksum."""
        for slot, source in layer.senders.items():
            signed = int(self._store.get(f"{self._epoch}/{layer.layer}/crc/{source}"))
            found = checksum(layer.staged[slot].values())
            if found != signed:
                raise RuntimeError(
                    f"slot {self._first_slot + slot} of layer {layer.layer} has come with checksum "
                    f"{found:#010x}, but slot {source} was sent with {signed:#010x}"
                )

    # What is to be done

    def _check(self, old: Plan, new: Plan) -> None:
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
        ranks, slots = len(self._ranks), len(slots_of(new, self._rank))
        got = (self._weights.num_layers, self._weights.num_slots, ranks)
        wanted = (new.num_layers, slots, new.topology.num_gpus)
        if got != wanted:
            raise InvalidInputError(
                code="wrong_shape",
                argument="new",
                got="{} layers, {} slots on this of {} ranks".format(*wanted),
                expected="{} layers, {} slots, {} ranks, as the weights and the group have".format(
                    *got
                ),
            )

    def _layers(self, old: Plan, new: Plan) -> list[_Layer]:
        """What this rank has to do for each layer that changes on any rank."""
        self._first_slot = first = slots_of(new, self._rank).start
        layers: dict[int, _Layer] = {}
        for layer, expert, source_slot, source, slot, target, number in new.transfers(
            old
        ).table.tolist():
            made = layers.setdefault(layer, _Layer(layer, deque(), [], []))
            if source < 0 and self._load is None:
                raise InfeasibleError(
                    code="missing_expert",
                    argument="new",
                    got=f"expert {expert} of layer {layer} in slot {slot}",
                    expected="of experts that some rank holds",
                    hint="`ExpertMover(load=...)` reads lost experts from storage",
                )
            if source < 0:
                if target == self._rank:
                    made.loads.append((expert, slot - first))
            elif source == target:
                if target == self._rank:
                    made.copies.append((source_slot - first, slot - first))
            else:
                # A round is there for all ranks, so that all count alike.
                while len(made.rounds) <= number:
                    made.rounds.append([])
                if source == self._rank:
                    made.rounds[number].append(("send", source_slot - first, target))
                if target == self._rank:
                    made.rounds[number].append(("receive", slot - first, source))
                    made.senders[slot - first] = source_slot
        return list(layers.values())

    def _staging(self) -> dict[str, Tensor]:
        """Room for one expert beside the weights."""
        if self._free:
            return self._free.pop()
        return {
            field.name: torch.empty(field.shape, dtype=field.dtype, device=self._weights.device)
            for field in self._weights.fields
        }

    def _key(self, layer: _Layer, what: str) -> str:
        return f"{self._epoch}/{layer.layer}/{what}"
