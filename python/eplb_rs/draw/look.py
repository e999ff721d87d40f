"""What all pictures look like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["DARK", "LIGHT", "Palette", "calm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Palette:
    """The colours of a picture, as CSS has them: :data:`LIGHT` for paper and light pages,
    :data:`DARK` for dark ones."""

    background: str
    text: str
    quiet: str
    grid: str
    before: str
    after: str
    idle: str
    mean: str
    busy: str
    overloaded: str


LIGHT = Palette(
    background="#ffffff",
    text="#1c2330",
    quiet="#5d6675",
    grid="#d9dee6",
    before="#c2571a",
    after="#1f6fb2",
    idle="#2f6fa8",
    mean="#f6f4ef",
    busy="#e08a3c",
    overloaded="#7c1d12",
)
"""For paper and light pages."""

DARK = Palette(
    background="#14181f",
    text="#e6e9ee",
    quiet="#98a2b3",
    grid="#333b48",
    before="#f0995a",
    after="#6db3f2",
    idle="#4d9be0",
    mean="#1d232c",
    busy="#e58a3a",
    overloaded="#ffe3b8",
)
"""For dark pages."""


def calm(axis: Axes, palette: Palette) -> None:
    """Takes the frame and the ticks off."""
    axis.tick_params(colors=palette.quiet, labelsize=8, length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
