"""What the buffers of modules hold, to be put back after a forward that does not count."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

__all__ = ["Buffers"]


class Buffers:
    """The buffers of modules as they are now: which tensors, and their contents.

    A module may write into a buffer, or put another tensor in its place.

    Args:
        which: By module and name.
    """

    def __init__(self, which: Iterable[tuple[nn.Module, str]]) -> None:
        self._held = {}
        for owner, name in which:
            buffer = owner._buffers.get(name)
            content = None if buffer is None else buffer.detach().clone()
            self._held[owner, name] = buffer, content

    @classmethod
    def of(cls, modules: Iterable[nn.Module]) -> Buffers:
        """All buffers of modules, and of the modules inside."""
        owners = (owner for module in modules for owner in module.modules())
        return cls((owner, name) for owner in owners for name in owner._buffers)

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
