"""Messages between GPUs by NCCL, on any number of hosts.

Each pair of ranks has two communicators, one for each direction: what is received on one that is
not due yet would hold up what is sent on the same. A posted receive would hold SMs until its data
comes (a waiting one costs a GEMM beside it 9 to 19 %), so it is launched only when it is due, after
those to the same communicator that were posted before it; and both ends use few blocks.
"""

from __future__ import annotations

import time
from collections import deque
from datetime import timedelta
from threading import Thread
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_process_group_store

from dualpipe.errors import PipelineError
from dualpipe.executor.transport.base import Arrival, Departure, Transport
from dualpipe.executor.transport.polled import PolledWaits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dualpipe.executor.transport.base import Envelope, Message, TensorSpec

__all__ = ["NcclTransport"]

_NEVER = timedelta(days=365)
"""NCCL's own watchdog ends the process at its limit; this transport has another one."""

_ABORT_S = 10.0
"""How long communicators may take to let their kernels go."""


class _NcclArrival(Arrival):
    __slots__ = ("_message", "_peer", "_specs", "_tensors", "_transport", "_works")

    def __init__(
        self, transport: NcclTransport, peer: int, message: Message, specs: Sequence[TensorSpec]
    ) -> None:
        self._transport = transport
        self._peer = peer
        self._message = message
        self._specs = specs
        self._tensors: list[torch.Tensor] = []
        self._works: list[dist.Work] | None = None

    def launch(self, channel: Any, sender: int) -> None:
        """Starts to receive, into memory that is free in the current stream."""
        device = self._transport.device
        self._tensors = [torch.empty(s.shape, dtype=s.dtype, device=device) for s in self._specs]
        self._works = [channel.recv([t], sender, 0) for t in self._tensors if t.numel()]

    def ready(self) -> list[torch.Tensor]:
        wait = self._transport.waits.enter(self._peer, self._message)
        self._transport.launch_until(self._peer, self)
        assert self._works is not None
        for work in self._works:
            work.wait()
        self._transport.waits.leave(wait)
        tensors, self._tensors, self._works = self._tensors, [], []
        return tensors


class _NcclDeparture(Departure):
    __slots__ = ("_message", "_peer", "_tensors", "_waits", "_works")

    def __init__(
        self,
        waits: PolledWaits,
        peer: int,
        message: Message,
        tensors: list[torch.Tensor],
        works: list[dist.Work],
    ) -> None:
        self._waits = waits
        self._peer = peer
        self._message = message
        self._tensors = tensors
        self._works = works

    def done(self) -> None:
        if self._works:
            wait = self._waits.enter(self._peer, self._message)
            for work in self._works:
                work.wait()
            self._waits.leave(wait)
            self._works, self._tensors = [], []


class NcclTransport(Transport):
    """Sends and receives of NCCL on communicators of its own.

    Args:
        group: As for every transport.
        device: Likewise.
        limit_s: Likewise.
        max_blocks: How many SMs a transfer may hold; a send holds them until its receive is due.

    Cost: about 60 us of the host's time for a message, both ends together.
    """

    name = "nccl"

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        limit_s: float,
        max_blocks: int = 4,
    ) -> None:
        super().__init__(group, device, limit_s)
        if device.type != "cuda":
            raise PipelineError(
                code="transport",
                argument="transport",
                got=f"nccl for tensors on {device}",
                expected='"gloo" there',
            )
        self._rank = group.rank()
        self._max_blocks = max_blocks
        self.waits = PolledWaits(limit_s)
        """What the computing stream waits for."""
        store = _get_process_group_store(group)
        made = store.add(f"dualpipe/nccl/{self._rank}", 1)
        self._store = PrefixStore(f"dualpipe/nccl/{made}", store)
        # By sender and receiver, ranks of the group.
        self._channels: dict[tuple[int, int], Any] = {}
        self._posted: dict[int, deque[_NcclArrival]] = {}

    def prepare(self, envelopes: Sequence[Envelope]) -> None:
        # Making a communicator blocks until both ends do; pairs in ascending order cannot wait
        # for one another in a ring.
        mine = self._rank
        for low, high in sorted({(min(mine, e.peer), max(mine, e.peer)) for e in envelopes}):
            for sender, receiver in ((low, high), (high, low)):
                if (sender, receiver) not in self._channels:
                    self._channels[sender, receiver] = self._channel(sender, receiver)

    def _channel(self, sender: int, receiver: int) -> Any:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = _NEVER
        options.config.min_ctas = 1
        options.config.max_ctas = self._max_blocks
        store = PrefixStore(f"{sender}to{receiver}", self._store)
        # The sender is rank 0 of the two.
        channel: Any = dist.ProcessGroupNCCL(store, int(self._rank == receiver), 2, options)
        channel.eager_connect_single_device(self.device)
        # The first send waits on the host until the other end receives; two ranks that both send
        # first would wait for ever. So it is done here, where both are in the same order.
        token = torch.zeros(1, device=self.device)
        work = channel.send([token], 1, 0) if self._rank == sender else channel.recv([token], 0, 0)
        work.wait()
        torch.cuda.synchronize(self.device)
        return channel

    def post_receive(self, peer: int, message: Message, specs: Sequence[TensorSpec]) -> Arrival:
        arrival = _NcclArrival(self, peer, message, specs)
        self._posted.setdefault(peer, deque()).append(arrival)
        return arrival

    def launch_until(self, peer: int, arrival: _NcclArrival) -> None:
        """Launches the receives posted for this peer, in their order, up to this one."""
        posted = self._posted[peer]
        while arrival._works is None:
            posted.popleft().launch(self._channels[peer, self._rank], 0)

    def send(self, peer: int, message: Message, tensors: Sequence[torch.Tensor]) -> Departure:
        held = [tensor.detach().contiguous() for tensor in tensors]
        channel = self._channels[self._rank, peer]
        works = [channel.send([t], 1, 0) for t in held if t.numel()]
        return _NcclDeparture(self.waits, peer, message, held, works)

    def poll(self) -> None:
        self.waits.look()

    def close(self, *, drop: bool = False) -> None:
        self.waits.clear()
        self._posted.clear()
        channels, self._channels = self._channels, {}
        if not drop:
            for channel in channels.values():
                channel.shutdown()
            return
        # Ending one communicator waits for the kernels of all: they are let go together.
        threads = [Thread(target=channel.abort, daemon=True) for channel in channels.values()]
        for thread in threads:
            thread.start()
        until = time.monotonic() + _ABORT_S
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
