"""What the command line takes: its commands, their options and values."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from eplb_rs._core import __version__

from dualpipe import METHODS
from dualpipe.cli.commands import export, search, show, simulate, verify

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["parser"]

_EXAMPLES = {
    "show": """\
examples:
  dualpipe show dualpipe --ranks 4 --micro-batches 8
  dualpipe show zbv -p 4 -m 8 --text
  dualpipe show schedule.csv --plot schedule.svg
""",
    "simulate": """\
examples:
  dualpipe simulate dualpipev -p 8 -m 16
  dualpipe simulate dualpipev -p 8 -m 16 --overlap 0.85 --latency 0.05
  dualpipe simulate zb_h1 -p 8 -m 32 --forward 1.0 --input 1.2 --weight 0.9 --perfetto trace.json
""",
    "verify": """\
examples:
  dualpipe verify schedule.csv
  dualpipe verify dualpipe -p 16 -m 40
  dualpipe verify schedule.csv --transport eager --max-activations 9
""",
    "export": """\
examples:
  dualpipe export zbv -p 4 -m 8 -o zbv.csv
  dualpipe export 1f1b -p 4 -m 8 --format csv --form compute_comms
  dualpipe export dualpipe -p 8 -m 20 --format json -o dualpipe.json
""",
    "search": """\
examples:
  dualpipe search --forward 0.1,0.6x3,1x58,2.5 --ranks 16 --micro-batches 32,64
  dualpipe search --layers layers.json -p 16 -m 64 --memory-gb 80 --overlap 0.9
  dualpipe search --forward 1x32 -p 8 -m 16 --methods zbv,dualpipev --overlap 0.85

layers.json holds any of forward, backward_input, backward_weight (times) and parameter_bytes,
activation_bytes, message_bytes, each a number or a list with one figure for every layer.
""",
}

_MOST_STAGES = 65535
"""What a schedule can have; more layers than stages make sense up to here too."""


def parser() -> argparse.ArgumentParser:
    """The commands and their options; ``run`` of what it parses carries a command out."""
    whole = argparse.ArgumentParser(
        prog="dualpipe",
        description="Pipeline schedules: show, simulate, verify, export, search.",
        epilog="dualpipe COMMAND --help shows each command's examples.",
    )
    whole.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = whole.add_subparsers(required=True, metavar="COMMAND")

    command = _command(commands, "show", "draw a schedule with F = I = W = 1", show)
    _add_schedule(command)
    command.add_argument("--text", action="store_true", help="print the instructions instead")
    command.add_argument("--plot", metavar="FILE", help="draw it to a .svg, .png or .pdf")

    command = _command(commands, "simulate", "predict makespan, bubble and memory", simulate)
    _add_schedule(command)
    for name, word in (("forward", "F"), ("input", "I"), ("weight", "W")):
        command.add_argument(
            f"--{name}",
            type=_times,
            default=[1.0],
            metavar="T",
            help=f"time of {word}: a number, or one per stage such as 1,1.2x6,1 (default: 1)",
        )
    _add_machine(command)
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--plot", metavar="FILE", help="draw the timeline to a file")
    command.add_argument("--perfetto", metavar="FILE", help="write a trace for ui.perfetto.dev")

    command = _command(commands, "verify", "prove a schedule right", verify)
    _add_schedule(command)
    command.add_argument(
        "--transport",
        action="append",
        choices=["eager", "rendezvous", "queue"],
        help="prove freedom from deadlock under this only; repeatable (default: all)",
    )
    command.add_argument("--max-activations", type=int, metavar="N", help="allow no rank more")

    command = _command(
        commands, "export", "write a schedule as text, JSON or PyTorch's CSV", export
    )
    _add_schedule(command)
    command.add_argument(
        "--format", choices=["text", "json", "csv"], help="default: by FILE's suffix"
    )
    command.add_argument(
        "--form", choices=["compute_only", "compute_comms"], default="compute_only"
    )
    command.add_argument("--dialect", choices=["current", "older"], default="current")
    command.add_argument("--no-waits", action="store_true", help="for PyTorch before 2.14")
    command.add_argument("-o", "--output", metavar="FILE", help="default: standard output")

    command = _command(commands, "search", "rank schedules, partitions and micro-batches", search)
    command.add_argument(
        "--forward", type=_times, metavar="T,...", help="F per layer: 0.1,0.6x3,1x58,2.5"
    )
    command.add_argument(
        "--input", type=_times, metavar="T,...", help="I per layer (default: as F)"
    )
    command.add_argument(
        "--weight", type=_times, metavar="T,...", help="W per layer (default: as F)"
    )
    command.add_argument("--layers", metavar="FILE", help="measured costs as JSON, instead")
    command.add_argument("-p", "--ranks", type=int, required=True, metavar="P")
    command.add_argument(
        "-m", "--micro-batches", type=_counts, metavar="M,...", help="default: 2P,4P"
    )
    command.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS))
    command.add_argument("--stages-per-rank", type=_counts, default=[2], metavar="V,...")
    command.add_argument(
        "--memory-gb", type=_gigabytes, metavar="GB", help="what a rank may hold, 10^9 bytes"
    )
    command.add_argument(
        "--top", type=_whole, default=10, metavar="N", help="print the first N (default: 10)"
    )
    command.add_argument(
        "--simulations", type=int, default=500, metavar="N", help="per combination"
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    _add_machine(command)
    return whole


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    summary: str,
    run: Callable[[argparse.Namespace], None],
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=_EXAMPLES[name],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def _add_schedule(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "schedule",
        help=f"a file (.csv, .json, text), or a method: {', '.join(METHODS)}",
    )
    command.add_argument("-p", "--ranks", type=int, metavar="P", help="for a method")
    command.add_argument("-m", "--micro-batches", type=int, metavar="M", help="for a method")
    command.add_argument(
        "--stages-per-rank", type=int, metavar="V", help="for looped and interleaved"
    )
    command.add_argument("--forward-only", action="store_true", help="for inference")


def _add_machine(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--overlap",
        type=float,
        default=1.0,
        metavar="X",
        help="a pair's time / its halves' (default: 1)",
    )
    command.add_argument(
        "--latency", type=float, default=0.0, metavar="T", help="of a link (default: 0)"
    )
    command.add_argument("--sends", choices=["asynchronous", "blocking"], default="asynchronous")
    command.add_argument("--pairs", choices=["atomic", "early_forward"], default="atomic")


def _times(text: str) -> list[float]:
    """``0.1,0.6x3`` is 0.1 and three times 0.6."""
    times: list[float] = []
    for part in text.split(","):
        time, x, count = part.partition("x")
        try:
            repeated = int(count) if x else 1
            if not 1 <= repeated <= _MOST_STAGES:
                raise ValueError
            times += [float(time)] * repeated
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{part!r} must be a time, or a time and how often: 0.6, 0.6x3"
            ) from None
    return times


def _counts(text: str) -> list[int]:
    return [_whole(part) for part in text.split(",")]


def _whole(text: str) -> int:
    if not text.strip().isdecimal() or len(text) > 18:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 0 or more")
    return int(text)


def _gigabytes(text: str) -> int:
    """In bytes."""
    try:
        bytes_ = float(text) * 1e9
    except ValueError:
        bytes_ = math.nan
    if not 0 <= bytes_ < 2.0**53:
        raise argparse.ArgumentTypeError(f"{text!r} must be 0 to 9007199 gigabytes")
    return round(bytes_)
