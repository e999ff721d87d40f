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

_NAMES = ("auto", "push", "nccl", "gloo")


def make_transport(
    wanted: str | Transport, group: dist.ProcessGroup, device: torch.device, limit_s: float
) -> Transport:
    """The transport of that name, or the one that suits the device for ``"auto"``: gloo on CPUs;
    on GPUs pushes where all are of one host and reach one another's memory, else NCCL.

    Raises:
        PipelineError: ``transport``.
    """
    if isinstance(wanted, Transport):
        return wanted
    if wanted not in _NAMES:
        raise PipelineError(
            code="transport",
            argument="transport",
            got=repr(wanted),
            expected=f"{', '.join(map(repr, _NAMES))}, or a Transport",
        )
    if wanted == "gloo" or (wanted == "auto" and device.type == "cpu"):
        return GlooTransport(group, device, limit_s)
    # What is loaded here needs a build of torch with CUDA, or cuda-bindings.
    if wanted in {"auto", "push"}:
        from dualpipe.executor.transport.push import PushTransport

        try:
            return PushTransport(group, device, limit_s)
        except PipelineError as error:
            # Raised on all ranks alike.
            if wanted == "push" or error.code != "transport":
                raise
    from dualpipe.executor.transport.nccl import NcclTransport

    return NcclTransport(group, device, limit_s)
