"""Partitions are optimal where that can be known, and searches say why."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from dualpipe import Costs, Layers, Machine, Schedule, ScheduleError, partition, search

DEEPSEEK = [0.1] + [0.6] * 3 + [1.0] * 58 + [2.5]
"""Embedding, 3 dense layers, 58 MoE layers, head with loss."""


def makespan(
    schedule: Schedule,
    times: list[float],
    bounds: tuple[int, ...],
    ranks: list[float] | float = 1.0,
) -> float:
    stages = [sum(times[a:b]) for a, b in itertools.pairwise(bounds)]
    costs = Costs(forward=stages, backward_input=stages, backward_weight=stages, rank_factor=ranks)
    return schedule.simulate(costs).makespan


def brute_force(schedule: Schedule, times: list[float], ranks: list[float] | float = 1.0) -> float:
    n = len(times)
    inner = itertools.combinations(range(1, n), schedule.num_stages - 1)
    return min(makespan(schedule, times, (0, *cut, n), ranks) for cut in inner)


CASES = [
    ("1f1b", 3, 5, 9),
    ("gpipe", 4, 4, 9),
    ("zb_h1", 3, 6, 10),
    ("zb_h2", 4, 7, 9),
    ("interleaved_1f1b", 2, 4, 13),
    ("zbv", 2, 5, 13),
    ("v_half", 2, 6, 13),
    ("dualpipe", 4, 8, 13),
    ("dualpipev", 2, 6, 13),
    ("chimera", 4, 6, 12),
]


@pytest.mark.parametrize(("method", "ranks", "micro_batches", "layers"), CASES)
@pytest.mark.parametrize("seed", range(4))
def test_small_cases_against_brute_force(
    method: str, ranks: int, micro_batches: int, layers: int, seed: int
) -> None:
    rng = random.Random(f"{method} {seed}")
    times = [rng.choice([0.1, 0.6, 1.0, 2.5]) for _ in range(layers)]
    factor = [1.0] * ranks if seed % 2 else [rng.choice([1.0, 1.5]) for _ in range(ranks)]
    schedule = Schedule.generate(method, ranks, micro_batches)
    best = brute_force(schedule, times, factor)
    machine = Machine(rank_factor=factor)
    exact = partition(Layers(forward=times), method, ranks, micro_batches, machine=machine)
    assert exact.exact
    assert exact.gap == 0
    assert exact.makespan == pytest.approx(best)
    assert makespan(schedule, times, exact.bounds, factor) == pytest.approx(exact.makespan)
    # With too few simulations to try all cuts, it must get there another way.
    few = max(math.comb(layers - 1, schedule.num_stages - 1) * 2 // 3, 20)
    found = partition(
        Layers(forward=times), method, ranks, micro_batches, machine=machine, max_simulations=few
    )
    assert found.lower_bound <= best * (1 + 1e-9)
    assert best <= found.makespan * (1 + 1e-9)
    assert found.makespan <= best * 1.01
    assert found.makespan <= found.lower_bound * (1 + found.gap) * (1 + 1e-9)


def equal_counts(num_stages: int) -> list[tuple[int, ...]]:
    """61 layers in equal counts, the longer stages first or last; embedding and head at the ends."""
    size, longer = divmod(61, num_stages)
    cuts = []
    for sizes in (
        [size + (s < longer) for s in range(num_stages)],
        [size + (s >= num_stages - longer) for s in range(num_stages)],
    ):
        sizes[0] += 1
        sizes[-1] += 1
        cuts.append((0, *np.cumsum(sizes).tolist()))
    return cuts


@pytest.mark.parametrize("method", ["1f1b", "gpipe", "zb_h1", "zb_h2"])
def test_61_layers_over_16_ranks_exactly(method: str) -> None:
    found = partition(Layers(forward=DEEPSEEK), method, 16, 64)
    assert found.exact
    schedule = Schedule.generate(method, 16, 64)
    equal = min(makespan(schedule, DEEPSEEK, cut) for cut in equal_counts(16))
    assert equal >= 1.15 * found.makespan


def test_61_layers_over_16_ranks_in_a_v() -> None:
    found = partition(Layers(forward=DEEPSEEK), "zbv", 16, 64, max_simulations=600)
    schedule = Schedule.generate("zbv", 16, 64)
    equal = min(makespan(schedule, DEEPSEEK, cut) for cut in equal_counts(32))
    assert equal >= 1.15 * found.makespan
    assert not found.exact
    assert 0 < found.gap < 0.09
    assert found.lower_bound == pytest.approx(3 * 64 * sum(DEEPSEEK) / 16)


def test_memory_moves_layers_and_refuses_what_cannot_fit() -> None:
    layers = Layers(
        forward=[1.0] * 8, parameter_bytes=[900, *[100] * 7], activation_bytes=10, message_bytes=1
    )
    free = partition(layers, "1f1b", 4, 8)
    fullest = int(free.rank_bytes.max())
    tight = partition(layers, "1f1b", 4, 8, machine=Machine(max_bytes=fullest - 1))
    assert tight.rank_bytes.max() < fullest
    assert tight.makespan >= free.makespan
    with pytest.raises(ScheduleError, match="fullest rank") as caught:
        partition(layers, "1f1b", 4, 8, machine=Machine(max_bytes=500))
    assert caught.value.code == "memory"


def test_slow_ranks_get_less() -> None:
    layers = Layers(forward=[1.0] * 12)
    found = partition(layers, "1f1b", 3, 24, machine=Machine(rank_factor=[1.0, 2.0, 1.0]))
    sizes = np.diff(found.bounds)
    assert sizes[1] < sizes[0]
    assert sizes[1] < sizes[2]


def test_search_ranks_and_says_why() -> None:
    layers = Layers(forward=[1.0] * 16)
    methods = ["1f1b", "zbv", "dualpipev", "dualpipe"]
    slow = search(layers, 8, num_micro_batches=[16], methods=methods)
    assert [c.method for c in slow][:1] == ["zbv"]
    assert slow == sorted(slow, key=lambda c: c.time_per_micro_batch)
    by_name = {c.method: c for c in slow}
    assert by_name["dualpipev"].wins_below_overlap == pytest.approx(0.894, abs=1e-3)
    assert "would pay once pairs took less than 0.89" in by_name["dualpipev"].why
    assert by_name["zbv"].wins_below_overlap is None
    fast = search(
        layers, 8, num_micro_batches=[16], methods=methods, machine=Machine(overlap_factor=0.8)
    )
    assert fast[0].method in {"dualpipe", "dualpipev"}
    assert "pays because" in fast[0].why
    assert fast[0].schedule().num_ranks == 8


def test_search_under_a_memory_limit() -> None:
    layers = Layers(forward=[1.0] * 8, activation_bytes=100)
    found = search(
        layers,
        4,
        num_micro_batches=[16],
        methods=["gpipe", "1f1b", "v_half", "dualpipe"],
        machine=Machine(max_bytes=900),
    )
    by_name = {c.method: c for c in found}
    assert by_name["gpipe"].partition is None
    assert "max_bytes" in by_name["gpipe"].why
    assert math.isinf(by_name["gpipe"].time_per_micro_batch)
    assert found[-1].partition is None
    assert found[0].partition is not None
    assert "of the memory" in found[0].why


def test_search_with_costs_for_each_number_of_micro_batches() -> None:
    # Small micro-batches cost more than their share.
    loads = {m: Layers(forward=[16 / m + 0.2] * 4) for m in (4, 8, 32)}
    found = search(loads, 4, methods=["1f1b"])
    steps = [c.partition.makespan for c in found if c.partition]
    assert steps == sorted(steps)
    assert {c.num_micro_batches for c in found} == {4, 8, 32}


def test_search_tells_its_progress_and_can_be_stopped() -> None:
    told: list[tuple[int, int]] = []
    layers = Layers(forward=[1.0] * 8)
    options = {"num_micro_batches": [4, 8], "methods": ["1f1b", "zbv"], "max_simulations": 20}
    search(layers, 4, progress=lambda done, total: told.append((done, total)), **options)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]

    class StopError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise StopError

    with pytest.raises(StopError):
        search(layers, 4, progress=stop, **options)


@pytest.mark.parametrize(
    ("call", "code"),
    [
        (lambda: partition(Layers(forward=[1.0] * 3), "1f1b", 4, 8), "too_few_layers"),
        (lambda: partition(Layers(forward=1.0), "1f1b", 4, 8), "length"),
        (lambda: partition(Layers(forward=[1.0, -1.0]), "1f1b", 2, 8), "negative_time"),
        (lambda: partition(Layers(forward=[1.0, math.nan]), "1f1b", 2, 8), "negative_time"),
        (lambda: partition(Layers(forward=[1.0] * 4, message_bytes=-1), "1f1b", 2, 8), "sizes"),
        (lambda: partition(Layers(forward=["a", "b"]), "1f1b", 2, 8), "not_a_number"),
        (lambda: partition(Layers(forward=[1.0] * 4), "dualpipe", 3, 8), "odd_ranks"),
        (
            lambda: partition(
                Layers(forward=[1.0] * 4), "1f1b", 2, 8, machine=Machine(rank_factor=[1.0] * 3)
            ),
            "length",
        ),
        (lambda: search(Layers(forward=[1.0] * 4), 2, methods=[]), "nothing_to_try"),
        (lambda: search(Layers(forward=[1.0] * 4), 2, methods=["x"]), "unknown_method"),
        (lambda: search({}, 2), "nothing_to_try"),
        (lambda: search(Layers(forward=[1.0] * 4), 2, num_micro_batches=[0]), "num_micro_batches"),
    ],
)
def test_bad_input(call, code: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        call()
    assert caught.value.code == code
