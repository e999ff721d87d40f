"""Writing files so that a failure leaves what was there."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from eplb_rs.errors import InvalidInputError

__all__ = ["check_writable", "write_whole"]


def check_writable(path: str | os.PathLike[str], argument: str = "path") -> None:
    """Refuses a path that plainly cannot be written, before work is done for it.

    Raises:
        InvalidInputError: ``unwritable_file``.
    """
    try:
        target = Path(path).resolve()
        reason = "Is a directory" if target.is_dir() else "No such folder"
        if target.parent.is_dir() and not target.is_dir():
            return
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = str(error)
    raise _unwritable(path, argument, reason)


def write_whole(path: str | os.PathLike[str], content: bytes, argument: str = "path") -> None:
    """Writes a file wholly or not at all (devices and pipes are written to as they are).

    Raises:
        InvalidInputError: ``wrong_type`` for what is no path, ``unwritable_file``.
    """
    if not isinstance(path, str | os.PathLike):
        raise InvalidInputError(
            code="wrong_type",
            argument=argument,
            got=type(path).__name__,
            expected="the path of a file",
        )
    try:
        target = Path(path).resolve()  # a link stays one, and what it points to is replaced
        if target.exists() and not target.is_file():
            target.write_bytes(content)
            return
        unfinished = target.with_name(f".eplb-{secrets.token_hex(8)}")
        try:
            with unfinished.open("xb") as stream:
                stream.write(content)
            if target.exists():
                unfinished.chmod(target.stat().st_mode & 0o7777)
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = error.strerror if isinstance(error, OSError) else None
        raise _unwritable(path, argument, str(reason or error)) from None


def _unwritable(path: str | os.PathLike[str], argument: str, reason: str) -> InvalidInputError:
    return InvalidInputError(
        code="unwritable_file",
        argument=argument,
        got=f"{os.fspath(path)}: {reason}",
        expected="a file that can be written, in a folder that exists",
    )
