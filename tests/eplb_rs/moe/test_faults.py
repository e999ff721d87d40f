"""Ranks that die while experts move: each layer wholly old or wholly new, the same for all."""

import os
import signal
import threading
import time

import eplb_rs
import numpy as np
import pytest
import world

torch = pytest.importorskip("torch")

import torch.distributed as dist  # noqa: E402
from eplb_rs.moe import ExpertMover, ExpertWeights, MoveError, checksum  # noqa: E402

LAYERS, EXPERTS, SLOTS, RANKS = 8, 12, 4, 4
LIMIT_S, GRACE_S = 2.0, 2.5


def random_plan(seed):
    load = np.random.default_rng(seed).lognormal(0, 1.2, (LAYERS, EXPERTS))
    return eplb_rs.Planner(eplb_rs.Topology(1, RANKS, SLOTS), policy="balanced").plan(load)


def expert(layer, number):
    generator = torch.Generator().manual_seed(layer * EXPERTS + number)
    return {
        "weight": torch.randn(64, 128, generator=generator),
        "scale": torch.randn(64, generator=generator),
    }


def fill(weights, plan, rank):
    for layer in range(LAYERS):
        for slot in range(SLOTS):
            held = expert(layer, int(plan.phy2log[layer, rank * SLOTS + slot]))
            for name, tensor in weights.slot(layer, slot).items():
                tensor.copy_(held[name])


def dying(rank, size, seed):
    """Moves from plan to plan until a rank dies or stops at a moment of its own."""
    rng = np.random.default_rng(seed)
    victim, delay = int(rng.integers(size)), float(rng.uniform(0.0, 0.25))
    how = signal.SIGSTOP if seed % 3 == 2 else signal.SIGKILL
    plan = random_plan(seed)
    fields = [
        eplb_rs.moe.ExpertField(name, tuple(tensor.shape), tensor.dtype)
        for name, tensor in expert(0, 0).items()
    ]
    weights = ExpertWeights(fields, num_layers=LAYERS, num_slots=SLOTS)
    fill(weights, plan, rank)
    mover = ExpertMover(weights, limit_s=LIMIT_S, grace_s=GRACE_S, checksums=seed % 2 == 0)
    dist.barrier()
    begun = time.monotonic()
    if rank == victim:
        threading.Timer(delay, os.kill, (os.getpid(), how)).start()
    try:
        for number in range(1, 10_000):
            new = random_plan(seed + 1000 * number)
            if number % 2:
                mover.apply(plan, new)
            else:
                mover.begin(plan, new)
                while mover.step():
                    pass
            plan = new
    except MoveError as error:
        late = time.monotonic() - begun - delay
        for layer in range(LAYERS):
            for slot in range(SLOTS):
                held = int(error.plan.phy2log[layer, rank * SLOTS + slot])
                wanted = checksum(expert(layer, held).values())
                assert weights.checksum(layer, slot) == wanted, f"layer {layer}, slot {slot}"
        return (
            error.plan.phy2log.tolist(),
            error.moved,
            error.lost_ranks,
            error.lost_experts,
            victim,
            late,
        )


def check(outcomes):
    settled = 0
    for outcome in outcomes:
        told = [survivor for survivor in outcome if survivor is not None]
        slots, moved, lost, gone, victim, _ = told[0]
        assert len(told) == RANKS - 1
        assert lost == (victim,)
        for other in told[1:]:
            assert other[:5] == (slots, moved, lost, gone, victim)
        assert max(late for *_, late in told) < LIMIT_S + GRACE_S + 1.5
        alive = np.delete(np.array(slots).reshape(LAYERS, RANKS, SLOTS), victim, axis=1)
        missing = tuple(
            (layer, number)
            for layer in range(LAYERS)
            for number in range(EXPERTS)
            if number not in alive[layer]
        )
        assert gone == missing
        settled += 0 < len(moved) < LAYERS
    return settled


def test_a_rank_dies_in_a_move():
    check(world.run_lossy(dying, RANKS, [(seed,) for seed in range(10)], at_once=3))


@pytest.mark.slow
def test_many_ranks_die_in_moves():
    trials = [(seed,) for seed in range(10, 60)]
    settled = check(world.run_lossy(dying, RANKS, trials, at_once=3))
    assert settled >= 10, "moves that were half done"
