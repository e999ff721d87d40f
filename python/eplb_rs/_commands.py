"""What the commands of the command line share: options, the terminal, checks of files."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

from eplb_rs import _core
from eplb_rs._words import printable
from eplb_rs.errors import InvalidInputError
from eplb_rs.report import Style

if TYPE_CHECKING:
    from typing import Self

__all__ = [
    "Parser",
    "Progress",
    "check_outputs",
    "command",
    "count",
    "loads_options",
    "machine_options",
    "print_text",
    "style",
    "topology_of",
]


class Parser(argparse.ArgumentParser):
    """A parser whose complaints take one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {printable(message)} (try {self.prog} --help)\n")


def command(
    commands: argparse._SubParsersAction[Parser], name: str, summary: str, examples: str
) -> argparse.ArgumentParser:
    """A command of the program, with examples in its help."""
    return commands.add_parser(
        name,
        help=summary,
        description=summary.capitalize() + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def loads_options(parser: argparse.ArgumentParser, windows: str) -> argparse._ArgumentGroup:
    """The options that say what of a file is read."""
    loads = parser.add_argument_group("loads")
    loads.add_argument(
        "--windows",
        metavar="WHICH",
        help=f"{windows}: all, last, a number (3, -1), a range (0:4) or a label (all)",
    )
    loads.add_argument(
        "--key", metavar="NAME", help="which array of an .npz, or field of a .json or .pt"
    )
    return loads


def machine_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The options that describe the machines and the model."""
    machines = parser.add_argument_group("machines and model")
    machines.add_argument(
        "--gpus", type=count, required=True, metavar="N", help="how many GPUs there are"
    )
    machines.add_argument("--nodes", type=count, metavar="N", help="how many nodes they are in (1)")
    machines.add_argument(
        "--groups",
        type=count,
        metavar="N",
        help="in how many groups the experts are (1; DeepSeek-V3 and R1: 8); if groups divide "
        "over nodes, each stays on one",
    )
    machines.add_argument(
        "--replicas",
        type=count,
        metavar="N",
        help="how many expert slots there are on all GPUs (room for all experts, and one slot "
        "to spare on each GPU)",
    )
    return machines


def topology_of(
    arguments: argparse.Namespace, num_experts: int
) -> tuple[_core.Topology, dict[str, int]]:
    """The machines that :func:`machine_options` describe, and what was left out and so assumed, by
    option."""
    assumed = {}
    if arguments.nodes is None:
        assumed["--nodes"] = arguments.nodes = 1
    if arguments.groups is None:
        assumed["--groups"] = arguments.groups = 1
    if arguments.replicas is None:
        gpus = max(arguments.gpus, 1)  # what is below is refused in a moment
        assumed["--replicas"] = arguments.replicas = (-(-num_experts // gpus) + 1) * gpus
    topology = _core.Topology.from_totals(
        num_replicas=arguments.replicas, num_nodes=arguments.nodes, num_gpus=arguments.gpus
    )
    return topology, assumed


def count(text: str) -> int:
    """An option that is a whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return number


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


def style(stream: TextIO) -> Style:
    """What the reader's terminal can show."""
    terminal = stream.isatty()
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    width = shutil.get_terminal_size((80, 24)).columns if terminal else 80
    return Style(
        width=max(width, 40),
        colour=terminal and not plain,
        blocks=_can_print("█▁▏", stream),
    )


def _can_print(text: str, stream: TextIO) -> bool:
    try:
        text.encode(stream.encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return False
    return True


def print_text(text: str, stream: TextIO) -> None:
    """Writes text; what the stream's encoding lacks (in the names of files, say) is escaped."""
    encoding = stream.encoding or "ascii"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding))


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
