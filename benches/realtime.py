"""Times plans of one layer from the exact load of a micro-batch, beside UltraEP's answers.

    python benches/realtime.py [--calls 400] [--output benches/results/realtime.json]

One thread, pinned to one core; each of the 40 layers is planned alone, from tokens by source rank,
with quotas by source rank. Every plan is added up again. UltraEP's answers were recorded on an H200.

- `imbalance`, `copies`: with all spare slots to use.
- `copies at UltraEP's balance`: with its imbalance as the target.
- `curve`: copies at targets from 1 to 1.2.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import measuring
import numpy as np
import numpy.typing as npt
from eplb_rs.realtime import Step, StepLimits, StepPlanner
from measuring import quantiles, samples

GOLDEN = measuring.ROOT / "tests" / "data" / "realtime_golden.npz"
TARGETS = (1.0, 1.002, 1.005, 1.01, 1.02, 1.03, 1.05, 1.1, 1.2)
NAMES = {"dsr1": "DeepSeek-R1", "lognormal1": "log-normal"}


class Case(NamedTuple):
    """A layer, and UltraEP's answer."""

    kind: str
    load: npt.NDArray[np.int32]
    shape: tuple[int, int, int]
    """Ranks, home slots, spare slots."""
    peer_level: int
    peer_copies: int


def read_cases() -> list[Case]:
    """All cases of the file."""
    cases = []
    with np.load(GOLDEN) as file:
        for index in range(len(file.files) // 5):
            ranks, home, spare = (int(n) for n in file[f"{index}/args"])
            slots, quota = file[f"{index}/log2phy"], file[f"{index}/quota"]
            used = slots >= 0
            carried = np.bincount(slots[used] // (home + spare), quota[used], ranks)
            load = np.ascontiguousarray(file[f"{index}/load"], dtype=np.int32)
            kind = f"{ranks} x ({home}+{spare}) {NAMES[str(file[f'{index}/kind'])]}"
            copies = int(used[:, 1:].sum())
            cases.append(Case(kind, load, (ranks, home, spare), int(carried.max()), copies))
    return cases


def check(case: Case, step: Step) -> None:
    """Ends the program if a plan does not add up."""
    ranks, home, spare = case.shape
    totals = case.load.sum(axis=0, dtype=np.int64)
    used = step.experts >= 0
    left = totals - np.bincount(step.experts[used], step.tokens[used], len(totals))
    carried = left.reshape(ranks, home).sum(axis=1) + step.tokens.sum(axis=1)
    assert step.by_source is not None
    sent = np.zeros(case.load.shape, dtype=np.int64)
    for rank, slot in zip(*np.nonzero(used), strict=True):
        sent[:, step.experts[rank, slot]] += step.by_source[rank, slot]
    sound = (
        (left >= 0).all()
        and carried.max() == step.level
        and used.sum() == step.num_copies
        and (step.by_source.sum(axis=2) == step.tokens).all()
        and (sent <= case.load).all()
        and spare == step.experts.shape[1]
    )
    if not sound:
        raise SystemExit(f"{case.kind}: a plan that does not add up")


def planned(case: Case, target: float = 1.0) -> Step:
    """A plan, checked."""
    planner = StepPlanner(*case.shape, limits=StepLimits(target_imbalance=target))
    step = planner.plan(case.load)
    check(case, step)
    return step


def rust_times(program: str, case: Case, file: Path, calls: int, level: int) -> list[float]:
    """The times of calls of the Rust program."""
    case.load.astype("<i4").tofile(file)
    command = [program, "realtime", str(file), *map(str, case.shape), str(calls)]
    output = subprocess.run(command, check=True, capture_output=True, text=True)
    result = json.loads(output.stdout)
    if result["level"] != level:
        raise SystemExit(f"{case.kind}: the Rust program found another plan")
    times: list[float] = result["us"]
    return times


def python_times(case: Case, calls: int) -> list[float]:
    """The times of calls of `plan_into`."""
    planner = StepPlanner(*case.shape)
    buffers = planner.allocate()
    return samples(lambda: planner.plan_into(case.load, buffers), calls=calls)


def main() -> None:
    """Runs all cases, prints a line for each kind and writes the file."""
    parser = measuring.parser(__doc__, "realtime.json")
    parser.add_argument("--calls", type=int, default=400, help="per layer")
    options = parser.parse_args()
    measuring.pin()
    program = measuring.build("step")

    rows: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for case in read_cases():
            mean = case.load.sum(dtype=np.int64) / case.shape[0]
            best = planned(case)
            # Half a token more: a target is a fraction, and its product is rounded down.
            as_peer = planned(case, max(1.0, (case.peer_level + 0.5) / mean))
            if as_peer.level > case.peer_level:
                raise SystemExit(f"{case.kind}: above UltraEP's balance")
            file = Path(folder) / "load"
            rows[case.kind].append(
                {
                    "imbalance": best.imbalance,
                    "copies": best.num_copies,
                    "peer_imbalance": case.peer_level / mean,
                    "peer_copies": case.peer_copies,
                    "copies_at_peer": as_peer.num_copies,
                    "curve": [
                        (step.imbalance, step.num_copies)
                        for step in (planned(case, target) for target in TARGETS)
                    ],
                    "rust": rust_times(program, case, file, options.calls, best.level),
                    "python": python_times(case, options.calls),
                }
            )

    kinds = []
    for kind, cases in rows.items():

        def mean_of(name: str, cases: list[dict[str, Any]] = cases) -> float:
            return round(float(np.mean([case[name] for case in cases])), 5)

        curve = np.mean([case["curve"] for case in cases], axis=0)
        kinds.append(
            {
                "kind": kind,
                "cases": len(cases),
                "imbalance": mean_of("imbalance"),
                "worst_imbalance": round(max(case["imbalance"] for case in cases), 5),
                "copies": mean_of("copies"),
                "ultraep_imbalance": mean_of("peer_imbalance"),
                "ultraep_copies": mean_of("peer_copies"),
                "copies_at_ultraep_balance": mean_of("copies_at_peer"),
                "curve": [
                    {"target": target, "imbalance": round(imbalance, 5), "copies": round(copies, 2)}
                    for target, (imbalance, copies) in zip(TARGETS, curve.tolist(), strict=True)
                ],
                "rust": quantiles([us for case in cases for us in case["rust"]]),
                "python": quantiles([us for case in cases for us in case["python"]]),
            }
        )
        last = kinds[-1]
        print(
            f"{kind:24} imbalance {last['imbalance']:.4f} (UltraEP {last['ultraep_imbalance']:.4f})"
            f", copies {last['copies']:.1f}, at UltraEP's balance "
            f"{last['copies_at_ultraep_balance']:.1f} ({last['ultraep_copies']:.1f}); Rust median "
            f"{last['rust']['median_us']:.1f} us, p99 {last['rust']['p99_us']:.1f} us"
        )
    print("\ncopies at target".ljust(26) + "".join(f"{target:8}" for target in TARGETS))
    for kind in kinds:
        points = kind["curve"]
        print(f"{kind['kind']:25}" + "".join(f"{point['copies']:8.1f}" for point in points))
    every = [case for cases in rows.values() for case in cases]
    totals = {
        "rust": quantiles([us for case in every for us in case["rust"]]),
        "python": quantiles([us for case in every for us in case["python"]]),
        "ultraep_copies": sum(case["peer_copies"] for case in every),
        "copies_at_ultraep_balance": sum(case["copies_at_peer"] for case in every),
    }
    fewer = 1 - totals["copies_at_ultraep_balance"] / totals["ultraep_copies"]
    print(
        f"\nall: Rust median {totals['rust']['median_us']} us, p99 {totals['rust']['p99_us']} us; "
        f"Python median {totals['python']['median_us']} us, p99 {totals['python']['p99_us']} us; "
        f"{fewer:.1%} fewer copies at UltraEP's balance"
    )
    measuring.write(options.output, {"all": totals, "kinds": kinds}, options.commit)


if __name__ == "__main__":
    main()
