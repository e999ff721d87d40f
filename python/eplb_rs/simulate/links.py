"""What moving weights costs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from eplb_rs._inputs import wrong_type
from eplb_rs.errors import InvalidInputError

__all__ = ["Links", "check_links"]


class Links(NamedTuple):
    """What moving weights costs."""

    expert_bytes: float
    """The bytes of one expert of one layer."""
    intra_node_gb_s: float | None = None
    """What a rank sends to another of its node, in 1e9 bytes a second; ``None`` if not known."""
    inter_node_gb_s: float | None = None
    """What it sends to one of another node."""


def check_links(links: Links | None) -> None:
    """Refuses what cannot be.

    Raises:
        InvalidInputError: ``wrong_type``, ``out_of_range``; ``inconsistent`` for one speed without
            the other.
    """
    if links is None:
        return
    if not isinstance(links, Links):
        raise wrong_type("links", links, "an eplb_rs.simulate.Links or None")
    # The speed between nodes first: it may stand for both.
    for name in ("expert_bytes", "inter_node_gb_s", "intra_node_gb_s"):
        value = getattr(links, name)
        if value is None and name != "expert_bytes":
            continue
        if not isinstance(value, int | float | np.number) or not 0 < value < float("inf"):
            raise InvalidInputError(
                code="out_of_range", argument=name, got=repr(value), expected="finite and above 0"
            )
    if (links.intra_node_gb_s is None) != (links.inter_node_gb_s is None):
        missing = "intra" if links.intra_node_gb_s is None else "inter"
        raise InvalidInputError(
            code="inconsistent",
            argument=f"{missing}_node_gb_s",
            got="None",
            expected="given where the other speed is",
        )
