"""Options that commands share."""

from __future__ import annotations

import argparse
from typing import NoReturn

from eplb_rs import _core
from eplb_rs._words import printable

__all__ = ["Parser", "command", "count", "loads_options", "machine_options", "topology_of"]


class Parser(argparse.ArgumentParser):
    """A parser whose complaints take one line."""

    def error(self, message: str) -> NoReturn:
        """Ends the program."""
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
