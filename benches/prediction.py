"""Steps predicted from what was measured under another schedule."""

from __future__ import annotations

import os
import statistics
from typing import TYPE_CHECKING, Any

import numpy as np
from contenders import WARM_UP, make_contender
from dualpipe import Costs, Kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformer import Case

__all__ = ["predict"]


def alike(num_stages: int) -> dict[Kind, Sequence[int]]:
    """Stages of the same layers that do the same work: all but the last have no loss, and a
    weight part is the same everywhere. The first has no gradient of its input to compute."""
    return {
        Kind.F: range(num_stages - 1),
        Kind.B: range(1, num_stages - 1),
        Kind.I: range(1, num_stages - 1),
        Kind.W: range(num_stages),
    }


def spread(measured: Sequence[Costs], num_stages: int) -> Costs:
    """The medians of several steps' costs, with neighbouring stages put together.

    Args:
        measured: Costs of the same stages, in several steps.
        num_stages: How many stages to make of them; divides their number.
    """

    def together(values: Sequence[object]) -> np.ndarray:
        middle = np.median(np.array(values, dtype=np.float64), axis=0)
        return middle.reshape(num_stages, -1).sum(axis=1)

    return Costs(
        forward=together([costs.forward for costs in measured]),
        backward=together([costs.backward for costs in measured]),
        backward_input=together([costs.backward_input for costs in measured]),
        backward_weight=together([costs.backward_weight for costs in measured]),
        latency=np.median([costs.latency for costs in measured], axis=0),
        rank_factor=np.median([costs.rank_factor for costs in measured], axis=0),
    )


def predict(rank: Any, case: Case, rounds: int) -> dict[str, Any]:
    """Measured under DualPipeV alone, predicted for it and others, and compared."""
    made = {
        name: make_contender(name, case, rank.device, measure=True)
        for name in ("DualPipeV", "DualPipe", "1F1B", "ZBV")
    }
    for contender in made.values():
        for _ in range(WARM_UP):
            contender.step()
    measured: dict[str, list[float]] = {name: [] for name in made}
    costs = []
    for _ in range(rounds):
        made["DualPipeV"].step()
        report = made["DualPipeV"].executor.report()
        costs.append(report.costs_for_any_rank(alike(made["DualPipeV"].schedule.num_stages)))
        for name, contender in made.items():
            contender.step()
            measured[name].append(contender.executor.report().makespan_us / 1e3)
    found = {}
    for name, contender in made.items():
        given = spread(costs, contender.schedule.num_stages)
        timeline = contender.schedule.simulate(given, pairs="early_forward")
        middle = statistics.median(measured[name])
        found[name] = {
            "measured ms": round(middle, 3),
            "predicted ms": round(timeline.makespan / 1e3, 3),
            "predicted / measured": round(timeline.makespan / 1e3 / middle, 4),
        }
    found["slower than the average rank"] = [
        round(float(f), 4) for f in np.median([c.rank_factor for c in costs], axis=0)
    ]
    report = made["DualPipeV"].executor.report()
    if rank.rank == 0 and (out := os.environ.get("TRACE")):
        report.to_perfetto(out)
    found["report"] = str(report)
    for contender in made.values():
        contender.close()
    return found
