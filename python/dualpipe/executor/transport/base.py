"""What a transport does: one small class moves the tensors of messages between two ranks.

The order of messages from one rank to another is the order of the two instruction streams, which
the schedule's proof has shown to be equal at both ends. A transport may rely on it: the n-th
``send`` to a peer meets the n-th ``post_receive`` there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    import torch.distributed as dist

    from dualpipe.instruction import Kind

__all__ = ["Arrival", "Departure", "Envelope", "Message", "PairSum", "TensorSpec", "Transport"]


class TensorSpec(NamedTuple):
    """Shape and dtype of one tensor that crosses a boundary."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Message(NamedTuple):
    """What is moved: the same key at both ends."""

    kind: Kind
    """F for an activation, B for its gradient."""
    boundary: int
    """The stage before the boundary: it sends activations and receives gradients."""
    micro_batch: int
    """The micro-batch, counted in its copy."""
    copy: int
    """The copy of the stages."""


class Envelope(NamedTuple):
    """A message of a step as :meth:`Transport.prepare` is told of it."""

    message: Message
    peer: int
    """The other end, a rank of the transport's group."""
    specs: tuple[TensorSpec, ...]
    outgoing: bool
    """Whether this rank sends it."""
    posted: int = -1
    """Of an incoming one: which instruction of the rank's stream posts its receive."""
    released: int = -1
    """Of an incoming one: the instruction after which :meth:`Arrival.release` has been called."""


class Arrival(ABC):
    """A receive that has been posted."""

    @abstractmethod
    def ready(self) -> list[torch.Tensor]:
        """The tensors, safe to use for work that the caller starts after this.

        On a CPU the caller blocks until they are there, up to the transport's limit. On a GPU the
        current stream waits and the host does not.
        """

    def release(self) -> None:  # noqa: B027 - fresh buffers need no return
        """Says that all work that uses the tensors has been started.

        The buffers may be used for another message after it. Called at most once.
        """


class Departure(ABC):
    """A send that has been started. Its tensors are held until :meth:`done`."""

    @abstractmethod
    def done(self) -> None:
        """Waits, as :meth:`Arrival.ready` does, until the tensors have been read, and drops them."""


class PairSum(ABC):
    """Sums tensors with those of one other rank, in place, beside what else the ranks do.

    Both ranks give tensors of the same shapes in the same order; the sums are equal bit for bit.
    """

    @abstractmethod
    def add(self, tensor: torch.Tensor) -> None:
        """Starts the sum of a contiguous tensor, after the work that the current stream holds now.

        Never blocks. The tensor is left alone until :meth:`wait`.
        """

    @abstractmethod
    def wait(self) -> None:
        """Waits, as :meth:`Arrival.ready` does, until all sums that were started are there."""


class Transport(ABC):
    """Moves messages between the ranks of one group.

    Made once, by every rank of the group at the same time.

    Args:
        group: The ranks; peers are given as ranks of this group. Groups that the transport makes
            have this group's members.
        device: Where the tensors live.
        limit_s: How long a wait may last.
    """

    name: str

    waiting_for: int | None = None
    """The peer that the host waits for just now."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, limit_s: float) -> None:
        self.group = group
        self.device = device
        self.limit_s = limit_s

    def prepare(self, envelopes: Sequence[Envelope]) -> None:  # noqa: B027 - most need nothing
        """Gets ready for steps with these messages, in the order of the rank's stream.

        Called by all ranks of the group at the same time, before the first step of a plan.
        """

    def pair_sums(self, peers: Sequence[int]) -> dict[int, PairSum]:
        """What sums with each of these peers; nothing, on all ranks alike, if it cannot.

        Called by all ranks of the group at the same time, once.
        """
        return {}

    @abstractmethod
    def post_receive(self, peer: int, message: Message, specs: Sequence[TensorSpec]) -> Arrival:
        """Makes a receive ready ahead of time. Never blocks, and holds no SM while it waits."""

    @abstractmethod
    def send(self, peer: int, message: Message, tensors: Sequence[torch.Tensor]) -> Departure:
        """Starts a send, after the work that the current stream holds now. Never blocks."""

    def poll(self) -> None:  # noqa: B027 - a transport without threads has nothing to look at
        """Raises what went wrong meanwhile: a peer that is gone, a limit that has passed."""

    @abstractmethod
    def close(self, *, drop: bool = False) -> None:
        """Ends the transport and the groups it has made.

        Args:
            drop: Leave what is under way where it is, which wakes the peers that wait for it.
        """
