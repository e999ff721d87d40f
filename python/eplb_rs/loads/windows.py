"""Which windows of a trace are meant."""

from __future__ import annotations

import operator
from typing import TypeAlias

from eplb_rs.errors import InvalidInputError
from eplb_rs.loads.file import shortened

__all__ = ["WindowChoice", "chosen_windows"]

WindowChoice: TypeAlias = str | int | slice | None


def chosen_windows(choice: WindowChoice, num: int, labels: list[str] | None) -> list[int]:
    """The numbers of the windows that are meant, of those a file has.

    Raises:
        InvalidInputError: ``out_of_range`` or ``wrong_type``.
    """
    numbers = list(range(num))
    wanted = _selection(choice, labels)
    if isinstance(wanted, str):
        chosen = [number for number in numbers if labels is not None and labels[number] == wanted]
    elif isinstance(wanted, slice):
        chosen = numbers[wanted]
    else:
        chosen = [numbers[wanted]] if -num <= wanted < num else []
    if not chosen:
        raise InvalidInputError(
            code="out_of_range",
            argument="windows",
            got=repr(choice),
            expected=f"one of the file's {num} windows at least",
            hint=f"they are numbered 0 to {num - 1}",
        )
    return chosen


def _selection(choice: WindowChoice, labels: list[str] | None) -> str | int | slice:
    """What is chosen: a label, a number or a range."""
    text = choice.strip() if isinstance(choice, str) else None
    if choice is None or text == "all":
        return slice(None)
    if text == "last":
        return -1
    if text is not None and labels is not None and text in labels:
        return text
    try:
        if isinstance(choice, slice):
            choice.indices(1)  # refuses bounds that are no numbers, and steps of 0
            return choice
        if text is None:
            return operator.index(choice)  # type: ignore[arg-type]  # refuses what is no number
        start, colon, stop = text.partition(":")
        if not colon:
            return int(text)
        return slice(int(start) if start else None, int(stop) if stop else None)
    except (TypeError, ValueError):
        names = ", ".join(dict.fromkeys(labels)) if labels else ""
        raise InvalidInputError(
            code="wrong_type",
            argument="windows",
            got=shortened(repr(choice), 80),
            expected="all, last, a number such as 3 or -1, or a range such as 0:4",
            hint=f"or a label: {shortened(names, 120)}" if names else "",
        ) from None
