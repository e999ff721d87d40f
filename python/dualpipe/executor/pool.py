"""Buffers for receives, used again and again."""

from __future__ import annotations

from collections import deque
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from dualpipe.executor.transport.base import TensorSpec

__all__ = ["Pool"]

# How many tensors share a storage. Without it nothing can be known to be free, and every buffer
# is a fresh one.
_use_count: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)


class Pool:
    """Hands out tensors whose memory nobody uses any more.

    A buffer is free once no tensor shares its storage: no autograd graph has saved it, no output
    of a user's module is a view of it. So nobody has to give one back, and nobody can too early.
    The pool holds as many buffers as were in use at once.

    On a GPU a buffer may be free on the host while kernels that read it are still queued; there
    the transport orders its writes after them.

    Cost: 5 us for a buffer that is free.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._storages: dict[int, deque[torch.UntypedStorage]] = {}

    def take(self, spec: TensorSpec) -> torch.Tensor:
        """A tensor of this shape and dtype with arbitrary content."""
        size, strides = _layout(spec)
        tensor = torch.empty(0, dtype=spec.dtype, device=self._device)
        return tensor.set_(self._storage(size), 0, spec.shape, strides)

    def _storage(self, size: int) -> torch.UntypedStorage:
        storages = self._storages.setdefault(size, deque())
        if _use_count is not None:
            for _ in range(len(storages)):
                storages.rotate(-1)
                if _use_count(storages[-1]._cdata) == 1:
                    return storages[-1]
        storage: torch.UntypedStorage = torch.UntypedStorage(size, device=self._device)  # type: ignore[no-untyped-call]
        storages.append(storage)
        return storage

    def keep(self, specs: Iterable[TensorSpec]) -> None:
        """Lets go of buffers of all other sizes."""
        sizes = {_layout(spec)[0] for spec in specs}
        self._storages = {k: v for k, v in self._storages.items() if k in sizes}

    @property
    def bytes(self) -> int:
        """What the pool holds, in use or free."""
        return sum(size * len(storages) for size, storages in self._storages.items())


@lru_cache(maxsize=1024)
def _layout(spec: TensorSpec) -> tuple[int, tuple[int, ...]]:
    """Bytes, and strides of a tensor without gaps."""
    strides = [1]
    for extent in reversed(spec.shape):
        strides.append(strides[-1] * extent)
    return strides[-1] * spec.dtype.itemsize, tuple(reversed(strides[:-1]))
