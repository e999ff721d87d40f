"""What the terminal can show."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Style", "facts_text"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """What the terminal can show.

    Attributes:
        width: In columns.
        colour: Whether it takes ANSI colours.
        blocks: Whether its encoding has block characters; ASCII is used otherwise.
    """

    width: int = 80
    colour: bool = False
    blocks: bool = True

    def bold(self, text: str) -> str:
        """Text that stands out."""
        return self._painted(text, "1")

    def dim(self, text: str) -> str:
        """Text that stands back."""
        return self._painted(text, "2")

    def before(self, text: str) -> str:
        """Text about the placement that engines start with."""
        return self._painted(text, "33")

    def after(self, text: str) -> str:
        """Text about the plan."""
        return self._painted(text, "32")

    def _painted(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour and text.strip() else text


def facts_text(facts: Iterable[tuple[str, str]], style: Style) -> str:
    """Names, and beside them their values."""
    lines = []
    for name, value in facts:
        wrapped = textwrap.wrap(value, max(style.width - 12, 20)) or [""]
        lines.append(style.dim(f"{name:<12}") + wrapped[0])
        lines += [" " * 12 + line for line in wrapped[1:]]
    return "\n".join(lines)
