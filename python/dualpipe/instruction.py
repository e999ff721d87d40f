"""One instruction of a schedule."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

__all__ = ["Instruction", "Kind"]


class Kind(IntEnum):
    """What an instruction does."""

    F = 0
    """The forward of a stage."""
    B = 1
    """The whole backward."""
    I = 2  # noqa: E741 - the field's name
    """The backward for the input only; frees nothing."""
    W = 3
    """The backward for the weights only."""
    OVERLAP_F = 4
    """The forward of an overlapped pair; its backward is the next instruction."""
    OVERLAP_B = 5
    """The whole backward of an overlapped pair."""
    SEND_F = 6
    """Send the activation that the stage has made to the next stage's rank."""
    RECV_F = 7
    """Post the receive of the stage's input activation."""
    WAIT_SEND_F = 8
    """Wait until a sent activation has left; its buffer is free then."""
    SEND_B = 9
    """Send the gradient of the stage's input to the previous stage's rank."""
    RECV_B = 10
    """Post the receive of the gradient of the stage's output."""
    WAIT_SEND_B = 11
    """Wait until a sent gradient has left; its buffer is free then."""
    REDUCE_GRAD = 12
    """Start the reduction of the stage's weight gradients over its copies."""
    WAIT_REDUCE_GRAD = 13
    """Wait for that reduction."""
    UNSHARD = 14
    """Gather the stage's sharded parameters (PyTorch's; kept for exchange)."""
    RESHARD = 15
    """Drop the gathered parameters (likewise)."""

    @property
    def computes(self) -> bool:
        """Whether the instruction computes."""
        return self <= Kind.OVERLAP_B

    @property
    def transfers(self) -> bool:
        """Whether it belongs to a transfer between two ranks."""
        return Kind.SEND_F <= self <= Kind.WAIT_SEND_B


_BEFORE = {Kind.OVERLAP_F: "(", Kind.RECV_F: "<", Kind.RECV_B: "<"}
_LETTER = "FBIWFBfffbbbRRUu"
_AFTER = {
    Kind.OVERLAP_B: ")",
    Kind.SEND_F: ">",
    Kind.SEND_B: ">",
    Kind.WAIT_SEND_F: "!",
    Kind.WAIT_SEND_B: "!",
    Kind.WAIT_REDUCE_GRAD: "!",
}


class Instruction(NamedTuple):
    """What to do, for which stage, on which copy of it, with which micro-batch of that copy.

    ``str()`` gives its word in the schedule's text.
    """

    kind: Kind
    stage: int
    micro_batch: int
    copy: int = 0

    def __str__(self) -> str:
        number = self.micro_batch if self.kind <= Kind.WAIT_SEND_B else ""
        place = f"{self.stage}{chr(39) * self.copy}{_LETTER[self.kind]}{number}"
        return f"{_BEFORE.get(self.kind, '')}{place}{_AFTER.get(self.kind, '')}"
