"""What the buffers of modules hold, to be put back after a forward that does not count."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

    from torch import nn

__all__ = ["Buffers"]


class Buffers:
    """The buffers of modules as they are now: which tensors, and their contents.

    A module may write into a buffer, or put another tensor in its place.

    Args:
        modules: Theirs, and those of the modules inside.
        only: Of these, by module and name; all by default.
    """

    def __init__(
        self, modules: Iterable[nn.Module], only: Container[tuple[nn.Module, str]] | None = None
    ) -> None:
        self._held = {
            (owner, name): (buffer, None if buffer is None else buffer.detach().clone())
            for module in modules
            for owner in module.modules()
            for name, buffer in owner._buffers.items()
            if only is None or (owner, name) in only
        }

    def changed(self) -> set[tuple[nn.Module, str]]:
        """Those that are other tensors now, or hold something else.

        By their contents, since batch norms do not count what they write.
        """
        return {
            (owner, name)
            for (owner, name), (buffer, content) in self._held.items()
            if owner._buffers.get(name) is not buffer
            or (buffer is not None and content is not None and not torch.equal(buffer, content))
        }

    @torch.no_grad()
    def restore(self) -> None:
        """Puts back what was there."""
        for (owner, name), (buffer, content) in self._held.items():
            if buffer is not None and content is not None:
                buffer.copy_(content)
            owner._buffers[name] = buffer
