"""The recorded loads that tests read, and a report on one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import eplb_rs
from eplb_rs.loads import read_loads
from eplb_rs.report import Report

DATA = Path(__file__).parents[1] / "examples" / "data"
DEEPSEEK_R1 = DATA / "deepseek_r1_1k1k.json"
ESFT = DATA / "esft_v2lite_load_history_w256.json"


def deepseek_r1_report(**known: Any) -> Report:
    """The published policy's plan of DeepSeek-R1 for 32 GPUs, and what else is known of it."""
    trace = read_loads(DEEPSEEK_R1)
    topology = eplb_rs.Topology(num_nodes=4, gpus_per_node=8, slots_per_gpu=9)
    planner = eplb_rs.Planner(topology, num_groups=8, policy="deepseek")
    plan = planner.plan(trace.total, layer_ids=trace.layer_ids)
    return Report(plan=plan, trace=trace, **known)
