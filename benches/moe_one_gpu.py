"""What one GPU can show of an expert-parallel layer on two: each rank's share of it, in turn.

    python benches/moe_one_gpu.py [--rounds 24] [--output benches/results/moe_layer_one_gpu.json]

The layer of `moe_layer.py`, DeepSeek-V3's experts forward and backward under the same loads, plans
and draws. A rank's share is a layer of that rank's slots alone, each of which gets as many rows as
it gets among two ranks; copies in the GPU's memory stand for what would come over NVLink. The time
of a step is that of the slower share. The cases take turns, with the layer's triton kernels and in
plain torch, and a ratio is the median over turns.

Also: the phases of a pass; its grouped products beside torch's; the layer captured in a CUDA graph;
and moves within the GPU.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import tempfile
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import eplb_rs
import measuring
import numpy as np
import torch
from eplb_rs.moe import ExpertMover, ExpertWeights, predicted_tokens
from eplb_rs.moe.experts import Groups
from moe_case import (
    FULL,
    RANKS,
    TINY,
    Case,
    Experts,
    Rank,
    Sizes,
    captured,
    drawn,
    gpus,
    make_case,
    ratio,
    summary,
    two_loads,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from eplb_rs.moe import Pass
    from eplb_rs.moe.rows import RowFunctions
    from torch import Tensor

KERNELS = {"triton": None, "plain torch": False}
WARM_UP = 3


def rows_of_slots(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """For each case the rows that every slot of both ranks gets, `[2, S]`."""
    loads, chosen, _ = two_loads(sizes)
    slots = sizes.experts // RANKS
    in_order = np.tile(np.arange(sizes.experts), (len(loads), 1))
    old = eplb_rs.Plan.from_phy2log(eplb_rs.Topology(1, RANKS, slots), in_order, loads)
    new = eplb_rs.Planner(old.topology).plan(loads, previous=old)
    spare = eplb_rs.Planner(eplb_rs.Topology(1, RANKS, slots + sizes.spare)).plan(loads)
    kinds = {"ideal": (0, old)}
    for number, name in enumerate(chosen, 1):
        kinds |= {
            f"{name} before": (number, old),
            f"{name} after": (number, new),
            f"{name} spare": (number, spare),
        }
    rows = {}
    for name, (layer, plan) in kinds.items():
        counts = np.stack(
            [
                drawn(loads[layer], sizes, rank, device).flatten().cpu().bincount(
                    minlength=sizes.experts).numpy()
                for rank in range(RANKS)
            ]
        )  # fmt: skip
        one = eplb_rs.Plan.from_phy2log(
            plan.topology, plan.phy2log[layer : layer + 1], plan.expert_load[layer : layer + 1]
        )
        rows[name] = predicted_tokens(one, counts[None])[0].reshape(RANKS, -1)
    return rows


def share_of(rank: Rank, sizes: Sizes, held: ExpertWeights, rows: Any, **options: Any) -> Case:
    """A layer of one rank whose slots get so many rows."""
    number = len(rows)
    plan = eplb_rs.Plan.from_phy2log(
        eplb_rs.Topology(1, 1, number), np.arange(number)[None], np.ones((1, number))
    )
    ids = torch.from_numpy(np.repeat(np.arange(number), rows)).to(rank.device)
    generator = torch.Generator(rank.device).manual_seed(0)
    ids = ids[torch.randperm(len(ids), generator=generator, device=rank.device)]
    ids = torch.nn.functional.pad(ids, (0, -len(ids) % sizes.top_k), value=-1)
    chosen = ids.view(-1, sizes.top_k)
    weights = {name: tensor[:number] for name, tensor in held[0].items()}
    case = make_case(weights, plan, chosen, sizes, rank, **options)
    with torch.no_grad():
        made = case.layer.begin(case.x, case.gate_TK, case.expert_TK)
    assert made.rows_by_slot.tolist() == list(rows), "rows as predicted"
    return case


def shares(
    rank: Rank, sizes: Sizes, held: ExpertWeights, rows: dict[str, Any], rounds: int
) -> dict[str, Any]:
    """Step times of each case, by the slower of its two shares."""
    kinds = KERNELS if rank.device.type == "cuda" else {"plain torch": False}
    cases = {
        (how, name): [share_of(rank, sizes, held, own, fused=fused) for own in both]
        for how, fused in kinds.items()
        for name, both in rows.items()
    }
    times: dict[tuple[str, str], list[list[float]]] = {
        key: [[] for _ in range(RANKS)] for key in cases
    }
    order = list(cases)
    for number in range(rounds + WARM_UP):
        random.Random(number).shuffle(order)
        for key in order:
            for own, case in zip(times[key], cases[key], strict=True):
                took = rank.timed(case.step)
                case.forget()
                if number >= WARM_UP:
                    own.append(took)
    slower = {key: [max(pair) for pair in zip(*both, strict=True)] for key, both in times.items()}
    return {
        how: {
            name: {
                "rows": both.sum(axis=1).tolist(),
                "medians ms": [round(statistics.median(own), 3) for own in times[how, name]],
                "slower share": summary(slower[how, name]),
                "step / ideal": ratio(slower[how, name], slower[how, "ideal"]),
            }
            for name, both in rows.items()
        }
        for how in kinds
    }


def between_events(work: Callable[[], object], repeats: int = 1) -> float:
    """Milliseconds of the device."""
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    for _ in range(repeats):
        work()
    ended.record()
    ended.synchronize()
    return begun.elapsed_time(ended) / repeats


def phases(cases: dict[str, Case], rounds: int) -> dict[str, dict[str, float]]:
    """How long each phase of a pass takes on the device, with what it waits for the host: the
    phases follow one another without another wait."""
    times: dict[str, dict[str, list[float]]] = {how: {} for how in cases}
    for number in range(rounds + WARM_UP):
        for how, case in cases.items():
            torch.cuda.synchronize()
            events = {"from": torch.cuda.Event(enable_timing=True)}
            events["from"].record()
            for name, work in in_order(case):
                work()
                events[name] = torch.cuda.Event(enable_timing=True)
                events[name].record()
            torch.cuda.synchronize()
            for before, name in pairwise(events) if number >= WARM_UP else ():
                took = events[before].elapsed_time(events[name])
                times[how].setdefault(name, []).append(took)
    return {
        how: {name: round(statistics.median(each), 3) for name, each in own.items()}
        for how, own in times.items()
    }


def in_order(case: Case) -> Iterator[tuple[str, Callable[[], object]]]:
    """The phases of a pass, forward and backward."""
    made: list[Pass] = []

    def begin() -> None:
        with torch.no_grad():
            made.append(case.layer.begin(case.x, case.gate_TK, case.expert_TK))

    yield "begin", begin
    for name in ("dispatch", "experts", "combine", "output"):
        yield name, getattr(made[0], name)
    yield "combine_backward", lambda: made[0].combine_backward(case.grad)
    for name in ("experts_backward", "dispatch_backward", "weight_grads", "input_grad"):
        yield name, getattr(made[0], name)


def products(
    sizes: Sizes, held: ExpertWeights, rows: dict[str, Any], rounds: int, device: torch.device
) -> dict[str, Any]:
    """The six grouped products of a step, by the layer's kernels and by torch's, and one of 8,192
    cubed by torch: in 1e12 operations a second, rows that are filled up not counted."""
    from eplb_rs.moe import kernels
    from eplb_rs.moe import rows as plain

    gate_up, down = (tensor[: sizes.experts // RANKS] for tensor in held[0].values())
    step = kernels.step(gate_up)

    def random_rows(number: int, width: int) -> Tensor:
        return torch.randn(number, width, device=device, dtype=torch.bfloat16)

    most = max(int((-(-counts // step) * step).sum()) for counts in rows.values())
    x, inner, hidden = (
        random_rows(most, width)
        for width in (sizes.hidden, 2 * sizes.intermediate, sizes.intermediate)
    )
    big = random_rows(8192, 8192)

    def six(functions: RowFunctions, groups: Groups) -> list[Callable[[], Tensor]]:
        multiplied = partial(functions.product, groups=groups)
        summed = partial(functions.outer, groups=groups)
        return [
            partial(multiplied, x, gate_up, transposed=True),
            partial(multiplied, hidden, down, transposed=True),
            partial(multiplied, x, down, transposed=False),
            partial(multiplied, inner, gate_up, transposed=False),
            partial(summed, inner, x),
            partial(summed, x, hidden),
        ]

    equal: dict[str, list[bool]] = {}
    works: dict[tuple[str, str], list[Callable[[], object]]] = {
        ("8192 cubed", "torch"): [lambda: big @ big]
    }
    operations = {"8192 cubed": 2.0 * 8192**3}
    for name, counts in rows.items():
        operations[name] = 6.0 * int(counts.sum()) * (gate_up[0].numel() + down[0].numel())
        for how, functions, multiple in (("triton", kernels, step), ("torch", plain, 1)):
            filled = -(-counts // multiple) * multiple
            groups = Groups(torch.from_numpy(filled.cumsum()).int().to(device), filled, multiple)
            works[name, how] = six(functions, groups)
            if how == "triton":
                pairs = zip(works[name, how], six(plain, groups), strict=True)
                equal[name] = [same(int(filled.sum()), a(), b()) for a, b in pairs]
    times: dict[tuple[str, str], list[list[float]]] = {
        key: [[] for _ in w] for key, w in works.items()
    }
    order = list(works)
    for number in range(rounds + WARM_UP):
        random.Random(number).shuffle(order)
        for key in order:
            for own, work in zip(times[key], works[key], strict=True):
                took = between_events(work, 2)
                if number >= WARM_UP:
                    own.append(took)
    found = {}
    for (name, how), own in times.items():
        medians = [statistics.median(each) for each in own]
        found[f"{name}, {how}"] = {
            "ms": [round(median, 3) for median in medians],
            "all ms": round(sum(medians), 3),
            "TFLOP/s": round(operations[name] / sum(medians) / 1e9),
        }
    found["the same bits as torch's"] = {name: all(each) for name, each in equal.items()}
    return found


def same(rows: int, got: Tensor, wanted: Tensor) -> bool:
    """Whether all bits are, having made sure that the results are."""
    if got.ndim == 2:  # rows behind the last slot's are undefined
        got, wanted = got[:rows], wanted[:rows]
    assert float((got.float() - wanted.float()).norm() / wanted.float().norm()) < 1e-2
    return torch.equal(got, wanted)


def graph_part(
    rank: Rank, sizes: Sizes, held: ExpertWeights, rows: Any, rounds: int
) -> dict[str, Any]:
    """The ideal's share in a CUDA graph, beside its plain step."""
    plain = share_of(rank, sizes, held, rows)
    room = int(rows.sum()) * 33 // 32
    case = share_of(rank, sizes, held, rows, capacity=room)
    graph = captured(case, plain)
    replays, steps = [], []
    for _ in range(rounds):
        replays.append(rank.timed(graph.replay))
        steps.append(rank.timed(plain.step))
        plain.forget()
    return {
        "capacity": room,
        "rows": int(rows.sum()),
        "replay": summary(replays),
        "plain": summary(steps),
        "replay / plain": ratio(replays, steps),
    }


def moves(rank: Rank, sizes: Sizes, rounds: int) -> dict[str, Any]:
    """Every expert of eight layers to the next slot of the same GPU, beside a plain copy."""
    layers, slots = sizes.layers, sizes.experts // RANKS // sizes.layers
    experts = Experts(sizes, rank.device)
    weights = ExpertWeights(experts.fields, num_layers=layers, num_slots=slots, device=rank.device)
    numbers = np.tile(np.arange(slots), (layers, 1))
    topology, load = eplb_rs.Topology(1, 1, slots), np.ones(numbers.shape)
    plans = [
        eplb_rs.Plan.from_phy2log(topology, np.roll(numbers, by, axis=1), load) for by in (0, 1)
    ]
    experts.fill(weights, plans[0].phy2log, 0)
    source = torch.empty(1 << 31, dtype=torch.uint8, device=rank.device).random_()
    target = torch.empty_like(source)
    mover = ExpertMover(weights)
    took, copies = [], []
    for number in range(rounds + WARM_UP):
        one = rank.timed(mover.apply, *plans)
        two = rank.timed(target.copy_, source)
        plans.reverse()
        if number >= WARM_UP:
            took.append(one)
            copies.append(two)
    experts.check(weights, plans[0].phy2log, 0)
    size = weights.expert_bytes * slots * layers
    median, copy = statistics.median(took), statistics.median(copies)
    return {
        "experts": slots * layers,
        "GB": round(size / 1e9, 2),
        "ms": round(median, 3),
        # Out of the way and back: two copies of each.
        "GB/s copied": round(2 * size / median / 1e6, 1),
        "GB/s of a plain copy": round(source.numel() / copy / 1e6, 1),
        "of a plain copy": round(2 * size / median / (source.numel() / copy), 4),
    }


def main() -> None:
    parser = measuring.parser(__doc__ or "", "moe_layer_one_gpu.json")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--tiny", action="store_true", help="tiny experts, to try the program")
    args = parser.parse_args()
    sizes = TINY if args.tiny else FULL
    with tempfile.TemporaryDirectory() as folder:
        rank = Rank(0, 1, Path(folder))
        rows = rows_of_slots(sizes, rank.device)
        fields = Experts(sizes, rank.device).fields
        most = max(both.shape[1] for both in rows.values())
        held = ExpertWeights(fields, num_layers=1, num_slots=most, device=rank.device)
        for tensor in held[0].values():
            tensor.normal_(0, tensor.shape[2] ** -0.5)
        found: dict[str, Any] = {"step": shares(rank, sizes, held, rows, args.rounds)}
        if rank.device.type == "cuda":
            fuller = {name: both[both.sum(axis=1).argmax()] for name, both in rows.items()}
            found |= {
                "phases of the ideal, ms": phases(
                    {
                        how: share_of(rank, sizes, held, fuller["ideal"], fused=fused)
                        for how, fused in KERNELS.items()
                    },
                    args.rounds,
                ),
                "grouped products": products(
                    sizes,
                    held,
                    {name: fuller[name] for name in ("ideal", "worst after")},
                    args.rounds,
                    rank.device,
                ),
                "in a CUDA graph": graph_part(rank, sizes, held, fuller["ideal"], args.rounds),
            }
            del held
            torch.cuda.empty_cache()
        found["moves within the GPU"] = moves(rank, sizes, args.rounds)
    about = {"gpus": gpus(), "one GPU": "shares of two ranks in turn; nothing over a network"}
    measuring.write(args.output, {**about, "results": found}, args.commit)
    sys.stdout.flush()
    os._exit(0)  # NCCL's end is waited for in vain now and then


if __name__ == "__main__":
    main()
