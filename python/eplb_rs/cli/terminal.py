"""The terminal, and the files that commands write."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from eplb_rs.errors import InvalidInputError
from eplb_rs.report import Style

if TYPE_CHECKING:
    from typing import Self

__all__ = ["Progress", "check_outputs", "json_text", "print_text", "style"]


def check_outputs(source: str, outputs: dict[str, str | None]) -> None:
    """Refuses outputs that cannot be, before any work is done for them: files of one name, by the
    option that names each.

    Raises:
        InvalidInputError: ``in_use``.
    """
    users = {Path(source).resolve(): "the file that is read"}
    for argument, name in outputs.items():
        if name is None or name == os.devnull:
            continue
        user = users.setdefault(Path(name).resolve(), f"that of --{argument}")
        if user != f"that of --{argument}":
            raise InvalidInputError(
                code="in_use",
                argument=argument,
                got=name,
                expected=f"another file than {user}",
            )


def style(stream: TextIO | None) -> Style:
    """What the reader's terminal can show."""
    terminal = stream is not None and stream.isatty()
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    width = shutil.get_terminal_size((80, 24)).columns if terminal else 80
    return Style(
        width=max(width, 40),
        colour=terminal and not plain,
        blocks=_can_print("█▁▏", stream),
    )


def _can_print(text: str, stream: TextIO | None) -> bool:
    try:
        text.encode((stream and stream.encoding) or "ascii")
    except (LookupError, UnicodeEncodeError):
        return False
    return True


def print_text(text: str, stream: TextIO | None) -> None:
    """Writes text; what the stream's encoding lacks (in the names of files, say) is escaped. A
    stream that was closed before the program began is ``None``, and takes nothing."""
    if stream is None:
        return
    encoding = stream.encoding or "ascii"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding))


def json_text(figures: dict[str, Any]) -> str:
    """Figures for a program."""
    return json.dumps(figures, indent=2, allow_nan=False) + "\n"


class Progress:
    """A bar on stderr that says how far something is, and how long it will take."""

    def __init__(self, what: str, shown: bool) -> None:
        self._what = what
        self._shown = shown
        self._started = self._drawn = time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def __call__(self, done: int, total: int) -> None:
        """Redraws the bar, some ten times a second."""
        now = time.perf_counter()
        if not self._shown or (now - self._drawn < 0.1 and done < total):
            return
        self._drawn = now
        filled = 30 * done // total
        left = (now - self._started) * (total - done) / done
        sys.stderr.write(
            f"\r{self._what} [{'#' * filled}{'.' * (30 - filled)}] {done}/{total}, {left:.0f} s left "
        )
        sys.stderr.flush()

    def __exit__(self, *_: object) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K" if sys.stderr.isatty() else "\n")
            sys.stderr.flush()
