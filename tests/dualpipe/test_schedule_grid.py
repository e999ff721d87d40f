"""Every generator is right for every number of ranks and micro-batches."""

from __future__ import annotations

import itertools

import pytest
from dualpipe import METHODS, Schedule

TAKES_STAGES = {"looped_bfs", "interleaved_1f1b", "interleaved_zero_bubble"}
TWO_WAYS = {"chimera", "dualpipe"}


def ranks_of(method: str) -> range:
    return range(2, 33, 2) if method in TWO_WAYS else range(1, 33)


def edges(ranks: int) -> list[int]:
    """Numbers of micro-batches around which orders change their shape."""
    around = [1, ranks, 2 * ranks, 3 * ranks, 4 * ranks]
    near = {m + d for m in around for d in (-1, 0, 1)}
    return sorted(m for m in near if 1 <= m <= 4 * ranks)


@pytest.mark.parametrize("method", METHODS)
def test_all_sizes(method: str) -> None:
    configurations = [(p, m) for p in ranks_of(method) for m in range(1, 4 * p + 1)]
    assert len(configurations) > 1_000
    for ranks, micro_batches in configurations:
        check(method, ranks, micro_batches)


@pytest.mark.parametrize("method", sorted(TAKES_STAGES))
def test_stages_per_rank(method: str) -> None:
    for ranks, stages in itertools.product((1, 2, 3, 5, 8), (1, 3, 4, 5)):
        for micro_batches in edges(ranks):
            check(method, ranks, micro_batches, stages_per_rank=stages)


@pytest.mark.parametrize("method", METHODS)
def test_inference(method: str) -> None:
    for ranks in (r for r in (1, 2, 3, 4, 8) if r in ranks_of(method)):
        for micro_batches in edges(ranks):
            schedule = check(method, ranks, micro_batches, forward_only=True)
            assert not schedule.has_backward
            assert schedule.verify().peaks.activations.max() == 1


def check(method: str, ranks: int, micro_batches: int, **options: object) -> Schedule:
    schedule = Schedule.generate(method, ranks, micro_batches, **options)
    assert schedule.num_micro_batches == micro_batches
    assert schedule.has_transfers == (ranks > 1)
    return schedule
