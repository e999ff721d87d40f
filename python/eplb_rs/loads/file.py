"""A file of recorded loads, and what is said of one that cannot be read."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias

from eplb_rs.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

__all__ = ["Content", "LoadFile", "Reader", "first_line", "listed", "no_such_key", "shortened"]


class Content(NamedTuple):
    """What a reader found: an array of any shape and of numbers, checked no further."""

    array: npt.NDArray[Any]
    labels: list[str] | None
    kind: str


class LoadFile:
    """A regular file that holds something, under a name with a known extension."""

    MAX_ARRAY_BYTES: ClassVar = 2**32  # 4,000 windows of 58 layers x 256 experts take a tenth of it
    MAX_JSON_BYTES: ClassVar = 2**30  # parsed, it takes some ten times that much memory

    path: Path
    suffix: str
    size: int

    def __init__(self, path: str | os.PathLike[str], suffixes: Iterable[str]) -> None:
        try:
            self.path = Path(os.fsdecode(path))
        except TypeError:
            raise InvalidInputError(
                code="wrong_type", argument="path", got=repr(path), expected="the path of a file"
            ) from None
        try:
            status = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            raise self.refusal("missing_file", "no such file", "a file that exists") from None
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
            raise self.refusal("unreadable_file", first_line(error), "a file's path") from None
        if not stat.S_ISREG(status.st_mode):
            what = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise self.refusal("not_a_file", what, "a file of recorded loads")
        self.suffix = self.path.suffix.lower()
        *some, last = suffixes
        if self.suffix not in (*some, last):
            raise self.refusal(
                "unknown_format",
                f"extension {self.path.suffix!r}",
                f"a file named {', '.join(some)} or {last}",
            )
        if status.st_size == 0:
            raise self.refusal("empty", "0 bytes", "a file of recorded loads")
        self.size = status.st_size

    def refusal(self, code: str, got: str, expected: str, hint: str = "") -> InvalidInputError:
        """What is wrong with this file."""
        return InvalidInputError(
            code=code, argument="path", got=f"{self.path}: {got}", expected=expected, hint=hint
        )

    def check_size(self, num_bytes: int, limit: int) -> None:
        """Refuses content too large to be recorded loads."""
        if num_bytes > limit:
            raise self.refusal(
                "too_large",
                f"{num_bytes:,} bytes",
                f"at most {limit:,} bytes",
                "choose or sum the windows before saving them",
            )


Reader: TypeAlias = Callable[[LoadFile, str | None], Content]
"""Reads a file, or what is kept in it under a key."""


def no_such_key(key: str | None, keys: Any, expected: str) -> InvalidInputError:
    """What is wrong with a key, and which ones there are."""
    return InvalidInputError(
        code="missing_key",
        argument="key",
        got=repr(key),
        expected=expected,
        hint=f"there are: {listed(keys)}" if keys else "leave it out",
    )


def listed(names: Any, most: int = 8) -> str:
    """The first few of some names from a file."""
    texts = [shortened(str(name), 40) for name in names]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" * (len(texts) > most))


def first_line(error: Exception) -> str:
    """What an error says in its first line, or its name where it says nothing."""
    lines = str(error).splitlines()
    return shortened(lines[0], 160) if lines else type(error).__name__


def shortened(text: str, most: int) -> str:
    """Text from a file, of so many characters at most."""
    return text if len(text) <= most else text[: most - 3] + "..."
