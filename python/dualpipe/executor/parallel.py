"""Data parallelism inside stages: wrappers that hear of gradients, and act on each backward."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

__all__ = ["hears_gradients", "syncing", "why_whole"]


def hears_gradients(module: nn.Module) -> bool:
    """Whether a module hears of its gradients by hooks that only autograd calls, unseen from here."""
    kinds = (DistributedDataParallel, *_fully_sharded())
    return any(isinstance(part, kinds) for part in module.modules())


def why_whole(module: nn.Module) -> str | None:
    """Why the backward of a module cannot be split; None if it may be."""
    kinds = _fully_sharded()
    if any(isinstance(part, kinds) for part in module.modules()):
        return "fully sharded parameters are gone when the input part has run"
    return None


def syncing(parts: Iterable[nn.Module]) -> bool:
    """Whether any of these modules would average its gradients over other ranks in every backward."""
    return any(
        isinstance(part, DistributedDataParallel) and part.require_backward_grad_sync
        for part in parts
    )


def _fully_sharded() -> tuple[type, ...]:
    """The types of fully sharded modules; none if nobody has imported them."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return () if fsdp is None else (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)
