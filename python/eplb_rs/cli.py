"""The command line: ``eplb``, or ``python -m eplb_rs``.

Exit codes: 0; 2 for input that was refused, with one line on stderr that says why and how to mend
it; 130 if interrupted; 141 if whoever reads the output went away.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import warnings
from typing import TYPE_CHECKING, cast, get_args

import numpy as np

from eplb_rs import _core, cli_simulate
from eplb_rs._commands import (
    Parser,
    check_outputs,
    command,
    count,
    loads_options,
    machine_options,
    print_text,
    style,
    topology_of,
)
from eplb_rs._files import write_whole
from eplb_rs._words import printable
from eplb_rs.errors import PlanError
from eplb_rs.explanation import explain
from eplb_rs.loads import read_loads
from eplb_rs.plan import Plan
from eplb_rs.planner import GroupRule, Planner, PolicyName
from eplb_rs.report import PlanningTime, Report

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

_PLAN_EXAMPLES = """\
examples:
  eplb plan loads.json --gpus 32
      one node, no groups, one spare slot a GPU
  eplb plan loads.json --gpus 32 --nodes 4 --groups 8 --replicas 288 -o plan.json
      DeepSeek-V3 or R1 on 4 nodes of 8 GPUs; each group of experts stays on one node
  eplb plan trace.json --windows 0:4 --gpus 8 --replicas 72 --plot plan.html
      the sum of four windows of a trace, with a picture
  eplb plan counts.npz --key prefill --gpus 16 --json
      one array of an archive; figures for a program

files of loads:
  .npy, .npz    an array [layers, experts] or [windows, layers, experts]
  .json         SGLang's recorder (logical_count), the EPLB benchmark (load_history)
  .pt           SGLang's recorder, or a tensor (needs torch)

exit codes: 0; 2 for input that was refused; 130 if interrupted
"""

_SHOW_EXAMPLES = """\
examples:
  eplb show plan.json
  eplb show plan.json --layer 12
      what each rank holds and carries in one layer
  eplb show plan.json --plot plan.svg

exit codes: 0; 2 for input that was refused; 130 if interrupted
"""

_EXPLAIN_EXAMPLES = """\
examples:
  eplb explain plan.json
      which constraint binds in which layer, and what would help
  eplb explain plan.json --json

exit codes: 0; 2 for input that was refused; 130 if interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; `argv` is by default that of the process.

    Returns:
        The exit code.
    """
    try:
        arguments = _parser().parse_args(argv)
        with warnings.catch_warnings(action="ignore"):  # torch's, about how a file was pickled
            code = int(arguments.run(arguments))
        sys.stdout.flush()
        return code
    except PlanError as error:
        message = printable(_in_options(str(error), arguments.source))
        print_text(f"eplb {arguments.command}: error: {message}\n", sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # What is still buffered would fail again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _plan(arguments: argparse.Namespace) -> int:
    _check_plan_outputs(arguments, arguments.loads)
    trace = read_loads(
        arguments.loads,
        windows=arguments.windows,
        key=arguments.key,
        allow_zero=arguments.allow_zero,
    )
    topology, assumed = topology_of(arguments, trace.loads.shape[2])
    planner = Planner(
        topology,
        arguments.groups,
        policy=cast("PolicyName", arguments.policy),
        threads=arguments.threads,
        group_rule=cast("GroupRule", arguments.group_rule),
    )
    plan = planner.plan(trace.total, layer_ids=trace.layer_ids)
    report = Report(plan=plan, trace=trace, time=_measured(planner, plan), assumed=assumed)
    if arguments.output is not None:
        write_whole(arguments.output, plan.to_json().encode(), "output")
    return _show_report(report, arguments)


def _show(arguments: argparse.Namespace) -> int:
    _check_plan_outputs(arguments, arguments.plan)
    return _show_report(Report(plan=Plan.load(arguments.plan)), arguments)


def _explain(arguments: argparse.Namespace) -> int:
    explanation = explain(Plan.load(arguments.plan), mend=not arguments.no_mends)
    if arguments.json:
        text = json.dumps(explanation.figures(), indent=2, allow_nan=False) + "\n"
    else:
        text = explanation.text(top=arguments.top)
    print_text(text, sys.stdout)
    return 0


def _show_report(report: Report, arguments: argparse.Namespace) -> int:
    layer = arguments.layer
    if arguments.json:
        figures = report.figures(top=arguments.top, layer=layer)
        text = json.dumps(figures, indent=2, allow_nan=False) + "\n"
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


def _check_plan_outputs(arguments: argparse.Namespace, source: str) -> None:
    """Refuses outputs that cannot be, before any work is done for them."""
    if arguments.plot is not None:
        from eplb_rs import draw

        draw.check_path(arguments.plot)
    check_outputs(source, {"output": arguments.output, "plot": arguments.plot})


def _measured(planner: Planner, plan: Plan) -> PlanningTime:
    """How long a warm planner takes, for as many calls as fit into a moment."""
    load = np.ascontiguousarray(plan.expert_load)
    out = planner.allocate(plan.num_layers, plan.num_experts, plan.log2phy.shape[2])
    times_us: list[float] = []
    started = time.perf_counter()
    planner.plan_into(load, out)
    while len(times_us) < 100 and (not times_us or time.perf_counter() - started < 0.2):
        before = time.perf_counter()
        planner.plan_into(load, out)
        times_us.append(1e6 * (time.perf_counter() - before))
    return PlanningTime(statistics.median(times_us), len(times_us))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="eplb",
        description="Plans where the experts of a mixture-of-experts model live.",
        epilog="eplb plan --help, eplb show --help and eplb explain --help give examples.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"eplb {_core.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    plan = command(commands, "plan", "plan a placement for recorded loads", _PLAN_EXAMPLES)
    plan.set_defaults(run=_plan, source="LOADS", layer=None)
    plan.add_argument("loads", metavar="LOADS", help="a file of recorded expert loads")
    machines = machine_options(plan)
    machines.add_argument(
        "--policy",
        default="balanced",
        metavar="NAME",
        help=f"how to plan: {' or '.join(get_args(PolicyName))} (balanced)",
    )
    machines.add_argument(
        "--group-rule",
        default="strict",
        metavar="NAME",
        help="what policy balanced makes of groups: "
        f"{' or '.join(get_args(GroupRule))} (strict: each stays on one node)",
    )
    machines.add_argument(
        "--threads", type=count, default=1, metavar="N", help="threads to plan on (1)"
    )
    loads = loads_options(plan, "which windows of a trace to sum")
    loads.add_argument(
        "--allow-zero", action="store_true", help="take loads that are all zero, as an even plan"
    )
    output = _output_options(plan)
    output.add_argument("-o", "--output", metavar="FILE", help="write the plan, as JSON")

    show = command(commands, "show", "show a plan that was saved", _SHOW_EXAMPLES)
    show.set_defaults(run=_show, source="PLAN", output=None)
    show.add_argument("plan", metavar="PLAN", help="a file that eplb plan -o or Plan.save wrote")
    output = _output_options(show)
    output.add_argument(
        "--layer",
        type=int,
        metavar="N",
        help="show one layer, rank by rank; numbered as in the model",
    )

    why = command(commands, "explain", "say why a plan is no better", _EXPLAIN_EXAMPLES)
    why.set_defaults(run=_explain, source="PLAN")
    why.add_argument("plan", metavar="PLAN", help="a file that eplb plan -o or Plan.save wrote")
    why.add_argument(
        "--json",
        action="store_true",
        help="print figures for a program, as JSON (eplb_rs.Explanation says which)",
    )
    why.add_argument(
        "--top", type=count, default=5, metavar="N", help="how many of the worst layers (5)"
    )
    why.add_argument("--no-mends", action="store_true", help="do not plan what would help; faster")

    cli_simulate.add_to(commands)
    return parser


def _output_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
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


def _in_options(message: str, source: str) -> str:
    """A message of the package in the words of the command line."""
    for argument, option in ({"path": source} | _OPTIONS).items():
        message = message.replace(f"`{argument}`", option)
    return message
