"""The simulator gives the published figures."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from dualpipe import Costs, Schedule

RANKS = range(2, 33, 2)


def bubble(method: str, ranks: int, micro_batches: int, costs: Costs | None = None) -> float:
    return Schedule.generate(method, ranks, micro_batches, check=False).simulate(costs).bubble


@pytest.mark.parametrize("unit", [1.0, 2.5])
@pytest.mark.parametrize("p", RANKS)
def test_bubble_table(p: int, unit: float) -> None:
    """F = W, B = 2W and FB = F + B: there the formulae are exact."""
    f = i = w = unit
    b, fb = i + w, 3 * unit
    costs = Costs(forward=f, backward_input=i, backward_weight=w)
    m = 4 * p
    rows = {
        # method: bubble, activations at their peak, in units of one stage's
        "1f1b": ((p - 1) * (f + b), p),
        "zb_h1": ((p - 1) * (f + b - 2 * w), p),
        "dualpipe": ((p / 2 - 1) * (fb + b - 3 * w), p + 1),
        "dualpipev": ((2 * p / 2 - 1) * (fb + b - 3 * w), 2 * p + 1),
    }
    for method, (expected, activations) in rows.items():
        schedule = Schedule.generate(method, p, m, check=False)
        timeline = schedule.simulate(costs)
        assert timeline.bubble == pytest.approx(expected, rel=1e-12, abs=1e-9), method
        assert timeline.peaks.activations.max() == activations, method
        stages_held = schedule.num_stages * schedule.num_copies // p
        assert stages_held == {"dualpipe": 2, "dualpipev": 2}.get(method, 1)


@pytest.mark.parametrize("p", RANKS)
def test_ratios(p: int) -> None:
    m = 4 * p
    timeline = Schedule.generate("1f1b", p, m, check=False).simulate()
    assert timeline.bubble_ratio == pytest.approx((p - 1) / (m + p - 1))
    equal = Costs(forward=1.0, backward=1.0)
    for v in (1, 2, 4):
        schedule = Schedule.generate("interleaved_1f1b", p, m, stages_per_rank=v, check=False)
        assert schedule.simulate().bubble_ratio == pytest.approx((p - 1) / (m * v + p - 1))
    chimera = Schedule.generate("chimera", p, m, check=False).simulate(equal)
    assert chimera.bubble_ratio == pytest.approx((p - 2) / (2 * m + p - 2))


@pytest.mark.parametrize("p", [4, 8, 16, 32])
def test_v_schedules_trade_memory_for_bubble(p: int) -> None:
    """In units of two stages: V-Half has half of 1F1B's bubble at half of its memory, V-Min two
    thirds at a third, ZBV only the fill at all of it."""
    m = 4 * p
    reference = 6 * (p - 1)
    assert bubble("v_half", p, m) <= reference / 2
    assert bubble("v_min", p, m) <= reference * 2 / 3
    assert bubble("zbv", p, m) == p - 1
    for method, activations in {
        "v_half": p + 2,
        "v_min": math.ceil(2 * p / 3) + 2,
        "zbv": 2 * p,
    }.items():
        peaks = Schedule.generate(method, p, m).verify().peaks
        assert peaks.activations.max() <= activations


@pytest.mark.parametrize("p", RANKS)
def test_zb_h2_never_idles_between_its_first_and_last_instruction(p: int) -> None:
    timeline = Schedule.generate("zb_h2", p, 4 * p, check=False).simulate()
    for rank in range(p):
        begin, end = timeline.bounds[rank : rank + 2]
        assert timeline.end[end - 1] - timeline.start[begin] == timeline.busy[rank]
    assert timeline.peaks.activations.max() == 2 * p - 1


def test_dualpipev_against_zbv() -> None:
    zbv = Schedule.generate("zbv", 8, 16)
    dualpipev = Schedule.generate("dualpipev", 8, 16)
    assert zbv.simulate().makespan == 103
    assert dualpipev.simulate().makespan == 110
    assert dualpipev.simulate(pairs="early_forward").makespan == 103
    assert zbv.simulate().bubble_ratio == pytest.approx(0.068, abs=5e-4)
    assert dualpipev.simulate().bubble_ratio == pytest.approx(0.127, abs=5e-4)


def test_two_ranks() -> None:
    schedule = Schedule.generate("dualpipev", 2, 8)
    assert schedule.simulate().makespan / 48 == pytest.approx(1.042, abs=5e-4)
    early = schedule.simulate(pairs="early_forward")
    assert early.makespan / 48 == pytest.approx(1.021, abs=5e-4)
    assert Schedule.generate("1f1b", 2, 8).simulate().makespan / 24 == pytest.approx(1.125)
    assert Schedule.generate("dualpipe", 2, 8).simulate().bubble == 0
    uneven = Costs(forward=1.0, backward_input=1.2, backward_weight=0.9)
    assert schedule.simulate(uneven).makespan / (16 * 3.1) == pytest.approx(1.046, abs=5e-4)


@pytest.mark.parametrize(
    ("latency", "crossings"),
    [(0.0, {16: 0.894, 32: 0.957, 64: 0.980}), (0.05, {16: 0.889, 32: 0.946, 64: 0.967})],
)
def test_where_dualpipev_starts_to_win(latency: float, crossings: dict[int, float]) -> None:
    for m, published in crossings.items():
        zbv = Schedule.generate("zbv", 8, m).compute_only()
        dualpipev = Schedule.generate("dualpipev", 8, m).compute_only()
        bound = zbv.simulate(Costs(latency=latency)).makespan
        low, high = 0.5, 1.0
        for _ in range(30):
            middle = (low + high) / 2
            costs = Costs(latency=latency, overlap_factor=middle)
            if dualpipev.simulate(costs).makespan < bound:
                low = middle
            else:
                high = middle
        assert low == pytest.approx(published, abs=6e-4)


@pytest.mark.parametrize(
    ("latency", "published"),
    [
        (0.0, {"zbv": 250.5, "dualpipev": 249.6, "interleaved_zero_bubble": 232.9}),
        (0.05, {"zbv": 250.9, "dualpipev": 250.2, "interleaved_zero_bubble": 233.6}),
    ],
)
def test_uneven_first_and_last_stage(latency: float, published: dict[str, float]) -> None:
    times = np.ones(16)
    times[[0, -1]] = 1.3
    costs = Costs(forward=times, backward_input=times, backward_weight=times, latency=latency)
    for method, expected in published.items():
        order = Schedule.generate(method, 8, 32).compute_only()
        assert order.simulate(costs).makespan == pytest.approx(expected, abs=0.0501)


def test_latency_in_the_steady_state() -> None:
    order = Schedule.generate("dualpipe", 8, 20).compute_only()
    slope = (order.simulate(Costs(latency=0.01)).makespan - order.simulate().makespan) / 0.01
    assert slope == pytest.approx(26)


def test_blocking_sends_cost_more() -> None:
    schedule = Schedule.generate("dualpipe", 8, 20)
    costs = Costs(latency=0.1)
    asynchronous = schedule.simulate(costs).makespan
    assert schedule.simulate(costs, sends="blocking").makespan > asynchronous


def test_bandwidth_and_slow_ranks() -> None:
    schedule = Schedule.generate("1f1b", 2, 1)
    # F, 4 bytes over the link at 8 bytes a unit, F and B there, back over the link, B.
    costs = Costs(bandwidth=8.0, message_bytes=4.0, latency=0.25)
    assert schedule.simulate(costs).makespan == 1 + 0.75 + 1 + 2 + 0.75 + 2
    assert schedule.simulate(Costs(rank_factor=[1.0, 3.0])).makespan == 1 + 9 + 2
    one_way = Costs(latency=[[0.0, 1.0], [0.0, 0.0]])
    assert schedule.simulate(one_way).makespan == 7


def test_peaks_in_bytes() -> None:
    schedule = Schedule.generate("1f1b", 2, 3)
    proof = schedule.verify(activation_bytes=[100, 10], message_bytes=[1, 0])
    # Rank 0: two activations, two send buffers and the gradient that is being received.
    assert proof.peaks.bytes.tolist() == [2 * 100 + 2 + 1, 10 + 2 + 1]
    same = schedule.simulate(Costs(message_bytes=[1, 0]), activation_bytes=[100, 10])
    assert same.peaks.bytes.tolist() == proof.peaks.bytes.tolist()


def test_the_page_has_the_tables_that_the_simulator_gives() -> None:
    root = Path(__file__).parents[2]
    run = [sys.executable, str(root / "benches" / "schedule_tables.py"), "--check"]
    subprocess.run(run, check=True)
