"""Plans for the window to come: the balance that plans made from the past reach in the next window.

    python benches/next_window.py [--only trace orders ...] [--output benches/results/next_window.json]

The trace: DeepSeek-V2-Lite, 26 layers of 64 experts, over texts of four domains, in 32 windows of
1,024 tokens. Each plan is made of windows up to one and scored on the next, 31 times. The score is
the mean over windows of (sum over layers of the mean rank load / sum over layers of the largest).
All placements are checked: every expert has a slot, and no layer moves more than it may.

- `trace`: plans of several windows, at most 25 % or 10 % of slots moved a step and layer, with
  DeepSeek's placements on the last window beside them; `short`: the same in 10 ms a step.
- `orders`: the domains in two other orders. `deepseek_r1`: planned on 1k in 1k out, scored on 1k8k.
- `fixed`: one placement for the even windows, scored on the odd ones; and splits fixed from the past.

Times are of the process, on one thread.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import eplb_rs
import measuring
import numpy as np
import numpy.typing as npt
from eplb_rs.loads import read_loads
from eplb_rs.scenarios import Outlook

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[1]
DATA = ROOT / "examples" / "data"

Loads = npt.NDArray[np.float32]
Split = Literal["uniform", "shares"]

SHAPES = ((72, 8), (80, 16), (96, 32))
SPLITS: tuple[Split, Split] = ("uniform", "shares")
# Even splits are cheap to judge.
ITERATIONS = {"uniform": 2000, "shares": 1000}
DOMAIN_WINDOWS = 8


def trace() -> Loads:
    """Windows of 1,024 tokens, `[32, 26, 64]`."""
    loads = read_loads(DATA / "esft_v2lite_load_history_w256.json").loads[:128]
    return loads.reshape(32, 4, *loads.shape[1:]).sum(axis=1).astype(np.float32)


def topology(slots: int, ranks: int) -> eplb_rs.Topology:
    return eplb_rs.Topology.from_totals(num_replicas=slots, num_nodes=1, num_gpus=ranks)


def largest(plan: eplb_rs.Plan, load: Loads, split: Split) -> float:
    """The sum over layers of the largest rank load."""
    judged = plan.with_shares(load) if split == "shares" else plan.with_load(load)
    return float(judged.rank_load.max(axis=1).sum())


def balance(plan: eplb_rs.Plan, load: Loads, split: Split) -> float:
    return float(load.sum()) / plan.topology.num_gpus / largest(plan, load, split)


def arrivals(plan: eplb_rs.Plan, previous: eplb_rs.Plan) -> npt.NDArray[np.int64]:
    """How many experts of each layer are on a rank that did not hold them, `[L]`."""
    ranks = plan.topology.num_gpus
    new = plan.phy2log.reshape(plan.num_layers, ranks, -1)
    old = previous.phy2log.reshape(plan.num_layers, ranks, -1)
    pairs = [zip(n.tolist(), o.tolist(), strict=True) for n, o in zip(new, old, strict=True)]
    return np.array([sum(len(set(n) - set(o)) for n, o in layer) for layer in pairs])


def replay(
    windows: Loads,
    make: Callable[[Loads, eplb_rs.Plan | None], eplb_rs.Plan],
    splits: tuple[Split, ...],
    most: float = 1.0,
) -> dict[str, Any]:
    """Plans for each next window and scores it there."""
    plan, seconds, moved = None, [], []
    scores: dict[str, list[float]] = {split: [] for split in splits}
    heaviest = dict.fromkeys(splits, 0.0)
    for window in range(1, len(windows)):
        start = time.process_time()
        new = make(windows[:window], plan)
        seconds.append(time.process_time() - start)
        assert (new.logcnt > 0).all(), "an expert has no slot"
        if plan is not None:
            moved.append(arrivals(new, plan) / new.topology.num_slots)
            assert moved[-1].max() <= most, "more moves than allowed"
        plan = new
        for split in splits:
            scores[split].append(balance(plan, windows[window], split))
            heaviest[split] += largest(plan, windows[window], split)
    assert plan is not None
    mean = float(windows[1:].sum()) / plan.topology.num_gpus
    shifted = np.arange(1, len(windows)) % DOMAIN_WINDOWS == 0
    return {
        "seconds_a_step": {
            "mean": round(float(np.mean(seconds)), 4),
            "largest": round(max(seconds), 4),
        },
        "slots_moved": {
            "mean": round(float(np.mean(moved)), 4),
            "largest": round(float(np.max(moved)), 4),
        },
        "splits": {
            split: {
                "score": round(float(np.mean(values)), 4),
                "sum over windows and layers": round(mean / heaviest[split], 4),
                "right after a shift": round(float(np.mean(np.array(values)[shifted])), 4),
                "other windows": round(float(np.mean(np.array(values)[~shifted])), 4),
            }
            for split, values in scores.items()
        },
    }


def forecast(
    slots: int, ranks: int, split: Split, fraction: float, **budget: Any
) -> Callable[[Loads, eplb_rs.Plan | None], eplb_rs.Plan]:
    """Plans of several windows, from the plan in force."""
    planner = eplb_rs.Planner(topology(slots, ranks), policy="balanced", **budget)
    moves = int(fraction * slots)

    def make(windows: Loads, plan: eplb_rs.Plan | None) -> eplb_rs.Plan:
        return planner.plan_windows(
            windows,
            previous=plan,
            max_moves_per_layer=None if plan is None else moves,
            split=split,
        )

    return make


def show(name: str, figures: dict[str, Any]) -> None:
    for split, of_split in figures["splits"].items():
        print(
            f"{name}, {split}: {of_split['score']:.4f}, in sum "
            f"{of_split['sum over windows and layers']:.4f}, after a shift "
            f"{of_split['right after a shift']:.4f}; moved {figures['slots_moved']['mean']:.1%}, "
            f"at most {figures['slots_moved']['largest']:.1%}; "
            f"{figures['seconds_a_step']['mean']:.3f} s a step",
            flush=True,
        )


def cases(windows: Loads, name: str, fractions: tuple[float, ...], **budget: Any) -> dict[str, Any]:
    results = {}
    for slots, ranks in SHAPES:
        for split in SPLITS:
            for fraction in fractions:
                steps = budget or {"iterations": ITERATIONS[split]}
                make = forecast(slots, ranks, split, fraction, **steps)
                case = f"{slots}/{ranks} {split}, at most {fraction:.0%} moved"
                results[case] = replay(windows, make, (split,), fraction) | {"budget": steps}
                show(f"{name}: {case}", results[case])
    return results


def of_trace() -> dict[str, Any]:
    windows = trace()
    results = cases(windows, "trace", (0.25, 0.1))
    for slots, ranks in SHAPES:
        planner = eplb_rs.Planner(topology(slots, ranks), policy="deepseek")
        case = f"{slots}/{ranks} DeepSeek, last window"
        results[case] = replay(windows, lambda past, _, p=planner: p.plan(past[-1]), SPLITS)
        show(f"trace: {case}", results[case])
    return results


def of_short() -> dict[str, Any]:
    return cases(trace(), "10 ms", (0.25,), time_limit_us=10_000)


def of_orders() -> dict[str, Any]:
    domains = trace().reshape(4, DOMAIN_WINDOWS, 26, 64)
    return {
        f"domains {order}": cases(
            domains[list(order)].reshape(32, 26, 64), f"domains {order}", (0.25,)
        )
        for order in ((2, 0, 3, 1), (3, 2, 1, 0))
    }


def of_deepseek_r1() -> dict[str, Any]:
    """Planned on one recording, scored on another: a shift that no window has shown."""
    paths = (DATA / "deepseek_r1_1k1k.json", DATA / "deepseek_r1_1k8k.json")
    before, after = (read_loads(path).total.astype(np.float32) for path in paths)
    machines = topology(288, 32)
    results: dict[str, Any] = {}
    reference = eplb_rs.Planner(machines, policy="deepseek").plan(before)
    planner = eplb_rs.Planner(machines, policy="balanced", iterations=300)
    for split in SPLITS:
        start = time.process_time()
        plan = planner.plan_windows(before[None], split=split)
        seconds = time.process_time() - start
        later = planner.plan_windows(
            np.stack([before, after]),
            previous=plan,
            max_moves_per_layer=28,
            split=split,
        )
        results[split] = {
            "DeepSeek": round(balance(reference, after, split), 4),
            "scenarios": round(balance(plan, after, split), 4),
            "scenarios, then 10 % moved": round(balance(later, after, split), 4),
            "seconds": round(seconds, 3),
        }
        print(f"DeepSeek-R1 1k1k to 1k8k, 288/32, {split}: {results[split]}", flush=True)
    return results


def of_fixed() -> dict[str, Any]:
    windows = trace()
    even, odd = windows[0::2], windows[1::2]
    results = {}
    for slots, ranks in SHAPES:
        planner = eplb_rs.Planner(topology(slots, ranks), policy="balanced", iterations=8000)
        start = time.process_time()
        calibration = Outlook(shift_threshold=None, most_windows=16, copies=16, spread=0.3)
        plan = planner.plan_windows(even, split="shares", outlook=calibration)
        seconds = time.process_time() - start
        fitting = np.mean([balance(plan, load, "shares") for load in odd])
        splits: dict[str, list[float]] = {"uniform": [], "last window": [], "mean so far": []}
        reference = eplb_rs.Planner(topology(slots, ranks), policy="deepseek")
        for window in range(1, len(windows)):
            load, past = windows[window], windows[:window]
            last = reference.plan(past[-1])
            splits["uniform"].append(last.with_load(load).balance)
            of_last = last.with_shares(past[-1]).applied_to(load)
            splits["last window"].append(of_last.balance)
            since = Outlook().since_shift(past)
            of_mean = last.with_shares(past[since:].mean(axis=0)).applied_to(load)
            splits["mean so far"].append(of_mean.balance)
        results[f"{slots}/{ranks}"] = {
            "even windows, scored on odd": round(float(fitting), 4),
            "seconds": round(seconds, 2),
            "splits fixed from the past, DeepSeek's placements": {
                name: round(float(np.mean(values)), 4) for name, values in splits.items()
            },
        }
        print(f"fixed: {slots}/{ranks}: {results[f'{slots}/{ranks}']}", flush=True)
    return results


PARTS = {
    "short": of_short,
    "fixed": of_fixed,
    "trace": of_trace,
    "deepseek_r1": of_deepseek_r1,
    "orders": of_orders,
}


def main() -> None:
    """Runs the parts and writes what they gave, each as soon as it is there."""
    parser = measuring.parser(__doc__ or "", "next_window.json")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    measuring.pin()
    results: dict[str, Any] = {}
    if options.output.exists():
        results = json.loads(options.output.read_text())
    for field in ("machine", "commit"):
        results.pop(field, None)
    for part in options.only:
        results[part] = PARTS[part]()
        measuring.write(options.output, results, options.commit)


if __name__ == "__main__":
    main()
