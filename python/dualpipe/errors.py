"""What is raised when a schedule cannot be made or proved, or a step cannot be run.

Every exception names the argument at fault, shows what it got, says what it wanted and how to
mend it. The parts are attributes, for programs that react to them.
"""

from __future__ import annotations

from typing import Any

__all__ = ["DeadlockError", "MismatchError", "PeerLostError", "PipelineError", "ScheduleError"]


class ScheduleError(ValueError):
    """A schedule, or a request for one, that was refused. Nothing was changed by it.

    Attributes:
        code: The kind of fault, in snake case, for example ``"odd_ranks"``; for a schedule that
            breaks a rule, the rule: ``"placement"``, ``"twice"``, ``"missing"``, ``"order"``,
            ``"pairing"``, ``"message_order"``, ``"reduction"`` or ``"memory"``.
        argument: The name of the argument at fault.
        got: What was given, as text.
        expected: What would have been taken, as text.
        hint: How to mend it, as text; may be empty.
        rank: For a rule broken, the rank.
        index: The instruction, counted in the rank's stream; its length where one is missing.
        instruction: That instruction as text.
        transport: The transport under which the rule is broken; None for all.
        waits: Who waits for whom: (rank, index, instruction, rank waited for).
        report: The whole counter-example with its grid, which is also the message.
    """

    def __init__(
        self,
        *,
        code: str,
        argument: str,
        got: str,
        expected: str,
        hint: str = "",
        rank: int | None = None,
        index: int | None = None,
        instruction: str | None = None,
        transport: str | None = None,
        waits: list[tuple[int, int, str, int]] | None = None,
        report: str | None = None,
    ) -> None:
        self.code = code
        self.argument = argument
        self.got = got
        self.expected = expected
        self.hint = hint
        self.rank = rank
        self.index = index
        self.instruction = instruction
        self.transport = transport
        self.waits = waits or []
        self.report = report
        message = f"`{argument}` ({got}) must be {expected}"
        super().__init__(report or (f"{message}; {hint}" if hint else message))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), dict(self.__dict__))


class DeadlockError(ScheduleError):
    """A schedule whose ranks would wait for one another for ever."""


class PipelineError(RuntimeError):
    """A step, or the set-up of an executor, that was refused or broke off.

    Attributes:
        code: The kind of fault, in snake case.
        argument: The name of the argument at fault; empty where it is none.
        got: What was given or met, as text.
        expected: What would have been taken, as text.
        hint: How to mend it, as text; may be empty.
        rank: The pipeline rank that raises.
        instruction: What it was doing, as a word of the schedule's text.
        peer: The pipeline rank at fault, or at the other end.
    """

    def __init__(
        self,
        *,
        code: str,
        argument: str = "",
        got: str,
        expected: str,
        hint: str = "",
        rank: int | None = None,
        instruction: str | None = None,
        peer: int | None = None,
    ) -> None:
        self.code = code
        self.argument = argument
        self.got = got
        self.expected = expected
        self.hint = hint
        self.rank = rank
        self.instruction = instruction
        self.peer = peer
        super().__init__(self._text())

    def _text(self) -> str:
        places = [] if self.rank is None else [f"rank {self.rank}"]
        places += [] if self.instruction is None else [f"instruction {self.instruction}"]
        places += [] if self.peer is None else [f"peer {self.peer}"]
        start = f"{', '.join(places)}: " if places else ""
        if self.argument:
            text = f"{start}`{self.argument}` ({self.got}) must be {self.expected}"
        else:
            text = f"{start}{self.got}; expected {self.expected}"
        return f"{text}; {self.hint}" if self.hint else text

    def __reduce__(self) -> tuple[Any, ...]:
        parts = {name: value for name, value in self.__dict__.items() if name != "__notes__"}
        return _rebuild, (type(self), parts)


class PeerLostError(PipelineError):
    """A rank is gone, has failed, or did not answer within the limit.

    All ranks that raise it for the same step name the same ranks, if they share a store.

    Attributes:
        code: ``"lost"``: a process that is gone or stopped; ``"failed"``: a rank whose step
            raised; ``"limit"``: a rank that lives, but was waited for too long; ``"closed"``: a
            connection that broke between ranks that live, or, without a store, anything;
            ``"expelled"``: this rank itself was taken for lost by the others.
        peer: The first of the ranks at fault.
        lost: All of them, pipeline ranks.
        notes: What every rank that answered was doing, by pipeline rank.
    """

    def __init__(
        self, *, lost: tuple[int, ...] = (), notes: dict[int, str] | None = None, **parts: Any
    ) -> None:
        self.lost = lost
        self.notes = notes or {}
        super().__init__(**parts)

    def _text(self) -> str:
        notes = "".join(f"\n  rank {rank} {note}" for rank, note in sorted(self.notes.items()))
        return super()._text() + notes


class MismatchError(PipelineError):
    """Ranks do not agree on what they are about to run."""


def _rebuild(
    kind: type[ScheduleError | PipelineError], parts: dict[str, Any]
) -> ScheduleError | PipelineError:
    return kind(**parts)
