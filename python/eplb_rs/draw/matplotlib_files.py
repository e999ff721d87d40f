"""Matplotlib, where it is installed, and what it writes."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from eplb_rs.errors import InvalidInputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["check_matplotlib", "rendered"]


def check_matplotlib(argument: str, name: str) -> None:
    """Refuses to draw where nothing is there to draw with.

    Args:
        argument: What asks for a picture.
        name: The file it is for.

    Raises:
        InvalidInputError: ``missing_dependency``.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise InvalidInputError(
            code="missing_dependency",
            argument=argument,
            got=name,
            expected="drawn by Matplotlib, which is not installed",
            hint="pip install 'eplb-rs[plot]'",
        ) from None


def rendered(fig: Figure, kind: str) -> bytes:
    """A figure as a file of a kind, the same bytes each time."""
    stream = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    fig.savefig(stream, format=kind, dpi=160, facecolor=fig.get_facecolor(), metadata=metadata)
    return stream.getvalue()
