"""The command line: ``eplb``, or ``python -m eplb_rs``.

Exit codes: 0; 2 for input that was refused, with one line on stderr that says why and how to mend
it; 130 if interrupted; 141 if whoever reads the output went away.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO, cast, get_args

import numpy as np

from eplb_rs import _core
from eplb_rs._files import write_whole
from eplb_rs.errors import InvalidInputError, PlanError
from eplb_rs.explanation import explain
from eplb_rs.loads import read_loads
from eplb_rs.plan import Plan
from eplb_rs.planner import Planner, PolicyName
from eplb_rs.report import PlanningTime, Report, Style, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

_OPTIONS = {
    "allow_zero": "--allow-zero",
    "key": "--key",
    "layer": "--layer",
    "num_gpus": "--gpus",
    "num_groups": "--groups",
    "num_nodes": "--nodes",
    "num_replicas": "--replicas",
    "output": "--output",
    "path": "LOADS",
    "plan": "PLAN",
    "plot": "--plot",
    "policy": "--policy",
    "threads": "--threads",
    "windows": "--windows",
}
"""What the command line calls the arguments of the package."""

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
        message = printable(_in_options(str(error)))
        _print(f"eplb {arguments.command}: error: {message}\n", sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # What is still buffered would fail again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _plan(arguments: argparse.Namespace) -> int:
    _check_outputs(arguments, arguments.loads)
    trace = read_loads(
        arguments.loads,
        windows=arguments.windows,
        key=arguments.key,
        allow_zero=arguments.allow_zero,
    )
    num_experts = trace.loads.shape[2]
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
    planner = Planner(
        topology,
        arguments.groups,
        policy=cast("PolicyName", arguments.policy),
        threads=arguments.threads,
    )
    plan = planner.plan(trace.total, layer_ids=trace.layer_ids)
    report = Report(plan=plan, trace=trace, time=_measured(planner, plan), assumed=assumed)
    if arguments.output is not None:
        write_whole(arguments.output, plan.to_json().encode(), "output")
    return _show_report(report, arguments)


def _show(arguments: argparse.Namespace) -> int:
    _check_outputs(arguments, arguments.plan)
    return _show_report(Report(plan=Plan.load(arguments.plan)), arguments)


def _explain(arguments: argparse.Namespace) -> int:
    explanation = explain(Plan.load(arguments.plan), mend=not arguments.no_mends)
    if arguments.json:
        text = json.dumps(explanation.figures(), indent=2, allow_nan=False) + "\n"
    else:
        text = explanation.text(top=arguments.top)
    _print(text, sys.stdout)
    return 0


def _show_report(report: Report, arguments: argparse.Namespace) -> int:
    layer = arguments.layer
    if arguments.json:
        figures = report.figures(top=arguments.top, layer=layer)
        text = json.dumps(figures, indent=2, allow_nan=False) + "\n"
    elif layer is not None:
        text = report.layer_text(layer, _style(sys.stdout), top=arguments.top)
    else:
        text = report.text(_style(sys.stdout), top=arguments.top)
    if arguments.plot is not None:
        from eplb_rs import draw

        draw.save(report, arguments.plot)
    if not arguments.json:
        written = [path for path in (arguments.output, arguments.plot) if path is not None]
        text += "".join(f"wrote {printable(str(path))}\n" for path in written)
    _print(text, sys.stdout)
    return 0


def _check_outputs(arguments: argparse.Namespace, source: str) -> None:
    """Refuses outputs that cannot be, before any work is done for them."""
    if arguments.plot is not None:
        from eplb_rs import draw

        draw.check_path(arguments.plot)
    users = {Path(source).resolve(): "the file that is read"}
    for argument, name in (("output", arguments.output), ("plot", arguments.plot)):
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


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints take one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {printable(message)} (try {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="eplb",
        description="Plans where the experts of a mixture-of-experts model live.",
        epilog="eplb plan --help, eplb show --help and eplb explain --help give examples.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"eplb {_core.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    plan = _command(commands, "plan", "plan a placement for recorded loads", _PLAN_EXAMPLES)
    plan.set_defaults(run=_plan, layer=None)
    plan.add_argument("loads", metavar="LOADS", help="a file of recorded expert loads")
    machines = plan.add_argument_group("machines and model")
    machines.add_argument(
        "--gpus", type=_count, required=True, metavar="N", help="how many GPUs there are"
    )
    machines.add_argument(
        "--nodes", type=_count, metavar="N", help="how many nodes they are in (1)"
    )
    machines.add_argument(
        "--groups",
        type=_count,
        metavar="N",
        help="in how many groups the experts are (1; DeepSeek-V3 and R1: 8); if groups divide "
        "over nodes, each stays on one",
    )
    machines.add_argument(
        "--replicas",
        type=_count,
        metavar="N",
        help="how many expert slots there are on all GPUs (room for all experts, and one slot "
        "to spare on each GPU)",
    )
    machines.add_argument(
        "--policy",
        default="deepseek",
        metavar="NAME",
        help=f"how to plan: {' or '.join(get_args(PolicyName))} (deepseek)",
    )
    machines.add_argument(
        "--threads", type=_count, default=1, metavar="N", help="threads to plan on (1)"
    )
    loads = plan.add_argument_group("loads")
    loads.add_argument(
        "--windows",
        metavar="WHICH",
        help="which windows of a trace to sum: all, last, a number (3, -1), a range (0:4) or "
        "a label (all)",
    )
    loads.add_argument(
        "--key", metavar="NAME", help="which array of an .npz, or field of a .json or .pt"
    )
    loads.add_argument(
        "--allow-zero", action="store_true", help="take loads that are all zero, as an even plan"
    )
    output = _output_options(plan)
    output.add_argument("-o", "--output", metavar="FILE", help="write the plan, as JSON")

    show = _command(commands, "show", "show a plan that was saved", _SHOW_EXAMPLES)
    show.set_defaults(run=_show, output=None)
    show.add_argument("plan", metavar="PLAN", help="a file that eplb plan -o or Plan.save wrote")
    output = _output_options(show)
    output.add_argument(
        "--layer",
        type=int,
        metavar="N",
        help="show one layer, rank by rank; numbered as in the model",
    )

    why = _command(commands, "explain", "say why a plan is no better", _EXPLAIN_EXAMPLES)
    why.set_defaults(run=_explain)
    why.add_argument("plan", metavar="PLAN", help="a file that eplb plan -o or Plan.save wrote")
    why.add_argument(
        "--json",
        action="store_true",
        help="print figures for a program, as JSON (eplb_rs.Explanation says which)",
    )
    why.add_argument(
        "--top", type=_count, default=5, metavar="N", help="how many of the worst layers (5)"
    )
    why.add_argument("--no-mends", action="store_true", help="do not plan what would help; faster")
    return parser


def _command(
    commands: argparse._SubParsersAction[_Parser], name: str, summary: str, examples: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=summary.capitalize() + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


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
        type=_count,
        default=5,
        metavar="N",
        help="how many of the worst layers and hottest experts (5)",
    )
    return output


def _count(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return count


def _in_options(message: str) -> str:
    """A message of the package in the words of the command line."""
    for argument, option in _OPTIONS.items():
        message = message.replace(f"`{argument}`", option)
    return message


def _style(stream: TextIO) -> Style:
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


def _print(text: str, stream: TextIO) -> None:
    """Writes text; what the stream's encoding lacks (in the names of files, say) is escaped."""
    encoding = stream.encoding or "ascii"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
