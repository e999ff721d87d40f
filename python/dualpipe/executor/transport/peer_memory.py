"""Device memory that other processes of the host write into."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ExportedMemory", "ImportedMemory", "driver"]

_HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1


def driver() -> Any:
    """The CUDA driver's functions.

    Raises:
        ImportError: cuda-bindings, which torch's CUDA builds bring, is not installed.
    """
    from cuda.bindings import driver as functions  # type: ignore[import-untyped]

    return functions


def checked(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a driver function; what it returns beside its code."""
    code, *values = function(*arguments)
    if code:
        raise RuntimeError(f"{function.__name__}: {code.name}")
    return values[0] if values else None


class ExportedMemory:
    """Memory of this process's device that others may open.

    It is taken from the driver: torch's allocator may build its blocks from pieces that have no
    handle, and does not know that others still write.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._driver = driver()
        self.num_bytes = num_bytes
        self._address = int(checked(self._driver.cuMemAlloc, max(num_bytes, 4)))
        self.bytes = torch.as_tensor(_Address(self._address, max(num_bytes, 4)), device=device)
        """The memory as bytes; not to be used after :meth:`free`."""

    @property
    def address(self) -> int:
        """Where it starts."""
        return self._address

    @property
    def handle(self) -> bytes:
        """What another process opens it by."""
        handle = checked(self._driver.cuIpcGetMemHandle, self._address)
        return ctypes.string_at(handle.getPtr(), _HANDLE_BYTES)

    def free(self) -> None:
        """Gives it back, when nobody has it open any more."""
        if self._address:
            checked(self._driver.cuMemFree, self._address)
            self._address = 0


class ImportedMemory:
    """Another process's memory, mapped into this process."""

    def __init__(self, handle: bytes) -> None:
        self._driver = driver()
        opened = self._driver.CUipcMemHandle()
        ctypes.memmove(opened.getPtr(), handle, _HANDLE_BYTES)
        self.address = int(checked(self._driver.cuIpcOpenMemHandle, opened, _LAZY_PEER_ACCESS))
        """Where it starts, in this process."""

    def close(self) -> None:
        """Unmaps it."""
        if self.address:
            checked(self._driver.cuIpcCloseMemHandle, self.address)
            self.address = 0


class _Address:
    """Bytes at an address, as torch takes them without a copy."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": (num_bytes,),
            "strides": None,
            "typestr": "|u1",
            "version": 3,
        }
