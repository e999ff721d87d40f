"""One rank's instructions, prepared once and run again and again."""

from __future__ import annotations

import itertools
from functools import partial
from typing import TYPE_CHECKING

from dualpipe.executor.pair import has_hook, run_pair, run_rest
from dualpipe.executor.transport.base import Envelope, Message
from dualpipe.instruction import Instruction, Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dualpipe.executor.copies import Copies
    from dualpipe.executor.pair import Streams
    from dualpipe.executor.stage import Stage
    from dualpipe.executor.transport.base import Transport

    Action = Callable[[], None]

__all__ = ["Stream"]

_COMPUTE = {
    Kind.F: "forward",
    Kind.B: "backward",
    Kind.I: "backward_input",
    Kind.W: "backward_weight",
    Kind.OVERLAP_F: "forward",
    Kind.OVERLAP_B: "backward",
    Kind.WAIT_SEND_F: "wait_send_forward",
    Kind.WAIT_SEND_B: "wait_send_backward",
}
_TRANSFER = {
    # What is done, which way the message goes, and to which stage's rank, counted from here.
    Kind.SEND_F: ("send_forward", Kind.F, +1),
    Kind.RECV_F: ("receive_forward", Kind.F, -1),
    Kind.SEND_B: ("send_backward", Kind.B, -1),
    Kind.RECV_B: ("receive_backward", Kind.B, +1),
}
_COMPLETES = {Kind.B, Kind.W, Kind.OVERLAP_B}
# What stands between a pair and the weight part that its hook has left alone.
_BETWEEN = {Kind.OVERLAP_B, Kind.SEND_F, Kind.SEND_B}


class Stream:
    """The instructions of one rank with what each of them does, in the order of running.

    Preparing binds every instruction to its stage, message and peer, so that running costs one
    call each.

    Args:
        instructions: The rank's stream, transfers placed.
        stages: The rank's stages by stage and copy.
        peers: The rank of the transport's group that holds each copy of each stage.
        transport: What moves the messages.
        copies: What reduces gradients; None to leave them alone.
        streams: What a pair's hook gets.
    """

    def __init__(
        self,
        instructions: Sequence[Instruction],
        stages: Mapping[tuple[int, int], Stage],
        peers: Mapping[tuple[int, int], int],
        transport: Transport,
        copies: Copies | None,
        streams: Streams,
    ) -> None:
        self._given = instructions
        self._stages = stages
        self._peers = peers
        self._transport = transport
        self._streams = streams
        self._copies = copies
        # The last backward of every stage completes its gradients.
        ends = {i[1::2]: i for i in instructions if i.kind in _COMPLETES}
        self._last = set(ends.values())
        self.at = 0
        """Which instruction is being run."""
        self.instructions: list[Instruction] = []
        self.actions: list[Action] = []
        self._prepare(copies)
        self._next = 0
        lead = itertools.takewhile(lambda i: i.kind == Kind.F, self.instructions)
        self._num_lead = sum(1 for _ in lead)

    def run_lead(self) -> None:
        """Runs the forwards before the first transfer. :meth:`run` goes on behind them."""
        self._run(0, self._num_lead)
        self._next = self._num_lead

    def run(self) -> None:
        """Runs all instructions."""
        self._run(self._next, len(self.actions))
        self._next = 0

    def reset(self) -> None:
        """Starts anew, wherever it broke off."""
        self.at = self._next = 0

    def _run(self, start: int, stop: int) -> None:
        for at in range(start, stop):
            self.at = at
            self.actions[at]()

    def _prepare(self, copies: Copies | None) -> None:
        early: Instruction | None = None
        rest: tuple[Instruction, Action] | None = None
        for index, instruction in enumerate(self._given):
            kind = instruction.kind
            if rest is not None and kind not in _BETWEEN:
                self._append(*rest)
                rest = None
            if kind == Kind.OVERLAP_F:
                backward = self._given[index + 1]
                pair = self._pair(instruction, backward)
                if pair is not None:
                    self._append(instruction, pair)
                    behind = self._stages[backward.stage, backward.copy]
                    rest = backward, partial(run_rest, behind, backward.micro_batch)
                else:
                    self._append(instruction, self._compute(instruction))
                    early = self._early_send(index)
                    if early is not None:
                        self._append(early, self._transfer(early))
            elif kind == Kind.OVERLAP_B:
                if rest is None:
                    self._append(instruction, self._compute(instruction))
            elif kind in _COMPUTE:
                self._append(instruction, self._compute(instruction))
            elif kind in _TRANSFER:
                if instruction != early:
                    self._append(instruction, self._transfer(instruction))
            elif copies is not None and kind == Kind.REDUCE_GRAD:
                self._append(instruction, partial(copies.start, instruction.stage))
            elif copies is not None and kind == Kind.WAIT_REDUCE_GRAD:
                self._append(instruction, partial(copies.wait, instruction.stage))
        if rest is not None:
            self._append(*rest)
        if copies is not None:
            end = Instruction(Kind.WAIT_REDUCE_GRAD, max(self._stages)[0], 0)
            self._append(end, copies.finish)

    def _append(self, instruction: Instruction, action: Action) -> None:
        self.instructions.append(instruction)
        self.actions.append(action)

    def _compute(self, instruction: Instruction) -> Action:
        stage = self._stages[instruction.stage, instruction.copy]
        action = partial(getattr(stage, _COMPUTE[instruction.kind]), instruction.micro_batch)
        if instruction in self._last and self._copies is not None:
            return partial(self._copies.last, stage, action)
        return action

    def _pair(self, first: Instruction, second: Instruction) -> Action | None:
        forward = self._stages[first.stage, first.copy]
        backward = self._stages[second.stage, second.copy]
        if not has_hook(forward, backward):
            return None
        return partial(
            run_pair, forward, first.micro_batch, backward, second.micro_batch, self._streams
        )

    def _message(self, instruction: Instruction) -> tuple[int, Message]:
        _, way, step = _TRANSFER[instruction.kind]
        stage, copy = instruction.stage, instruction.copy
        message = Message(way, min(stage, stage + step), instruction.micro_batch, copy)
        return self._peers[stage + step, copy], message

    def _transfer(self, instruction: Instruction) -> Action:
        stage = self._stages[instruction.stage, instruction.copy]
        name, _, _ = _TRANSFER[instruction.kind]
        return partial(getattr(stage, name), self._transport, *self._message(instruction))

    def _early_send(self, index: int) -> Instruction | None:
        """The send of a pair's forward, if it may go ahead of the pair's backward.

        It may unless that would overtake another message to the same peer.
        """
        wanted = self._given[index]._replace(kind=Kind.SEND_F)
        for instruction in self._given[index + 2 :]:
            if instruction == wanted:
                return wanted
            if instruction.kind.computes:
                break
            if instruction.kind in {Kind.SEND_F, Kind.SEND_B}:
                peer, _ = self._message(instruction)
                if peer == self._message(wanted)[0]:
                    break
        return None

    def envelopes(self, *, training: bool) -> list[Envelope]:
        """Every message that the rank sends and receives, in the order of its stream.

        A receive's tensors are in use until the backward of their micro-batch has ended; in
        inference, until what was made of them has been sent.
        """
        released = {}
        for index, (kind, stage, m, copy) in enumerate(self._given):
            last = kind in _COMPLETES
            if last if training else kind in {Kind.F, Kind.OVERLAP_F, Kind.WAIT_SEND_F}:
                released[stage, m, copy] = index
        found = []
        for index, instruction in enumerate(self._given):
            if instruction.kind not in _TRANSFER:
                continue
            place = instruction.stage, instruction.copy
            flight = self._stages[place].flights[instruction.micro_batch]
            peer, message = self._message(instruction)
            boundary = (
                flight.boundary_out if message.boundary == instruction.stage else flight.boundary_in
            )
            assert boundary is not None
            specs = boundary.activations if message.kind == Kind.F else boundary.gradients
            if instruction.kind in {Kind.SEND_F, Kind.SEND_B}:
                found.append(Envelope(message, peer, specs, outgoing=True))
            else:
                until = released[instruction[1:]]
                found.append(Envelope(message, peer, specs, False, index, until))
        return found
