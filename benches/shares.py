"""Times the exact split of tokens over replicas, and checks it against its certificate.

    python benches/shares.py [--calls 400] [--output benches/results/shares.json]

One thread, pinned to one core. DeepSeek's placements, made for one load and split for another:
58 x 256 experts, log-normal, every load then off by 10 % (log-normal), and DeepSeek-R1's recorded
loads, off by as much. Each answer is checked: no rank above the level, and a set of ranks that
holds experts of that mean alone.

- `whole`: all layers from `phy2log`, `prepared`: all layers, the placement prepared once, `step`: one
  layer at a time, prepared. In Rust.
- `python`: the same, `Splitter.split_into` and `Splitter.split_step` with buffers given.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import eplb_rs
import measuring
import numpy as np
import numpy.typing as npt
from eplb_rs.shares import Splitter
from measuring import deepseek_r1, quantiles, samples

if TYPE_CHECKING:
    from collections.abc import Iterator

SHAPES = ((288, 32), (320, 64), (512, 64))


def check(plan: eplb_rs.Plan, load: npt.NDArray[np.float32]) -> None:
    """Ends the program if a split is not feasible or its certificate not a proof."""
    shares = Splitter(plan).split(load)
    num_layers, num_slots = plan.phy2log.shape
    ranks = np.arange(num_slots) * plan.topology.num_gpus // num_slots
    for layer in range(num_layers):
        experts, row = plan.phy2log[layer], load[layer].astype(np.float64)
        sums = np.bincount(experts, shares.by_slot[layer])
        carried = np.bincount(ranks, shares.by_slot[layer] * row[experts])
        level, tight = shares.lower_bound[layer], shares.tight[layer]
        outside = np.zeros(len(row), dtype=bool)
        outside[experts[~tight[ranks]]] = True
        proven = row[~outside].sum() / tight.sum()
        feasible = np.allclose(sums, 1) and carried.max() <= level * (1 + 1e-9)
        if not feasible or level > proven * (1 + 1e-9):
            raise SystemExit(f"layer {layer}: not the best split")


def cases() -> Iterator[tuple[str, npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
    """A name, the load to plan for and the load to split."""
    rng = np.random.default_rng(0)
    made = np.round(rng.lognormal(0, 1, (58, 256)) * 1000).astype(np.float32)
    for name, load in (("log-normal", made), ("DeepSeek-R1", deepseek_r1())):
        noise = np.exp(0.1 * rng.standard_normal(load.shape))
        yield name, load, (load * noise).astype(np.float32)


def measure(
    program: str,
    folder: Path,
    plan: eplb_rs.Plan,
    load: npt.NDArray[np.float32],
    calls: int,
) -> dict[str, Any]:
    """The figures of a plan and a load."""
    check(plan, load)
    splitter = Splitter(plan)
    by_slot, level = np.empty(plan.phy2log.shape), np.empty(len(load))
    prepared = samples(lambda: splitter.split_into(load, by_slot, level), calls=calls)
    row = np.empty(by_slot.shape[1])
    steps: list[float] = []
    for layer, one in enumerate(load):

        def step(one: npt.NDArray[np.float32] = one, layer: int = layer) -> object:
            return splitter.split_step(one, layer=layer, out=row)

        steps += samples(step, calls=calls)

    load.astype("<f4").tofile(folder / "loads")
    plan.phy2log.astype("<i8").tofile(folder / "slots")
    sizes = (*load.shape, by_slot.shape[1], plan.topology.num_gpus, calls)
    command = [program, "split", folder / "loads", folder / "slots", *map(str, sizes)]
    output = subprocess.run(command, check=True, capture_output=True, text=True)
    rust = json.loads(output.stdout)
    if not np.array_equal(rust["levels"], level):
        raise SystemExit("the Rust program found other levels")
    shares = splitter.split(load)
    return {
        "balance": {
            "uniform": round(splitter.uniform(load).balance, 4),
            "shares fixed from the old load": round(
                splitter.split(plan.expert_load).applied_to(load).balance, 4
            ),
            "shares": round(shares.balance, 4),
        },
        "rust": {name: quantiles(rust[name]) for name in ("whole", "prepared", "step")},
        "python": {"prepared": quantiles(prepared), "step": quantiles(steps)},
    }


def main() -> None:
    """Runs all cases, prints a line for each and writes the file."""
    parser = measuring.parser(__doc__, "shares.json")
    parser.add_argument("--calls", type=int, default=400, help="per figure")
    options = parser.parse_args()
    measuring.pin()
    program = measuring.build("step")
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, planned, load in cases():
            for slots, ranks in SHAPES:
                topology = eplb_rs.Topology.from_totals(
                    num_replicas=slots, num_nodes=1, num_gpus=ranks
                )
                plan = eplb_rs.Planner(topology, policy="deepseek").plan(planned)
                figures = measure(program, Path(folder), plan, load, options.calls)
                case = {"name": name, "layers": len(load), "slots": slots, "ranks": ranks}
                results.append(case | figures)
                rust, python = figures["rust"], figures["python"]
                print(
                    f"{name:11} {len(load)} x {slots}/{ranks}: balance "
                    f"{figures['balance']['uniform']:.4f} -> {figures['balance']['shares']:.4f}; "
                    f"median us: whole {rust['whole']['median_us']:.0f}, "
                    f"prepared {rust['prepared']['median_us']:.0f}, "
                    f"step {rust['step']['median_us']:.1f} (p99 {rust['step']['p99_us']:.1f}), "
                    f"step in Python {python['step']['median_us']:.1f}",
                    flush=True,
                )
    measuring.write(options.output, {"cases": results}, options.commit)


if __name__ == "__main__":
    main()
