"""Measured steps: what a report says, predicts and draws."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
import world
from dualpipe import PipelineError, Schedule, search
from pipelines import Part
from torch import nn
from traces import check_trace

FORWARD_S = 0.004


class Slow(nn.Module):
    """Takes its time in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x):
        time.sleep(FORWARD_S)
        return x * self.weight


def measured(rank: int, size: int) -> dict:
    schedule = Schedule.generate("dualpipev", size, 6)
    part = Part(rank, [Slow() for _ in range(schedule.num_stages)], schedule, measure=True)
    with pytest.raises(PipelineError) as refused:
        part.executor.report()
    rows = [((torch.ones(2, 8),), (torch.zeros(2, 8),), {}) for _ in range(6)]
    for _ in range(2):
        part.step(rows)
    report = part.executor.report()
    costs = report.costs
    found = {
        "refused": refused.value.code,
        "kinds": [len(spans) for spans in report.spans],
        "wanted": [sum(i.kind.computes for i in schedule.instructions(r)) for r in range(size)],
        "forward": np.asarray(costs.forward).tolist(),
        "latency": np.asarray(costs.latency).tolist(),
        "ratio": report.predicted.makespan / report.makespan_us,
        "idle": report.idle_ratio.tolist(),
        "text": str(report),
        "trace": report.to_perfetto(),
        "best": search(report.layers([1] * schedule.num_stages), size)[0].method,
    }
    try:
        report.layers([1])
    except PipelineError as error:
        found["layers"] = error.code
    part.executor.measure = False
    part.step(rows)
    found["kept"] = part.executor.report().makespan_us == report.makespan_us
    part.executor.close()
    return found


def test_a_report_measures_predicts_and_draws() -> None:
    for found in world.run(measured, 2):
        assert found["refused"] == "not_measured"
        assert found["kinds"] == found["wanted"]
        assert min(found["forward"]) >= 1e6 * FORWARD_S
        assert np.all(np.asarray(found["latency"]) >= 0)
        assert 0.5 < found["ratio"] < 2
        assert all(0 <= idle < 1 for idle in found["idle"])
        assert "makespan" in found["text"]
        events = check_trace(found["trace"])
        names = [e["args"]["name"] for e in events if e["name"] == "process_name"]
        assert [name.partition(":")[0] for name in names] == ["predicted", "measured"]
        slices = [e for e in events if e["ph"] == "X" and e["pid"] == 1]
        assert len(slices) == sum(found["kinds"])
        assert found["best"]
        assert found["layers"] == "num_layers"
        assert found["kept"]
