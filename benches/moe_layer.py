"""Times an expert-parallel layer and moves of its experts on two GPUs.

    python benches/moe_layer.py [--rounds 20] [--plain] [--output benches/results/moe_layer.json]

Where there is one GPU, see `moe_one_gpu.py`.

DeepSeek-V3's experts (hidden 7168, intermediate 2048, 256 experts, 8 of them for each of 8,192
tokens a rank, bf16), one layer, forward and backward. Choices are drawn from the loads of two
layers of DeepSeek-R1, that which is least even on two ranks and a median one: each token chooses 8
experts, each expert with a probability as its load asks for. The *ideal* is the same layer under a
router that chooses each expert with the same probability.

*Before* is experts 0 to 127 on one GPU and the others on the other; *after*, the plan made from
that placement, to which an `ExpertMover` has moved the weights; *spare*, a plan with 144 slots a
GPU instead of 128. The cases take turns, and a ratio is the median over turns. A time is that of
the slower rank, from a common start to the end of its device's work.

Moves are compared with NCCL's send and receive of 256 MiB both ways at once. Between passes, every
second pass has a `mover.step()` before it that is counted with it, and waits at its end for what
that has begun.

Checked as it runs: rows of every slot as predicted; outputs and gradients of some tokens and of an
expert against a direct computation in float32; every expert's weights after every move.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import eplb_rs
import measuring
import torch
from eplb_rs.moe import ExpertMover, ExpertWeights, sum_replica_gradients
from moe_case import FULL, RANKS, TINY, Bench, Rank, captured, check, gpus, ratio, summary
from moe_moves import between_part, moves_part

if TYPE_CHECKING:
    import argparse

LIMIT_S = 240


def layer_part(bench: Bench) -> dict[str, Any]:
    """Step times before and after."""
    rank = bench.rank
    cases = {"ideal": bench.ideal}
    for name, load in zip(bench.chosen, bench.loads[1:], strict=True):
        cases[f"{name} before"] = bench.case(0, bench.weights, bench.old, load)
    mover = ExpertMover(bench.weights)
    mover.apply(bench.old, bench.new)
    bench.experts.check(bench.weights, bench.new.phy2log, rank.rank)
    slots = bench.weights.num_slots + bench.sizes.spare
    spare_plan = eplb_rs.Planner(eplb_rs.Topology(1, RANKS, slots)).plan(bench.loads[1:])
    spare = ExpertWeights(bench.experts.fields, num_layers=2, num_slots=slots, device=rank.device)
    bench.experts.fill(spare, spare_plan.phy2log, rank.rank)
    for number, (name, load) in enumerate(zip(bench.chosen, bench.loads[1:], strict=True)):
        cases[f"{name} after"] = bench.case(number + 1, bench.weights, bench.new, load)
        cases[f"{name} spare"] = bench.case(number, spare, spare_plan, load)
    found: dict[str, Any] = {
        "layers of DeepSeek-R1": bench.chosen,
        "max/mean of two ranks": bench.imbalance,
        "experts received by this rank": mover.stats.received,
        "cases": {name: check(rank, case, bench.experts) for name, case in cases.items()},
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    sums: dict[str, list[float]] = {name: [] for name in cases if "spare" in name}
    for number in range(bench.rounds + 3):
        for name, case in cases.items():
            took = rank.timed(case.step)
            if number >= 3:
                times[name].append(took)
            if name in sums and number < 10:
                grads = [{"gate_up": case.layer.gate_up.grad, "down": case.layer.down.grad}]
                sums[name].append(rank.timed(sum_replica_gradients, grads, case.plan))
            case.forget()
    for name, case in cases.items():
        entry = found["cases"][name]
        entry["step"] = summary(times[name])
        entry["step / ideal"] = ratio(times[name], times["ideal"])
        if name in sums:
            entry["sum of replicas' gradients ms"] = round(statistics.median(sums[name][3:]), 3)
            entry["experts with replicas"] = int((case.plan.logcnt > 1).sum())
    found["forward of the ideal"] = summary(
        [rank.timed(bench.ideal.forward) for _ in range(bench.rounds)]
    )
    if rank.device.type == "cuda":
        found["peak GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    mover.apply(bench.new, bench.old)
    return found


def graph_part(bench: Bench) -> dict[str, Any]:
    """The layer with a fixed capacity, captured in a CUDA graph."""
    rank, sizes = bench.rank, bench.sizes
    if rank.device.type != "cuda":
        return {}
    rows = sizes.tokens * sizes.top_k // RANKS * 9 // 8
    case = bench.case(0, bench.weights, bench.old, bench.loads[0], capacity=rows)
    graph = captured(case, bench.ideal)
    bench.ideal.forget()
    replays, plain = [], []
    for _ in range(bench.rounds):
        replays.append(rank.timed(graph.replay))
        plain.append(rank.timed(bench.ideal.step))
        bench.ideal.forget()
    return {
        "capacity": rows,
        "replay": summary(replays),
        "replay / ideal": ratio(replays, plain),
    }


def profile_part(bench: Bench) -> dict[str, Any]:
    """Which kernels take how long in a step of the ideal, in milliseconds."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as made:
        for _ in range(3):
            bench.ideal.step()
            bench.rank.wait()
    kernels = [
        (event.self_device_time_total / 3e3, event.count / 3, event.key[:90])
        for event in made.key_averages()
        if event.self_device_time_total > 0
    ]
    if bench.rank.rank == 0 and (trace := os.environ.get("TRACE")):
        made.export_chrome_trace(trace)
    return {
        "kernels": [
            f"{ms:.3f} ms, {count:g} x {name}" for ms, count, name in sorted(kernels)[:-40:-1]
        ]
    }


PARTS = {
    "layer": layer_part,
    "moves": moves_part,
    "between": between_part,
    "graph": graph_part,
    "profile": profile_part,
}


def worker(args: argparse.Namespace) -> None:
    folder = Path(args.folder)
    sizes = TINY if args.tiny else FULL
    rank = Rank(args.rank, RANKS, folder)
    bench = Bench(rank, sizes, args.rounds, fused=False if args.plain else None)
    found: dict[str, Any] = {}
    for name in args.parts:
        begun = time.monotonic()
        found[name] = PARTS[name](bench)
        print(f"{name}: {time.monotonic() - begun:.1f} s", flush=True)
        # What was found stands, should the next part fail.
        (folder / f"{args.rank}.json").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)


def launched(args: argparse.Namespace) -> dict[str, Any]:
    """What rank 0 has found; says what both have said, where one failed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--folder", folder, "--rounds", str(args.rounds)]
        command += ["--parts", *args.parts, *(["--tiny"] if args.tiny else [])]
        command += ["--plain"] if args.plain else []
        ranks = [
            subprocess.Popen(
                [*command, "--rank", str(rank)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(RANKS)
        ]
        end = time.monotonic() + args.limit_s
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < end:
            if any(rank.poll() for rank in ranks):
                end = min(end, time.monotonic() + 5)
            time.sleep(0.1)
        for number, rank in enumerate(ranks):
            rank.kill()
            said = rank.communicate()[0]
            if rank.returncode or number == 0:
                print(f"rank {number}:", said[-4000:])
        file = Path(folder) / "0.json"
        return json.loads(file.read_text()) if file.exists() else {}


def main() -> None:
    parser = measuring.parser(__doc__ or "", "moe_layer.json")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--parts", nargs="*", default=["layer", "moves", "between", "graph"],
                        choices=[*PARTS])  # fmt: skip
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="for all parts together")
    parser.add_argument("--tiny", action="store_true", help="tiny experts, to try the program")
    parser.add_argument("--plain", action="store_true", help="without the layer's triton kernels")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--folder")
    args = parser.parse_args()
    if args.rank is not None:
        worker(args)
        return
    results = launched(args)
    kind = {"gpus": gpus(), "kernels": "plain torch" if args.plain else "triton"}
    measuring.write(args.output, {**kind, "results": results}, args.commit)
    if missing := [part for part in args.parts if part not in results]:
        sys.exit(f"without {', '.join(missing)}, which failed")


if __name__ == "__main__":
    main()
