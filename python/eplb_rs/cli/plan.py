"""``eplb plan``."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, cast, get_args

import numpy as np

from eplb_rs._files import write_whole
from eplb_rs.cli.options import command, count, loads_options, machine_options, topology_of
from eplb_rs.cli.show import check_report_outputs, output_options, show_report
from eplb_rs.loads import read_loads
from eplb_rs.planner import GroupRule, Planner, PolicyName
from eplb_rs.report import PlanningTime, Report

if TYPE_CHECKING:
    import argparse

    from eplb_rs.cli.options import Parser
    from eplb_rs.plan import Plan

__all__ = ["add_to"]

_EXAMPLES = """\
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

exit codes: 0; 1 output not written; 2 input refused; 130 interrupted
"""


def add_to(commands: argparse._SubParsersAction[Parser]) -> None:
    """Adds the command to the program."""
    parser = command(commands, "plan", "plan a placement for recorded loads", _EXAMPLES)
    parser.set_defaults(run=_plan, source="LOADS", layer=None)
    parser.add_argument("loads", metavar="LOADS", help="a file of recorded expert loads")
    machines = machine_options(parser)
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
    loads = loads_options(parser, "which windows of a trace to sum")
    loads.add_argument(
        "--allow-zero", action="store_true", help="take loads that are all zero, as an even plan"
    )
    output = output_options(parser)
    output.add_argument("-o", "--output", metavar="FILE", help="write the plan, as JSON")


def _plan(arguments: argparse.Namespace) -> int:
    check_report_outputs(arguments, arguments.loads)
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
    return show_report(report, arguments)


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
