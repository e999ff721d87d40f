"""The parts of `moe_layer.py` that move experts: how fast, and at whose expense."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import eplb_rs
import numpy as np
import torch
import torch.distributed as dist
from eplb_rs.moe import ExpertMover, ExpertWeights
from moe_case import MIB, RANKS, Bench, ratio, summary

if TYPE_CHECKING:
    from collections.abc import Callable


def moves_part(bench: Bench) -> dict[str, Any]:
    """How fast moves run, beside NCCL's own send and receive."""
    rank, sizes = bench.rank, bench.sizes
    other = 1 - rank.rank
    out, into = torch.randint(
        0, 255, (2, sizes.message), dtype=torch.uint8, device=rank.device
    ).unbind()

    def exchanged(count: int) -> None:
        for _ in range(count):
            works = dist.batch_isend_irecv(
                [dist.P2POp(dist.isend, out, other), dist.P2POp(dist.irecv, into, other)]
            )
            for work in works:
                work.wait()

    # Every layer of a model whose experts all change sides.
    slots = sizes.experts // RANKS // sizes.layers
    held = bench.weights[0]
    weights = ExpertWeights.adopt(
        [
            {name: tensor[n * slots : (n + 1) * slots] for name, tensor in held.items()}
            for n in range(sizes.layers)
        ]
    )
    topology = eplb_rs.Topology(1, RANKS, slots)
    half = np.arange(sizes.experts).reshape(RANKS, sizes.layers, slots)
    numbers = half.transpose(1, 0, 2).reshape(sizes.layers, -1)
    local = np.tile(np.arange(RANKS * slots), (sizes.layers, 1))
    load = np.ones(local.shape)
    there = eplb_rs.Plan.from_phy2log(topology, local, load)
    back = eplb_rs.Plan.from_phy2log(topology, np.roll(local, slots, axis=1), load)
    swapped = np.roll(numbers, slots, axis=1)
    count = max(1, weights.expert_bytes * slots * sizes.layers // sizes.message)
    found: dict[str, Any] = {}
    rates: dict[str, list[float]] = {"NCCL": []}
    exchanged(2)
    for limit in (64 * MIB, 256 * MIB, 1024 * MIB):
        mover = ExpertMover(weights, max_bytes_in_flight=limit)
        rates[f"mover, {limit // MIB} MiB in flight"] = own = []
        at, to = there, back
        mover.apply(at, to)
        at, to = to, at
        for number in range(5):
            took = rank.timed(mover.apply, at, to)
            at, to = to, at
            own.append(mover.stats.bytes_received / took / 1e6)
            if number < 3:
                took = rank.timed(exchanged, count)
                rates["NCCL"].append(count * sizes.message / took / 1e6)
        bench.experts.check(weights, numbers if at is there else swapped, rank.rank)
    best = statistics.median(rates["NCCL"])
    found["GB/s each way"] = {n: round(statistics.median(r), 1) for n, r in rates.items()}
    found["of NCCL's"] = {n: round(statistics.median(r) / best, 4) for n, r in rates.items()}
    found["moved GB to each rank"] = round(mover.stats.bytes_received / 1e9, 2)
    # The plans of the layers above: few experts, two layers.
    mover = ExpertMover(bench.weights)
    took = [
        rank.timed(mover.apply, *pair)
        for _ in range(4)
        for pair in ((bench.old, bench.new), (bench.new, bench.old))
    ]
    found["two layers rebalanced"] = {
        "experts received": mover.stats.received,
        "ms": round(statistics.median(took), 3),
        "GB/s each way": round(mover.stats.bytes_received / statistics.median(took) / 1e6, 1),
    }
    bench.experts.check(bench.weights, bench.old.phy2log, rank.rank)
    return found


def stepped_pass(mover: ExpertMover, work: Callable[[], object]) -> None:
    mover.step()
    work()


def between_part(bench: Bench) -> dict[str, Any]:
    """Passes with a step of a move before them, and passes without, in turn."""
    rank = bench.rank
    found = {}
    for name, work, limit in (
        ("forward and backward, 256 MiB in flight", bench.ideal.step, 256 * MIB),
        ("forward, 176 MiB in flight", bench.ideal.forward, 176 * MIB),
        ("forward, 88 MiB in flight", bench.ideal.forward, 88 * MIB),
    ):
        mover = ExpertMover(bench.weights, max_bytes_in_flight=limit)
        plans = bench.old, bench.new
        plain: list[float] = []
        stepped: list[float] = []
        begins: list[float] = []
        for number in range(6 * bench.rounds + 6):
            if not mover.busy:
                begins.append(rank.timed(mover.begin, *plans))
                plans = plans[1], plans[0]
            took = rank.timed(work)
            with_one = rank.timed(stepped_pass, mover, work)
            if number >= 6:
                plain.append(took)
                stepped.append(with_one)
        while mover.busy:
            stepped_pass(mover, work)
            rank.wait()
        bench.experts.check(bench.weights, plans[0].phy2log, rank.rank)
        if plans[0] is not bench.old:
            mover.apply(*plans)
        found[name] = {
            "plain": summary(plain),
            "with a step": summary(stepped),
            "with / plain": ratio(stepped, plain),
            "medians": round(statistics.median(stepped) / statistics.median(plain), 4),
            "p99 / p99": round(summary(stepped)["p99 ms"] / summary(plain)["p99 ms"], 4),
            "begin ms": round(statistics.median(begins), 3),
            "moves": len(begins),
            "host ms of the last move": round(1e3 * mover.stats.seconds, 3),
        }
    return found
