"""How messages move between ranks: one small class for each way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dualpipe.errors import PipelineError
from dualpipe.executor.transport.base import Transport
from dualpipe.executor.transport.gloo import GlooTransport

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

__all__ = ["make_transport"]


def make_transport(
    wanted: str | Transport, group: dist.ProcessGroup, device: torch.device, limit_s: float
) -> Transport:
    """The transport of that name, or the one that suits the device for ``"auto"``.

    Raises:
        PipelineError: ``transport``.
    """
    if isinstance(wanted, Transport):
        return wanted
    if wanted in {"auto", "gloo"}:
        return GlooTransport(group, device, limit_s)
    raise PipelineError(
        code="transport",
        argument="transport",
        got=repr(wanted),
        expected='"auto", "gloo", or a Transport',
    )
