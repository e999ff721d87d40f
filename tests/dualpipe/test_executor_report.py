"""Measured steps: what a report says, predicts and draws."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
import world
from dualpipe import Kind, PipelineError, Schedule, search
from dualpipe.executor.report import StepReport
from dualpipe.executor.timeline import Span, plain_kind
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
        "best": search(
            report.layers([1] * schedule.num_stages), size, machine=report.machine(max_bytes=None)
        )[0].method,
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


def as_if(schedule: Schedule, work: dict[Kind, list[float]], slower: list[float]) -> StepReport:
    """A step that took so long: each rank's computations in a row, in milliseconds."""
    ranks = []
    for rank, factor in enumerate(slower):
        now, spans = 0.0, []
        for instruction in schedule.instructions(rank):
            if not instruction.kind.computes:
                continue
            kind = plain_kind(Span(instruction, False, 0, 0))
            end = now + factor * work[kind][instruction.stage] / 1e3
            spans.append(Span(instruction, False, now, end))
            now = end
        ranks.append(tuple(spans))
    return StepReport(schedule, tuple(ranks))


def test_links_and_pairs_go_into_a_search() -> None:
    work = {kind: [2.0] * 8 for kind in (Kind.F, Kind.I, Kind.W)} | {Kind.B: [4.0] * 8}
    report = as_if(Schedule.generate("dualpipev", 4, 12), work, [1.0] * 4)
    machine = report.machine(max_bytes=10)
    assert (machine.pairs, machine.overlap_factor, machine.max_bytes) == ("early_forward", 1.0, 10)
    # As if a hook had run the pairs, 0.9 of their halves' time each.
    spans = tuple(
        tuple(
            span._replace(pair=True, end_s=span.start_s + 0.9 * 6e-3)
            if span.instruction.kind == Kind.OVERLAP_F
            else span
            for span in rank
            if span.instruction.kind != Kind.OVERLAP_B
        )
        for rank in report.spans
    )
    machine = StepReport(report.schedule, spans).machine()
    assert machine.pairs == "atomic"
    assert np.isclose(machine.overlap_factor, 0.9)
    latency = np.asarray(machine.latency)
    assert latency.shape == (4, 4)
    assert not latency.any() or latency.all()


def test_the_ranks_speeds_are_told_from_the_stages_work() -> None:
    # The last stage has a loss; the first computes no gradient of its input.
    work = {
        Kind.F: [3.0, 3.0, 3.0, 3.2],
        Kind.B: [7.0, 8.0, 8.0, 8.3],
        Kind.I: [3.0, 4.0, 4.0, 4.3],
        Kind.W: [4.0, 4.0, 4.0, 4.0],
    }
    slower = [1.02, 0.98]
    report = as_if(Schedule.generate("dualpipev", 2, 8), work, slower)
    alike = {Kind.F: [0, 1, 2], Kind.B: [1, 2], Kind.W: range(4)}
    costs = report.costs_for_any_rank(alike)
    assert np.allclose(costs.rank_factor, slower)
    for kind, found in ((Kind.F, costs.forward), (Kind.W, costs.backward_weight)):
        assert np.allclose(found, 1e3 * np.array(work[kind]))
    # Nothing to tell them by: as fast as one another, and stages cost what was measured.
    blind = report.costs_for_any_rank({})
    assert np.array_equal(blind.rank_factor, [1, 1])
    assert np.array_equal(blind.forward, report.costs.forward)


def test_stages_on_several_ranks_are_not_mixed_up_with_ranks() -> None:
    work = {kind: [2.0, 3.0] for kind in (Kind.F, Kind.B, Kind.I, Kind.W)}
    report = as_if(Schedule.generate("dualpipe", 2, 8), work, [1.1, 0.9])
    costs = report.costs_for_any_rank(dict.fromkeys(work, range(2)))
    assert np.allclose(costs.rank_factor, [1.1, 0.9])
    assert np.allclose(costs.forward, [2e3, 3e3])
