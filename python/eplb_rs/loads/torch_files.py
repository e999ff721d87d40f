"""Recorded loads that torch saved: ``.pt`` and ``.pth``."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

from eplb_rs.loads.file import Content, first_line, no_such_key, shortened
from eplb_rs.loads.nested import array_of_lists, chosen_field

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    from eplb_rs.loads.file import LoadFile

__all__ = ["read_torch"]


def read_torch(file: LoadFile, key: str | None) -> Content:
    """Reads a tensor, or nested lists, alone or as a field of a dictionary."""
    file.check_size(file.size, file.MAX_ARRAY_BYTES)
    try:
        import torch
    except ImportError:
        raise file.refusal(
            "missing_dependency",
            "torch is not installed",
            "read by torch",
            "pip install 'eplb-rs[torch]'",
        ) from None
    try:
        content = torch.load(file.path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # What else torch says is advice to unpickle it all the same.
        reason = str(error).partition("WeightsUnpickler error: ")[2].partition("\n")[0]
        raise file.refusal(
            "unsafe_pickle",
            shortened(reason, 160) or "a pickle of something else",
            "a file of tensors, lists and numbers alone",
            "nothing else is unpickled, for that could run code",
        ) from error
    except Exception as error:  # torch says what it finds in a broken file in many ways
        raise file.refusal(
            "unreadable_file",
            first_line(error),
            "a file that torch.save wrote",
            "it was cut short, or is something else",
        ) from error
    kind = "torch tensor"
    if isinstance(content, dict):
        content, kind = chosen_field(file, content, key)
    elif key is not None:
        raise no_such_key(key, (), "a field; this file holds no dictionary")
    if isinstance(content, list):
        return Content(array_of_lists(file, content), None, kind)
    if not isinstance(content, torch.Tensor):
        raise file.refusal("wrong_format", f"a {type(content).__name__}", "a tensor of counts")
    return Content(_array_of_tensor(file, content), None, kind)


def _array_of_tensor(file: LoadFile, tensor: torch.Tensor) -> npt.NDArray[Any]:
    import torch

    if tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise file.refusal(
            "wrong_dtype", f"dtype {tensor.dtype}", "of integers or floating-point numbers"
        )
    file.check_size(
        tensor.numel() * 8, file.MAX_ARRAY_BYTES
    )  # a view may claim more than it stores
    try:
        return tensor.detach().to(device="cpu", dtype=torch.float64).numpy()
    except Exception as error:  # tensors without storage, sparse ones
        raise file.refusal(
            "wrong_dtype",
            f"{tensor.dtype} tensor on {tensor.device}: {first_line(error)}",
            "a tensor of plain numbers",
        ) from error
