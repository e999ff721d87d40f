"""Arguments as the core takes them, refused by name where they cannot be."""

from __future__ import annotations

import operator

import numpy as np
import numpy.typing as npt

from dualpipe.errors import ScheduleError

__all__ = ["byte_sizes", "link_numbers", "numbers", "one_of", "string", "whole_number"]


def whole_number(value: object, argument: str, below: int = 2**32) -> int:
    """A whole number that is not negative and fits the core."""
    try:
        count = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        count = -1
    if isinstance(value, bool) or not 0 <= count < below:
        raise ScheduleError(
            code=argument, argument=argument, got=repr(value), expected="a whole number, 0 or more"
        )
    return count


def string(value: object, argument: str) -> str:
    """A text, not a path or bytes."""
    if not isinstance(value, str):
        raise ScheduleError(
            code="not_text",
            argument=argument,
            got=type(value).__name__,
            expected="a str",
            hint="Schedule.load reads files",
        )
    return value


def one_of(argument: str, value: object, known: tuple[str, ...]) -> None:
    """Refuses what is not one of a few words."""
    if value not in known:
        raise ScheduleError(
            code=argument, argument=argument, got=repr(value), expected=" or ".join(known)
        )


def numbers(value: npt.ArrayLike, argument: str, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Numbers of a shape, flat; a single number stands for all."""
    try:
        figures = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ScheduleError(
            code="not_a_number", argument=argument, got=repr(value), expected="numbers"
        ) from error
    if figures.ndim == 0:
        figures = np.full(shape, figures)
    if figures.shape != shape:
        raise ScheduleError(
            code="length",
            argument=argument,
            got=f"shape {list(figures.shape)}",
            expected=f"a number, or shape {list(shape)}",
        )
    return np.ascontiguousarray(figures).ravel()


def link_numbers(value: npt.ArrayLike, argument: str, p: int) -> npt.NDArray[np.float64]:
    """One figure for all links as it is; one for each, flat."""
    single = np.ndim(value) == 0
    return numbers(value, argument, () if single else (p, p))


def byte_sizes(
    activation_bytes: npt.ArrayLike | None, message_bytes: npt.ArrayLike, num_stages: int
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]] | None:
    """Sizes of every stage, or None where activations have none."""
    if activation_bytes is None:
        return None
    found = []
    for argument, given in (
        ("activation_bytes", activation_bytes),
        ("message_bytes", message_bytes),
    ):
        sizes = numbers(given, argument, (num_stages,))
        fitting = (sizes >= 0) & (sizes < 2.0**53)
        if not np.all(fitting):
            raise ScheduleError(
                code="sizes",
                argument=argument,
                got=str(sizes[~fitting][0]),
                expected="0 to 2**53 bytes",
            )
        found.append(sizes.astype(np.uint64))
    return found[0], found[1]
