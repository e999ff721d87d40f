"""What one GPU can show of an expert-parallel layer on two: each rank's share of it, in turn.

    python benches/moe_one_gpu.py [--rounds 10] [--output benches/results/moe_layer_one_gpu.json]

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
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import eplb_rs
import measuring
import numpy as np
import torch
from eplb_rs.moe import ExpertMover, ExpertWeights, predicted_tokens
from moe_case import (
    FULL,
    RANKS,
    TINY,
    Case,
    Experts,
    Rank,
    Sizes,
    drawn,
    gpus,
    make_case,
    ratio,
    summary,
    two_loads,
)

if TYPE_CHECKING:
    from collections.abc import Callable

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


def phases(case: Case, rounds: int) -> dict[str, float]:
    """How long each phase of a pass takes on the device, with what it waits for the host: the
    phases follow one another without another wait."""
    layer, found = case.layer, {}
    for number in range(rounds + WARM_UP):
        events = {}

        def mark(name: str, events: dict[str, Any] = events) -> None:
            events[name] = torch.cuda.Event(enable_timing=True)
            events[name].record()

        torch.cuda.synchronize()
        mark("from")
        with torch.no_grad():
            made = layer.begin(case.x, case.gate_TK, case.expert_TK)
        mark("begin")
        for phase in ("dispatch", "experts", "combine", "output"):
            getattr(made, phase)()
            mark(phase)
        made.combine_backward(case.grad)
        mark("combine_backward")
        for phase in ("experts_backward", "dispatch_backward", "weight_grads", "input_grad"):
            getattr(made, phase)()
            mark(phase)
        torch.cuda.synchronize()
        for before, name in pairwise(events):
            if number >= WARM_UP:
                took = events[before].elapsed_time(events[name])
                found.setdefault(name, []).append(took)
    return {name: round(statistics.median(took), 3) for name, took in found.items()}


def products(
    sizes: Sizes, held: ExpertWeights, rows: Any, rounds: int, device: torch.device
) -> dict[str, Any]:
    """The six grouped products of a step, by the layer's kernels and by torch's, and one of 8,192
    cubed by torch: in 1e12 operations a second, rows that are filled up not counted."""
    from eplb_rs.moe import kernels
    from eplb_rs.moe import rows as plain
    from eplb_rs.moe.experts import Groups

    gate_up, down = (tensor[: len(rows)] for tensor in held[0].values())
    step = kernels.step(gate_up)
    filled = -(-rows // step) * step

    def random_rows(width: int) -> torch.Tensor:
        return torch.randn(int(filled.sum()), width, device=device, dtype=torch.bfloat16)

    x, inner, hidden = map(random_rows, (sizes.hidden, 2 * sizes.intermediate, sizes.intermediate))

    def groups(counts: Any, multiple: int) -> Groups:
        ends = torch.from_numpy(counts.cumsum()).int().to(device)
        return Groups(ends, counts.tolist(), multiple)

    big = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    works: dict[tuple[str, str], Callable[[], object]] = {
        ("one product", "8192 cubed"): lambda: big @ big
    }
    operations = {"8192 cubed": 2 * 8192**3}
    for how, functions, own in (
        ("triton", kernels, groups(filled, step)),
        ("torch", plain, groups(rows, 1)),
    ):
        calls = {
            "gate_up": lambda f=functions, g=own: f.product(x, gate_up, g, transposed=True),
            "down": lambda f=functions, g=own: f.product(hidden, down, g, transposed=True),
            "down, of hidden": lambda f=functions, g=own: f.product(x, down, g, transposed=False),
            "gate_up, of rows": lambda f=functions, g=own: f.product(
                inner, gate_up, g, transposed=False
            ),
            "gate_up, of weights": lambda f=functions, g=own: f.outer(inner, x, g),
            "down, of weights": lambda f=functions, g=own: f.outer(x, hidden, g),
        }
        for name, call in calls.items():
            works[how, name] = call
            matrix = gate_up if "gate_up" in name else down
            operations[name] = 2 * int(rows.sum()) * matrix[0].numel()
    times: dict[tuple[str, str], list[float]] = {key: [] for key in works}
    order = list(works)
    for number in range(rounds + WARM_UP):
        random.Random(number).shuffle(order)
        for key in order:
            took = between_events(works[key], 2)
            if number >= WARM_UP:
                times[key].append(took)
    found: dict[str, Any] = {}
    whole: dict[str, float] = {}
    for (how, name), took in times.items():
        median = statistics.median(took)
        rate = operations[name] / median / 1e9
        found.setdefault(how, {})[name] = {"ms": round(median, 3), "TFLOP/s": round(rate)}
        whole[how] = whole.get(how, 0.0) + median
    for how in ("triton", "torch"):
        found[how]["all"] = {
            "ms": round(whole[how], 3),
            "TFLOP/s": round(sum(operations[n] for h, n in works if h == how) / whole[how] / 1e9),
        }
    return found


def captured(
    rank: Rank, sizes: Sizes, held: ExpertWeights, rows: Any, rounds: int
) -> dict[str, Any]:
    """The ideal's share in a CUDA graph, beside its plain step."""
    plain = share_of(rank, sizes, held, rows)
    room = int(rows.sum()) * 33 // 32
    case = share_of(rank, sizes, held, rows, capacity=room)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            case.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.step()
    graph.replay()
    case.layer.raise_on_overflow()
    assert torch.equal(out, plain.step())
    assert plain.x.grad is not None
    assert torch.equal(case.x.grad, plain.x.grad)
    assert torch.equal(case.layer.down.grad, plain.layer.down.grad)
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
    parser.add_argument("--rounds", type=int, default=10)
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
                "phases of the ideal, ms": {
                    how: phases(
                        share_of(rank, sizes, held, fuller["ideal"], fused=fused), args.rounds
                    )
                    for how, fused in KERNELS.items()
                },
                "grouped products": {
                    name: products(sizes, held, fuller[name], args.rounds, rank.device)
                    for name in ("ideal", "worst after")
                },
                "in a CUDA graph": captured(rank, sizes, held, fuller["ideal"], args.rounds),
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
