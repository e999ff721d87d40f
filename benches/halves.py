"""One GPU as two: each process gets a part of its multiprocessors, by CUDA's multi-process service."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import tempfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["nccl_shares_gpus", "nccl_version", "two_halves"]

_CONTROL = "nvidia-cuda-mps-control"

_QUEUES = 8
"""As many hardware queues as a process has without the service, which by itself leaves it two: then
streams share them, and work that could run beside other work waits for it."""


@contextlib.contextmanager
def two_halves(percent: Sequence[int]) -> Iterator[list[dict[str, str]]]:
    """The environment of each process, while the service runs for them alone.

    Args:
        percent: How much of the multiprocessors each may use.

    Raises:
        FileNotFoundError, subprocess.CalledProcessError: There is no service, or it did not start.
    """
    places = [os.environ.get("PATH", ""), "/usr/bin", "/usr/local/nvidia/bin"]
    control = shutil.which(_CONTROL, path=os.pathsep.join(places))
    if control is None:
        raise FileNotFoundError(f"{_CONTROL}: without it one GPU cannot be shared evenly")
    with tempfile.TemporaryDirectory(prefix="mps") as folder:
        own = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        environment = {**os.environ, **own}
        each = {**own, "CUDA_DEVICE_MAX_CONNECTIONS": str(_QUEUES)}
        subprocess.run([control, "-d"], env=environment, check=True, timeout=20)
        try:
            yield [{**each, "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(share)} for share in percent]
        finally:
            subprocess.run([control], env=environment, input=b"quit\n", check=False, timeout=30)


def nccl_version() -> tuple[int, int, int]:
    """Of the library that is loaded; PyTorch says which it was built with."""
    number = ctypes.c_int()
    ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(number))
    major, rest = divmod(number.value, 10_000)
    return major, *divmod(rest, 100)


def nccl_shares_gpus() -> bool:
    """Whether NCCL takes two ranks on one GPU."""
    return os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1" and nccl_version() >= (2, 30)
