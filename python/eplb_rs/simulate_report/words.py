"""What reports on a replay say in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eplb_rs._words import quantity

if TYPE_CHECKING:
    from eplb_rs.simulate import Outcome

__all__ = ["SHARES_TEXT", "balance_text", "bytes_text", "every", "outcome_name"]

SHARES_TEXT = {
    "uniform": "tokens split evenly",
    "past": "tokens split as suits the past",
    "arriving": "tokens split as they arrive",
}
"""The ways of splitting, in words."""


def outcome_name(outcome: Outcome) -> str:
    """An outcome, by its policy and its way of splitting."""
    return f"{outcome.policy}, {outcome.shares}"


def balance_text(value: float) -> str:
    """A balance with as many digits as matter."""
    return f"{value:.4f}"


def bytes_text(num: float) -> str:
    """A number of bytes."""
    return f"{quantity(num)}B" if num >= 1000 else f"{num:.0f} B"


def every(interval: int) -> str:
    """When plans are made."""
    return "after every window" if interval == 1 else f"after every {interval} windows"
