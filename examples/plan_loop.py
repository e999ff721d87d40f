"""Replans in a loop, as an engine does: every window, for the load of the window before.

    python examples/plan_loop.py [LOADS] [WINDOWS_PER_PLAN]

The planner writes into buffers that are made once, and so allocates nothing while it plans.
Each placement is judged by the window it was planned for and by the one that came after, which
is the one that counts.
"""

import sys
from pathlib import Path

import eplb_rs
import numpy as np
from eplb_rs.loads import read_loads

SAMPLE = Path(__file__).parent / "data" / "esft_v2lite_load_history_w256.json"


def main() -> None:
    trace = read_loads(sys.argv[1] if len(sys.argv) > 1 else SAMPLE)
    step = int(sys.argv[2]) if len(sys.argv) > 2 else 4
    num_windows, num_layers, num_experts = trace.loads.shape

    # 8 GPUs in one node, each with one slot more than its share of the experts.
    topology = eplb_rs.Topology(1, 8, num_experts // 8 + 1)
    # An engine's thread that plans between two forward passes keeps the interpreter: the wait to
    # get it back would take longer than the plan.
    planner = eplb_rs.Planner(topology, release_gil=False)
    buffers = planner.allocate(num_layers, num_experts)
    load = np.empty((num_layers, num_experts), dtype=np.float32)

    # What engines start from, until the first plan.
    placement = eplb_rs.Planner(topology, policy="trivial").plan(
        np.zeros_like(load), layer_ids=trace.layer_ids
    )
    times_us = []
    print("windows  label         planned on    came after    slots changed     us")
    for first in range(0, num_windows - step + 1, step):
        trace.loads[first : first + step].sum(axis=0, out=load, dtype=np.float32)
        came_after = placement.with_load(load).balance

        planner.plan_into(load, buffers)
        times_us.append(planner.last_timing.native_us)
        # An engine would now hand buffers.phy2log to its transfer of weights.
        changed = int((buffers.phy2log != placement.phy2log).sum())
        placement = eplb_rs.Plan.from_phy2log(
            topology, buffers.phy2log, load, policy=planner.policy, layer_ids=trace.layer_ids
        )
        label = trace.labels[first] if trace.labels else ""
        print(
            f"{first:>3}-{first + step - 1:<3}  {label:<12}{placement.balance:>11.4f}"
            f"{came_after:>14.4f}{changed:>11} of {placement.phy2log.size}{times_us[-1]:>7.0f}"
        )

    median, worst = np.percentile(times_us, [50, 100])
    print(f"planned {len(times_us)} times: median {median:.0f} us, longest {worst:.0f} us")


if __name__ == "__main__":
    main()
