"""What is raised when a request cannot be met.

Every exception names the argument at fault, shows what it got, says what it wanted and how to
mend it. The parts are attributes, for programs that react to them.
"""

from __future__ import annotations

from typing import Any

__all__ = ["InfeasibleError", "InvalidInputError", "PlanError"]


class PlanError(Exception):
    """A request to the planner that was refused. Nothing was changed by it.

    Attributes:
        code: The kind of fault, in snake case, for example ``"not_multiple"``.
        argument: The name of the argument at fault.
        got: What was given, as text.
        expected: What would have been taken, as text.
        hint: How to mend it, as text; may be empty.
    """

    def __init__(
        self, *, code: str, argument: str, got: str, expected: str, hint: str = ""
    ) -> None:
        self.code = code
        self.argument = argument
        self.got = got
        self.expected = expected
        self.hint = hint
        message = f"`{argument}` ({got}) must be {expected}"
        super().__init__(f"{message}; {hint}" if hint else message)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self._parts())

    def renamed(self, argument: str) -> PlanError:
        """The same refusal of an argument that the caller knows by another name."""
        return type(self)(**{**self._parts(), "argument": argument})

    def _parts(self) -> dict[str, str]:
        return {
            "code": self.code,
            "argument": self.argument,
            "got": self.got,
            "expected": self.expected,
            "hint": self.hint,
        }


class InvalidInputError(PlanError, ValueError):
    """An argument that is wrong in itself, or does not fit another one."""


class InfeasibleError(PlanError):
    """Arguments that are each fine, but that no placement can satisfy together."""


def _rebuild(kind: type[PlanError], parts: dict[str, str]) -> PlanError:
    return kind(**parts)
