"""The command line: ``dualpipe show | simulate | verify | export | search``."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from dualpipe import ScheduleError
from dualpipe.cli.parser import parser

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

_OPTIONS = {
    "num_ranks": "--ranks",
    "num_micro_batches": "--micro-batches",
    "stages_per_rank": "--stages-per-rank",
    "max_activations": "--max-activations",
    "max_bytes": "--memory-gb",
    "max_simulations": "--simulations",
    "methods": "--methods",
    "layers": "--forward",
    "forward": "--forward",
    "backward_input": "--input",
    "backward_weight": "--weight",
    "overlap_factor": "--overlap",
    "latency": "--latency",
}
"""What the command line calls the arguments of the package."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, 1 for a refusal, 2 for wrong usage, 130 if
    interrupted.
    """
    options = parser().parse_args(arguments)
    try:
        options.run(options)
        if sys.stdout is not None:  # closed by whoever has started this
            sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (head, a pager) has seen enough. Python would complain again as it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ScheduleError, OSError, ImportError) as error:
        print(f"dualpipe: {_in_options(str(error))}", file=sys.stderr)
        return 1
    return 0


def _in_options(message: str) -> str:
    """A message of the package in the words of the command line."""
    for argument, option in _OPTIONS.items():
        message = message.replace(f"`{argument}`", f"`{option}`")
    return message
