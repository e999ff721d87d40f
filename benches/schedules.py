"""Times schedules beside PyTorch: generate and lower, verify, simulate.

    python benches/schedules.py [--repeats 30] [--no-torch] [--output benches/results/schedules.json]

One core, one process. PyTorch generates and lowers the same schedule once (it takes seconds); its
compute order is compared with ours, word for word. Medians and the 95th percentile of the
repetitions; the JSON says on which machine and commit.

- `order`: the compute order.
- `generate`: the compute order with its transfers placed, what PyTorch calls lowering.
- `verify`: the proof, under all three transports.
- `simulate`: the timeline with F = I = W = 1.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

import measuring
from dualpipe import Schedule
from eplb_rs import _core

if TYPE_CHECKING:
    from collections.abc import Callable

CASES = [("dualpipe", 8, 20), ("dualpipev", 8, 32), ("zbv", 16, 128), ("dualpipev", 64, 512)]
TORCH_CLASSES = {"dualpipev": "ScheduleDualPipeV", "zbv": "ScheduleZBVZeroBubble"}


def main() -> None:
    """Runs all cases."""
    parser = measuring.parser(__doc__, "schedules.json")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--no-torch", action="store_true", help="leave PyTorch out")
    options = parser.parse_args()
    measuring.pin()
    rows = []
    for method, ranks, micro_batches in CASES:
        row = ours(method, ranks, micro_batches, options.repeats)
        if method in TORCH_CLASSES and not options.no_torch:
            row |= torchs(method, ranks, micro_batches)
        rows.append(row)
        print_row(row)
    measuring.write(options.output, {"rows": rows}, options.commit)


def ours(method: str, ranks: int, micro_batches: int, repeats: int) -> dict[str, Any]:
    """Times of this library; the checks of the answers are not timed."""

    def native(transfers: bool) -> Callable[[], object]:
        return lambda: _core.Schedule.generate(method, ranks, micro_batches, None, False, transfers)

    schedule = Schedule.generate(method, ranks, micro_batches, check=False)
    calls: dict[str, Callable[[], object]] = {
        "order": native(transfers=False),
        "generate": native(transfers=True),
        "verify": schedule.verify,
        "simulate": schedule.simulate,
    }
    row: dict[str, Any] = {
        "method": method,
        "ranks": ranks,
        "micro_batches": micro_batches,
        "instructions": len(schedule),
    }
    for name, call in calls.items():
        times = sorted(us / 1e3 for us in measuring.samples(call, calls=repeats, warm_up=1))
        row[f"{name}_ms"] = statistics.median(times)
        row[f"{name}_p95_ms"] = times[min(int(0.95 * repeats), repeats - 1)]
    return row


class Stage:
    """What PyTorch's schedules ask of a stage when they are made."""

    def __init__(self, ranks: int, stages: int) -> None:
        """A stage of rank 0."""
        self.group, self.group_rank, self.group_size = None, 0, ranks
        self.num_stages, self.stage_index = stages, 0
        self.is_first = self.is_last = True
        self.has_backward, self.submod = True, None
        self.stage_index_to_group_rank: dict[int, int] = {}


def torchs(method: str, ranks: int, micro_batches: int) -> dict[str, Any]:
    """PyTorch's time to generate and lower the same schedule, and its order compared with ours."""
    import torch
    from torch.distributed.pipelining import schedules

    kind = getattr(schedules, TORCH_CLASSES[method])
    stages = [Stage(ranks, 2 * ranks) for _ in range(2)]
    start = time.perf_counter()
    made = kind(stages, micro_batches, loss_fn=torch.nn.functional.mse_loss)
    seconds = time.perf_counter() - start
    theirs = [
        ",".join(str(action) for action in made.pipeline_order[rank] if action is not None)
        for rank in range(ranks)
    ]
    order = Schedule.generate(method, ranks, micro_batches, check=False).to_csv()
    if order.splitlines() != theirs:
        sys.exit(f"{method}: PyTorch's compute order differs")
    lowered = sum(map(len, made.pipeline_order_with_comms.values()))
    return {
        "torch_ms": 1e3 * seconds,
        "torch_actions": lowered,
        "torch_version": torch.__version__,
    }


def print_row(row: dict[str, Any]) -> None:
    """One case on a line."""
    figures = "  ".join(
        f"{name} {row[f'{name}_ms']:.3f} ({row[f'{name}_p95_ms']:.3f})"
        for name in ("order", "generate", "verify", "simulate")
    )
    torch = ""
    if "torch_ms" in row:
        times = row["torch_ms"] / row["generate_ms"]
        torch = (
            f"  PyTorch {row['torch_ms']:.0f} for {row['torch_actions']} actions, {times:,.0f} x"
        )
    print(
        f"{row['method']} {row['ranks']} x {row['micro_batches']}: "
        f"{row['instructions']} instructions; ms: {figures}{torch}",
        flush=True,
    )


if __name__ == "__main__":
    main()
