"""``eplb show``, and what ``eplb plan`` shows, too."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from eplb_rs._words import printable
from eplb_rs.cli.options import command, count
from eplb_rs.cli.terminal import check_outputs, json_text, print_text, style
from eplb_rs.plan import Plan
from eplb_rs.report import Report

if TYPE_CHECKING:
    import argparse

    from eplb_rs.cli.options import Parser

__all__ = ["add_to", "check_report_outputs", "output_options", "show_report"]

_EXAMPLES = """\
examples:
  eplb show plan.json
  eplb show plan.json --layer 12
      what each rank holds and carries in one layer
  eplb show plan.json --plot plan.svg

exit codes: 0; 1 output not written; 2 input refused; 130 interrupted
"""


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Adds the command to the program."""
    parser = command(commands, "show", "show a plan that was saved", _EXAMPLES)
    parser.set_defaults(run=_show, source="PLAN", output=None)
    parser.add_argument("plan", metavar="PLAN", help="a file that eplb plan -o or Plan.save wrote")
    output = output_options(parser)
    output.add_argument(
        "--layer",
        type=int,
        metavar="N",
        help="show one layer, rank by rank; numbered as in the model",
    )


def _show(arguments: argparse.Namespace) -> int:
    check_report_outputs(arguments, arguments.plan)
    return show_report(Report(plan=Plan.load(arguments.plan)), arguments)


def show_report(report: Report, arguments: argparse.Namespace) -> int:
    """Prints a report as asked, and draws it."""
    layer = arguments.layer
    if arguments.json:
        text = json_text(report.figures(top=arguments.top, layer=layer))
    elif layer is not None:
        text = report.layer_text(layer, style(sys.stdout), top=arguments.top)
    else:
        text = report.text(style(sys.stdout), top=arguments.top)
    if arguments.plot is not None:
        from eplb_rs import draw

        draw.save(report, arguments.plot)
    if not arguments.json:
        written = [path for path in (arguments.output, arguments.plot) if path is not None]
        text += "".join(f"wrote {printable(str(path))}\n" for path in written)
    print_text(text, sys.stdout)
    return 0


def check_report_outputs(arguments: argparse.Namespace, source: str) -> None:
    """Refuses outputs that cannot be, before any work is done for them."""
    if arguments.plot is not None:
        from eplb_rs import draw

        draw.check_path(arguments.plot)
    check_outputs(source, {"output": arguments.output, "plot": arguments.plot})


def output_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The options that say how a report is shown."""
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json",
        action="store_true",
        help="print figures for a program, as JSON (eplb_rs.report.Report.figures says which)",
    )
    output.add_argument(
        "--plot",
        metavar="FILE",
        help="draw rank loads by layer, before and after: .png, .svg or .html",
    )
    output.add_argument(
        "--top",
        type=count,
        default=5,
        metavar="N",
        help="how many of the worst layers and hottest experts (5)",
    )
    return output
