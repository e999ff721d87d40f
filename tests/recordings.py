"""The recorded loads that tests read, and small ones that they write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import eplb_rs
import numpy as np
import pytest
from eplb_rs import InvalidInputError
from eplb_rs.loads import read_loads
from eplb_rs.report import Report

DATA = Path(__file__).parents[1] / "examples" / "data"
DEEPSEEK_R1 = DATA / "deepseek_r1_1k1k.json"
ESFT = DATA / "esft_v2lite_load_history_w256.json"

COUNTS = np.arange(1, 25).reshape(2, 3, 4)
"""2 windows, 3 layers, 4 experts."""


def deepseek_r1_report(**known: Any) -> Report:
    """The published policy's plan of DeepSeek-R1 for 32 GPUs, and what else is known of it."""
    trace = read_loads(DEEPSEEK_R1)
    topology = eplb_rs.Topology(num_nodes=4, gpus_per_node=8, slots_per_gpu=9)
    planner = eplb_rs.Planner(topology, num_groups=8, policy="deepseek")
    plan = planner.plan(trace.total, layer_ids=trace.layer_ids)
    return Report(plan=plan, trace=trace, **known)


def write(path: Path, content: str | bytes) -> Path:
    """A file of some content."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(path: Any, **options: Any) -> InvalidInputError:
    """Why a file is not read: in one line that says what it got and what it wanted."""
    with pytest.raises(InvalidInputError) as caught:
        read_loads(path, **options)
    error = caught.value
    assert error.got
    assert error.expected
    assert "\n" not in str(error).replace(str(path), "")
    return error
