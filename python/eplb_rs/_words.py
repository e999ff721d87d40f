"""Numbers in words, as reports and pictures show them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["counted", "duration", "id_ranges", "printable", "quantity"]

_UNITS = ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k"))


def quantity(value: float) -> str:
    """A load with four significant digits and an SI prefix."""
    if value < 1000 and float(value).is_integer():
        return f"{value:.0f}"
    rounded = float(f"{value:.3e}")
    size, prefix = next((unit for unit in _UNITS if rounded >= unit[0]), (1.0, ""))
    return f"{rounded / size:.{_decimals(rounded / size, 4)}f}{prefix}"


def duration(time_us: float) -> str:
    """A time in the unit that suits it."""
    for unit_us, unit in ((1e6, "s"), (1e3, "ms")):
        if time_us >= 0.1 * unit_us:
            return f"{time_us / unit_us:.{_decimals(time_us / unit_us, 3)}f} {unit}"
    return f"{time_us:.0f} us"


def _decimals(value: float, digits: int) -> int:
    """Decimals that show so many significant digits of a number of at least 0.1 or so."""
    whole = len(str(int(value))) if value >= 1 else 0
    return max(digits - whole, 0)


def id_ranges(ids: Iterable[int]) -> str:
    """Numbers as ranges: 0-2, 5."""
    ranges: list[list[int]] = []
    for number in sorted(ids):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def printable(text: str) -> str:
    """Text from outside without what could move a terminal's cursor."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def counted(num: int, noun: str) -> str:
    """So many of something."""
    return f"{num} {noun}" if num == 1 else f"{num} {noun}s"
