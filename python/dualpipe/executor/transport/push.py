"""Messages between GPUs of one host: pushed by the copy engines, awaited by the stream itself.

The sender copies into the receiver's memory and then writes a counter there; the receiver's stream
waits for that counter (a stream memory operation). No SM is taken at either end, neither for the
copy nor for the wait, and the host never waits. Two H200: 16 MiB both ways at once in 46 us (NCCL
92), a message of a few bytes in 5.4 us, a waiting stream costs computation beside it 0 to 2 %.

Counters, all of them 32 bits and only ever growing, order the use of a slot: the sender's n-th
push into it waits until the receiver has released it n times (a *credit*, which the receiver's
stream writes into the sender's memory), and the receiver's n-th use waits for the n-th arrival.
"""

from __future__ import annotations

import pickle
import platform
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_process_group_store

from dualpipe.errors import PeerLostError, PipelineError
from dualpipe.executor.transport.base import Arrival, Departure, Transport
from dualpipe.executor.transport.peer_memory import ExportedMemory, ImportedMemory, driver
from dualpipe.executor.transport.polled import PolledWaits
from dualpipe.executor.transport.pushed_sum import PushedSum
from dualpipe.executor.transport.slots import Place, lay_out, tensor_offsets
from dualpipe.instruction import Kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed.distributed_c10d import Store

    from dualpipe.executor.transport.base import Envelope, Message, PairSum, TensorSpec

__all__ = ["PushTransport"]

_SLOTS = 1024
"""The most slots for messages from one rank. Each, and one more for sums, has two words."""

_SUM_SLOT = _SLOTS
_WORDS = _SLOTS + 1

_OPEN = 0x3FFF_FFFF
"""A counter with which every wait is over; comparisons are cyclic."""

_DRAIN_S = 10.0
"""How long streams that have been let go may take to run out."""


class _Source(NamedTuple):
    """Where a message arrives."""

    slot: int
    tensors: list[torch.Tensor]


class _Target(NamedTuple):
    """Where a message is pushed to."""

    slot: int
    addresses: list[int]


class _PushArrival(Arrival):
    __slots__ = ("_message", "_peer", "_source", "_transport")

    def __init__(
        self, transport: PushTransport, peer: int, message: Message, source: _Source
    ) -> None:
        self._transport = transport
        self._peer = peer
        self._message = message
        self._source = source

    def ready(self) -> list[torch.Tensor]:
        transport = self._transport
        transport.await_arrival(self._peer, self._message, self._source.slot, transport.waits)
        return [tensor.detach() for tensor in self._source.tensors]

    def release(self) -> None:
        self._transport.give_credit(self._peer, self._source.slot)


class _PushDeparture(Departure):
    __slots__ = ("_left", "_message", "_peer", "_tensors", "_waits")

    def __init__(
        self,
        waits: PolledWaits,
        peer: int,
        message: Message,
        tensors: list[torch.Tensor],
        left: torch.cuda.Event,
    ) -> None:
        self._waits = waits
        self._peer = peer
        self._message = message
        self._tensors = tensors
        self._left = left

    def done(self) -> None:
        if self._tensors:
            wait = self._waits.enter(self._peer, self._message)
            self._left.wait()
            self._waits.leave(wait)
            self._tensors = []


class PushTransport(Transport):
    """Pushes into the memory of GPUs of the same host.

    Raises:
        PipelineError: ``transport``, on all ranks alike, where some cannot be reached this way.

    Cost: about 20 us of the host's time for a message, both ends together; see the module.
    """

    name = "push"

    def __init__(self, group: dist.ProcessGroup, device: torch.device, limit_s: float) -> None:
        super().__init__(group, device, limit_s)
        if str(device) == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._rank, self._size = group.rank(), group.size()
        self._round = 0
        self.waits = PolledWaits(limit_s)
        """What the computing stream waits for."""
        self._sources: dict[Message, _Source] = {}
        self._targets: dict[Message, _Target] = {}
        self._control: ExportedMemory | None = None
        self._arena: ExportedMemory | None = None
        self._arenas: dict[int, ImportedMemory] = {}
        self._room: ExportedMemory | None = None
        self._rooms: list[ImportedMemory] = []
        self._sums: dict[int, PushedSum] = {}
        self._controls: dict[int, ImportedMemory] = {}
        self._streams: dict[tuple[int, Kind], torch.cuda.Stream] = {}
        self._arrived: dict[tuple[int, int], int] = {}
        self._pushed: dict[tuple[int, int], int] = {}
        self._store = self._own_store()
        self._connect()

    def _own_store(self) -> Store:
        """The group's store, under a prefix that only this transport and its peers use."""
        store = _get_process_group_store(self.group)
        made = store.add(f"dualpipe/push/{self._rank}", 1)
        return PrefixStore(f"dualpipe/push/{made}", store)

    def _connect(self) -> None:
        """Opens everybody's counters, or finds out that somebody's cannot be opened."""
        why = self._refusal()
        handle = b""
        if not why:
            try:
                self._driver = driver()
                self._control = ExportedMemory(8 * self._size * _WORDS, self.device)
                self._control.bytes.zero_()
                handle = self._control.handle
                # The stream that lets waiting ones go, should a peer be lost: of another
                # priority, so that it shares no hardware queue with them.
                self._rescue = torch.cuda.Stream(self.device, priority=-1)  # type: ignore[no-untyped-call]
                torch.cuda.synchronize(self.device)
            except (ImportError, RuntimeError) as error:
                why = str(error)
        everybody = range(self._size)
        given = self._exchange((_host(), why, handle), everybody)
        hosts = {host for host, _, _ in given.values()}
        why = next((theirs for _, theirs, _ in given.values() if theirs), "")
        if len(hosts) > 1:
            why = f"the ranks are on {len(hosts)} hosts"
        if not why:
            # Whoever left memory behind was of a group that has ended: this one stands.
            while _abandoned:
                _abandoned.pop().free()
            try:
                for peer, (_, _, other) in given.items():
                    if peer != self._rank:
                        self._controls[peer] = ImportedMemory(other)
            except RuntimeError as error:
                why = str(error)
        why = next((theirs for theirs in self._exchange(why, everybody).values() if theirs), "")
        if why:
            self._give_back()
            raise PipelineError(
                code="transport",
                argument="transport",
                got=f'"push": {why}',
                expected="GPUs of one host that reach one another's memory",
                hint='use "nccl"',
            )

    def _refusal(self) -> str:
        if self.device.type != "cuda":
            return f"tensors are on {self.device}"
        visible = range(torch.cuda.device_count())
        mine = self.device.index
        blind = [d for d in visible if d != mine and not torch.cuda.can_device_access_peer(mine, d)]
        return f"{self.device} has no access to devices {blind}" if blind else ""

    def _exchange(self, mine: Any, ranks: Sequence[int]) -> dict[int, Any]:
        """What each of these ranks gives, by rank; all of them must be here."""
        self._round += 1
        limit = timedelta(seconds=self.limit_s)
        self._store.set(f"{self._round}/{self._rank}", pickle.dumps(mine))  # type: ignore[arg-type]
        found = {}
        for rank in ranks:
            key = f"{self._round}/{rank}"
            try:
                self._store.wait([key], limit)
            except dist.DistError as error:
                raise PeerLostError(
                    code="limit",
                    got=f"rank {rank} of the group is not there",
                    expected=f"every rank within {self.limit_s:g} s",
                    peer=rank,
                ) from error
            # Written by a rank of this job, as everything in its store.
            found[rank] = pickle.loads(self._store.get(key))  # noqa: S301
        return found

    def prepare(self, envelopes: Sequence[Envelope]) -> None:
        # Places lie where those of the steps before did: everything that was under way must have
        # arrived, and been used. All ranks exchange equally often, whatever changes for each.
        with torch.cuda.device(self.device):
            self._prepare(envelopes)

    def _prepare(self, envelopes: Sequence[Envelope]) -> None:
        torch.cuda.synchronize(self.device)
        arriving = [envelope for envelope in envelopes if not envelope.outgoing]
        places, num_bytes = lay_out(arriving)
        most = max((place.number + 1 for place in places), default=0)
        if most > _SLOTS:
            raise PipelineError(
                code="transport",
                argument="schedule",
                got=f"{most} messages of one rank held at once",
                expected=f"at most {_SLOTS}",
                hint='use transport="nccl"',
            )
        everybody = [self._rank, *sorted({e.peer for e in envelopes} | self._arenas.keys())]
        grows = self._arena is None or num_bytes > self._arena.num_bytes
        for peer, theirs in self._exchange(grows, everybody).items():
            if theirs and peer in self._arenas:
                self._arenas.pop(peer).close()
        self._exchange(None, everybody)
        if grows:
            if self._arena is not None:
                self._arena.free()
            self._arena = ExportedMemory(num_bytes, self.device)
        assert self._arena is not None
        where = {e.message: place for e, place in zip(arriving, places, strict=True)}
        given = self._exchange((self._arena.handle, where), everybody)
        for peer in everybody[1:]:
            if peer not in self._arenas:
                self._arenas[peer] = ImportedMemory(given[peer][0])
        self._sources = {e.message: self._source(e, where[e.message]) for e in arriving}
        self._targets = {
            e.message: self._target(e, given[e.peer][1][e.message]) for e in envelopes if e.outgoing
        }

    def _source(self, envelope: Envelope, place: Place) -> _Source:
        assert self._arena is not None
        tensors = []
        starts = tensor_offsets(envelope.specs)
        for spec, start in zip(envelope.specs, starts, strict=False):
            size = torch.Size(spec.shape).numel() * spec.dtype.itemsize
            part = self._arena.bytes[place.offset + start :][:size]
            tensors.append(part.view(spec.dtype).view(spec.shape))
        return _Source(place.number, tensors)

    def _target(self, envelope: Envelope, place: Place) -> _Target:
        base = self._arenas[envelope.peer].address + place.offset
        starts = tensor_offsets(envelope.specs)
        for key in ((envelope.peer, Kind.F), (envelope.peer, Kind.B)):
            if key not in self._streams:
                self._streams[key] = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        return _Target(place.number, [base + start for start in starts[:-1]])

    def post_receive(self, peer: int, message: Message, specs: Sequence[TensorSpec]) -> Arrival:
        return _PushArrival(self, peer, message, self._sources[message])

    def send(self, peer: int, message: Message, tensors: Sequence[torch.Tensor]) -> Departure:
        target = self._targets[message]
        held = [tensor.detach().contiguous() for tensor in tensors]
        computed = torch.cuda.Event()  # type: ignore[no-untyped-call]
        computed.record()
        stream = self._streams[peer, message.kind]
        stream.wait_event(computed)
        parts = list(zip(held, target.addresses, strict=True))
        self.push(peer, target.slot, parts, stream)
        # The first event has done its work once the stream has been told of it.
        computed.record(stream)
        return _PushDeparture(self.waits, peer, message, held, computed)

    def push(
        self,
        peer: int,
        slot: int,
        parts: Sequence[tuple[torch.Tensor, int]],
        stream: torch.cuda.Stream,
        depth: int = 1,
    ) -> None:
        """Copies tensors to addresses of a peer, once they are free, and says that they are there.

        Args:
            peer: Whose.
            slot: Whose counters go with them.
            parts: Contiguous tensors, and where to.
            stream: Where this is done.
            depth: How many pushes may be on their way, or not released: the slot's places.
        """
        handle = stream.cuda_stream
        before = self._pushed.get((peer, slot), 0)
        if before >= depth:
            self._wait_for(handle, self._credit_word(peer, slot), before - depth + 1)
        for tensor, address in parts:
            if tensor.numel():
                copy = self._driver.cuMemcpyDtoDAsync
                _check(copy(address, tensor.data_ptr(), tensor.nbytes, handle))
        word = self._controls[peer].address + 4 * (_WORDS * self._rank + slot)
        self._write(handle, word, before + 1)
        self._pushed[peer, slot] = before + 1

    def await_arrival(
        self, peer: int, message: Message | str, slot: int, waits: PolledWaits
    ) -> None:
        """Lets the current stream wait for a peer's next push."""
        count = self._arrived.get((peer, slot), 0) + 1
        self._arrived[peer, slot] = count
        wait = waits.enter(peer, message)
        assert self._control is not None
        word = self._control.address + 4 * (_WORDS * peer + slot)
        self._wait_for(torch.cuda.current_stream(self.device).cuda_stream, word, count)
        waits.leave(wait)

    def give_credit(self, peer: int, slot: int) -> None:
        """Lets the current stream say that the peer's last push has been used."""
        word = self._controls[peer].address + 4 * (_WORDS * (self._size + self._rank) + slot)
        stream = torch.cuda.current_stream(self.device).cuda_stream
        self._write(stream, word, self._arrived[peer, slot])

    def _credit_word(self, peer: int, slot: int) -> int:
        assert self._control is not None
        return self._control.address + 4 * (_WORDS * (self._size + peer) + slot)

    def _wait_for(self, stream: int, word: int, count: int) -> None:
        _check(self._driver.cuStreamWaitValue32(stream, word, count, _AT_LEAST))

    def _write(self, stream: int, word: int, count: int) -> None:
        # The write comes after everything before it in the stream, copies included.
        _check(self._driver.cuStreamWriteValue32(stream, word, count, _WITH_BARRIER))

    def pair_sums(self, peers: Sequence[int]) -> dict[int, PairSum]:
        room = len(peers) * PushedSum.num_bytes
        if room:
            self._room = ExportedMemory(room, self.device)
        starts = {peer: at * PushedSum.num_bytes for at, peer in enumerate(peers)}
        handle = b"" if self._room is None else self._room.handle
        given = self._exchange((handle, starts), range(self._size))
        for peer, start in starts.items():
            assert self._room is not None
            theirs, where = given[peer]
            self._rooms.append(ImportedMemory(theirs))
            self._sums[peer] = PushedSum(
                self,
                peer,
                _SUM_SLOT,
                self._room.bytes[start : start + PushedSum.num_bytes],
                self._rooms[-1].address + where[self._rank],
            )
        return dict(self._sums)

    def poll(self) -> None:
        self.waits.look()
        for pair in self._sums.values():
            pair.waits.look()

    @property
    def num_bytes(self) -> int:
        """Device memory held, beside torch's allocator: slots, counters, and room for sums."""
        held = (self._arena, self._control, self._room)
        return sum(memory.num_bytes for memory in held if memory is not None)

    def close(self, *, drop: bool = False) -> None:
        self._sources.clear()
        self._targets.clear()
        self.waits.clear()
        self._sums.clear()
        if self._control is None:
            return
        if not drop:
            torch.cuda.synchronize(self.device)
            self._give_back()
            return
        # What was awaited will not come: the streams run on, over whatever the slots hold. Living
        # peers may push once more, so the memory stays until a new group has been made.
        words = 2 * self._size * _WORDS
        rescue = self._rescue.cuda_stream
        _check(self._driver.cuMemsetD32Async(self._control.address, _OPEN, words, rescue))
        if _drained(self.device):
            self._close_imports()
        held = (self._arena, self._control, self._room)
        _abandoned.extend(memory for memory in held if memory is not None)
        self._arena = self._control = self._room = None

    def _give_back(self) -> None:
        """Frees the memory, when no rank has that of another open."""
        self._exchange(None, range(self._size))
        self._close_imports()
        self._exchange(None, range(self._size))
        for memory in (self._arena, self._control, self._room):
            if memory is not None:
                memory.free()
        self._arena = self._control = self._room = None

    def _close_imports(self) -> None:
        for opened in (*self._arenas.values(), *self._controls.values(), *self._rooms):
            opened.close()
        self._rooms.clear()
        self._arenas.clear()
        self._controls.clear()


_abandoned: list[ExportedMemory] = []
"""Memory of transports that were dropped."""

_AT_LEAST = 0
_WITH_BARRIER = 0


def _check(answer: tuple[Any, ...]) -> None:
    if answer[0]:
        raise RuntimeError(f"the CUDA driver answers {answer[0].name}")


def _host() -> str:
    """The host, told apart from others of the same name by its boot."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{platform.node()} {boot.read_text().strip() if boot.exists() else ''}"


def _drained(device: torch.device) -> bool:
    """Whether all streams of the device run out soon."""
    end = torch.cuda.Event()  # type: ignore[no-untyped-call]
    end.record(torch.cuda.current_stream(device))
    until = time.monotonic() + _DRAIN_S
    while not end.query():  # type: ignore[no-untyped-call]
        if time.monotonic() > until:
            return False
        time.sleep(1e-3)
    torch.cuda.synchronize(device)
    return True
