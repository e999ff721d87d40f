"""``eplb explain``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from eplb_rs.cli.options import command, count
from eplb_rs.cli.terminal import json_text, print_text
from eplb_rs.explanation import explain
from eplb_rs.plan import Plan

if TYPE_CHECKING:
    import argparse

    from eplb_rs.cli.options import Parser

__all__ = ["add_to"]

_EXAMPLES = """\
examples:
  eplb explain plan.json
      which constraint binds in which layer, and what would help
  eplb explain plan.json --json

exit codes: 0; 1 output not written; 2 input refused; 130 interrupted
"""


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Adds the command to the program."""
    parser = command(commands, "explain", "say why a plan is no better", _EXAMPLES)
    parser.set_defaults(run=_explain, source="PLAN")
    parser.add_argument("plan", metavar="PLAN", help="a file that eplb plan -o or Plan.save wrote")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print figures for a program, as JSON (eplb_rs.Explanation says which)",
    )
    parser.add_argument(
        "--top", type=count, default=5, metavar="N", help="how many of the worst layers (5)"
    )
    parser.add_argument(
        "--no-mends", action="store_true", help="do not plan what would help; faster"
    )


def _explain(arguments: argparse.Namespace) -> int:
    explanation = explain(Plan.load(arguments.plan), mend=not arguments.no_mends)
    if arguments.json:
        text = json_text(explanation.figures())
    else:
        text = explanation.text(top=arguments.top)
    print_text(text, sys.stdout)
    return 0
