"""The program ``eplb``: its commands, and what it says of input that was refused."""

from __future__ import annotations

import os
import sys
import warnings
from typing import TYPE_CHECKING

from eplb_rs import _core
from eplb_rs._words import printable
from eplb_rs.cli import explain, plan, show, simulate
from eplb_rs.cli.options import Parser
from eplb_rs.cli.terminal import print_text
from eplb_rs.errors import PlanError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

__all__ = ["main"]

_OPTIONS = {
    "allow_zero": "--allow-zero",
    "estimator": "--estimator",
    "expert_bytes": "--expert-bytes",
    "group_rule": "--group-rule",
    "html": "--html",
    "inter_node_gb_s": "--gb-s",
    "interval": "--interval",
    "intra_node_gb_s": "--node-gb-s",
    "iterations": "--iterations",
    "key": "--key",
    "layer": "--layer",
    "max_moves": "--max-moves",
    "merge": "--merge",
    "num_gpus": "--gpus",
    "num_groups": "--groups",
    "num_nodes": "--nodes",
    "num_replicas": "--replicas",
    "output": "--output",
    "plan": "PLAN",
    "plot": "--plot",
    "policies": "--policy",
    "policy": "--policy",
    "shares": "--shares",
    "threads": "--threads",
    "trace": "TRACE",
    "window_s": "--window-s",
    "windows": "--windows",
}
"""What the command line calls the arguments of the package; `path` is what is read."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; `argv` is by default that of the process.

    Returns:
        The exit code.
    """
    name = "eplb"
    try:
        arguments = _parser().parse_args(argv)
        name = f"eplb {arguments.command}"
        with warnings.catch_warnings(action="ignore"):  # torch's, about how a file was pickled
            code = int(arguments.run(arguments))
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except PlanError as error:
        message = printable(_in_options(str(error), arguments.source))
        print_text(f"{name}: error: {message}\n", sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except OSError as error:  # files are dealt with where they are: this is the output's
        # What is still buffered would fail again when the interpreter ends.
        if sys.stdout is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 141
        print_text(f"{name}: error: output: {error.strerror}\n", sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="eplb",
        description="Plans where the experts of a mixture-of-experts model live.",
        epilog="eplb COMMAND --help gives examples.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"eplb {_core.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (plan, show, explain, simulate):
        module.add_to(commands)
    return parser


def _in_options(message: str, source: str) -> str:
    """A message of the package in the words of the command line."""
    for argument, option in ({"path": source} | _OPTIONS).items():
        message = message.replace(f"`{argument}`", option)
    return message
