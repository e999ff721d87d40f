"""``eplb simulate``."""

from __future__ import annotations

import argparse
import math
import sys
from typing import TYPE_CHECKING, get_args

from eplb_rs._files import check_writable, write_whole
from eplb_rs._words import printable
from eplb_rs.cli.options import command, count, loads_options, machine_options, topology_of
from eplb_rs.cli.terminal import Progress, check_outputs, json_text, print_text, style
from eplb_rs.errors import InvalidInputError
from eplb_rs.loads import read_loads
from eplb_rs.planner import GroupRule
from eplb_rs.simulate import Links, simulate
from eplb_rs.simulate_report import SimulationReport

if TYPE_CHECKING:
    from eplb_rs import _core
    from eplb_rs.cli.options import Parser

__all__ = ["add_to"]

_EXAMPLES = """\
examples:
  eplb simulate trace.json --gpus 8 --html page.html
      every policy, with and without re-splitting, on a page on which to decide
  eplb simulate trace.json --merge 4 --gpus 8 --replicas 72 --max-moves 25%
      four windows of the file in each; at most a quarter of the slots change in a step
  eplb simulate trace.json --gpus 8 --policy balanced scenarios --shares arriving
      whether planning for several windows at once is worth its time
  eplb simulate trace.npy --gpus 32 --nodes 4 --groups 8 --interval 3 \\
      --policy deepseek balanced --shares uniform --estimator last
      what an engine would do: a plan every three windows, made for the last of them
  eplb simulate trace.npy --gpus 32 --expert-bytes 44e6 --gb-s 50 --node-gb-s 400 --json
      what moving weights costs, too; figures for a program

policies:
  trivial     what engines start from, and never a move
  deepseek    the reference algorithm, which does not look at the placement in force
  balanced    planned from the placement in force
  scenarios   the same, for all windows since the last shift at once: better and slower
  oracle      planned on each window itself: what no one can do, for comparison

shares, how an expert's tokens are split over its replicas:
  uniform     evenly
  past        as suits the estimate that the plan was made for
  arriving    as suits the window itself best, without moving a weight

estimators, what the next window is taken to be:
  last, average:N, mean, exponential:N, trend:N, shrinkage, backtest

exit codes: 0; 1 output not written; 2 input refused; 130 interrupted
"""


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Adds the command to the program."""
    parser = command(
        commands, "simulate", "replay a trace, and compare what policies make of it", _EXAMPLES
    )
    parser.set_defaults(run=_simulate, source="TRACE")
    parser.add_argument("trace", metavar="TRACE", help="a file of recorded loads, in windows")
    machine_options(parser)
    policies = parser.add_argument_group("policies")
    policies.add_argument(
        "--policy",
        nargs="+",
        default=["trivial", "deepseek", "balanced", "oracle"],
        metavar="NAME",
        help="which to compare (all but scenarios)",
    )
    policies.add_argument(
        "--shares",
        nargs="+",
        default=["uniform", "arriving"],
        metavar="NAME",
        help="how tokens are split over replicas: uniform, past, arriving (uniform arriving)",
    )
    policies.add_argument(
        "--estimator", default="backtest", metavar="NAME", help="what plans are made for (backtest)"
    )
    policies.add_argument(
        "--interval",
        type=count,
        default=1,
        metavar="N",
        help="after how many windows a new plan is made (1)",
    )
    policies.add_argument(
        "--max-moves",
        type=_moves,
        metavar="N",
        help="the most experts that a balanced or scenarios plan may move, over all layers: a number, or a "
        "part of all slots, such as 25%% (as many as help)",
    )
    policies.add_argument(
        "--group-rule",
        default="strict",
        choices=get_args(GroupRule),
        help="what balanced makes of groups (strict)",
    )
    policies.add_argument(
        "--iterations", type=count, metavar="N", help="how long balanced searches (1000)"
    )
    policies.add_argument(
        "--threads", type=count, default=1, metavar="N", help="threads to plan on (1)"
    )
    loads = loads_options(parser, "which windows of the trace to replay")
    loads.add_argument(
        "--merge",
        type=count,
        default=1,
        metavar="N",
        help="how many windows of the trace make one of the replay (1)",
    )
    cost = parser.add_argument_group("what moves cost")
    cost.add_argument(
        "--expert-bytes",
        type=float,
        metavar="B",
        help="the bytes of one expert of one layer (DeepSeek-V3 in FP8: 44e6)",
    )
    cost.add_argument(
        "--gb-s", type=float, metavar="X", help="what a GPU sends, in 1e9 bytes a second"
    )
    cost.add_argument(
        "--node-gb-s",
        type=float,
        metavar="X",
        help="what it sends to another of its node (as --gb-s)",
    )
    cost.add_argument(
        "--window-s",
        type=float,
        metavar="S",
        help="how long the expert layers now take for a window, in seconds: choices are then "
        "compared by time, moves included",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json",
        action="store_true",
        help="print all figures for a program, as JSON "
        "(eplb_rs.simulate_report.SimulationReport.figures says which)",
    )
    output.add_argument(
        "--html", metavar="FILE", help="write a page of its own, with charts and all figures"
    )
    output.add_argument(
        "--progress",
        action="store_true",
        help="show how far it is, even where stderr is no terminal",
    )


def _simulate(arguments: argparse.Namespace) -> int:
    check_outputs(arguments.trace, {"html": arguments.html})
    if arguments.html is not None:
        from eplb_rs import draw

        draw.check_matplotlib("html", arguments.html)
        check_writable(arguments.html, "html")
    links = _links(arguments)
    trace = read_loads(arguments.trace, windows=arguments.windows, key=arguments.key)
    topology, assumed = topology_of(arguments, trace.loads.shape[2])
    shown = arguments.progress or (sys.stderr is not None and sys.stderr.isatty())
    with Progress("replaying", shown) as progress:
        simulation = simulate(
            trace,
            topology,
            policies=arguments.policy,
            shares=arguments.shares,
            estimator=arguments.estimator,
            interval=arguments.interval,
            merge=arguments.merge,
            num_groups=arguments.groups,
            group_rule=arguments.group_rule,
            max_moves=_most_moves(arguments.max_moves, trace.loads.shape[1], topology),
            iterations=arguments.iterations,
            threads=arguments.threads,
            links=links,
            progress=progress,
        )
    report = SimulationReport(
        simulation=simulation, trace=trace, assumed=assumed, window_s=arguments.window_s
    )
    if arguments.html is not None:
        from eplb_rs.simulate_page import page

        write_whole(arguments.html, page(report).encode(), "html")
    if arguments.json:
        text = json_text(report.figures())
    else:
        text = report.text(style(sys.stdout))
        if arguments.html is not None:
            text += f"\nwrote {printable(arguments.html)}\n"
    print_text(text, sys.stdout)
    return 0


def _links(arguments: argparse.Namespace) -> Links | None:
    if arguments.expert_bytes is None:
        for option in ("gb_s", "node_gb_s", "window_s"):
            if getattr(arguments, option) is not None:
                raise InvalidInputError(
                    code="inconsistent",
                    argument="expert_bytes",
                    got="left out",
                    expected=f"given where --{option.replace('_', '-')} is",
                )
        return None
    if arguments.window_s is not None and arguments.gb_s is None:
        raise InvalidInputError(
            code="inconsistent",
            argument="inter_node_gb_s",
            got="left out",
            expected="given where --window-s is",
        )
    node = arguments.gb_s if arguments.node_gb_s is None else arguments.node_gb_s
    return Links(arguments.expert_bytes, node, arguments.gb_s)


def _moves(text: str) -> tuple[float, bool]:
    """A number of moves, or a part of all slots (and that it is one)."""
    part = text.endswith("%")
    try:
        number = float(text[:-1]) / 100 if part else float(int(text))
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number and no part such as 25%")
    return number, part


def _most_moves(
    moves: tuple[float, bool] | None, num_layers: int, topology: _core.Topology
) -> int | None:
    if moves is None:
        return None
    number, part = moves
    return int(number * num_layers * topology.num_slots) if part else int(number)
