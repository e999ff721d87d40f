"""Writes the tables of docs/schedules.md from the simulator and the benchmark.

    python benches/schedule_tables.py [--check]

`--check` writes nothing and fails where the page is not what the simulator says.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from dualpipe import Costs, Schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAGE = Path(__file__).parents[1] / "docs" / "schedules.md"
RESULTS = Path(__file__).with_name("results") / "schedules.json"
RANKS = (2, 4, 8, 16, 32)


def main() -> None:
    """Rewrites, or checks, every marked table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    options = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    written = with_tables(page)
    if options.check:
        sys.exit(0 if written == page else f"{PAGE.name} is not what the simulator says")
    PAGE.write_text(written, encoding="utf-8")


def with_tables(page: str) -> str:
    """The page with its tables made anew."""
    for name, table in TABLES.items():
        before, begin, rest = page.partition(f"<!-- table: {name} -->\n")
        _, end, after = rest.partition("<!-- end -->\n")
        if not (begin and end):
            sys.exit(f"{PAGE.name} has no table {name!r}")
        page = "".join([before, begin, *(f"{line}\n" for line in table()), end, after])
    return page


def row(*cells: object) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def bubbles() -> Iterator[str]:
    """Bubble, parameters and activations against the formulae, F = W = 1, B = 2, FB = F + B."""
    formulae = {
        "1f1b": ("(PP-1)(F+B)", lambda pp: 3 * (pp - 1)),
        "zb_h1": ("(PP-1)(F+B-2W)", lambda pp: pp - 1),
        "dualpipe": ("(PP/2-1)(FB+B-3W)", lambda pp: 2 * (pp / 2 - 1)),
        "dualpipev": ("(PP/2-1)(FB+B-3W)", lambda pp: 2 * (pp / 2 - 1)),
    }
    yield row(
        "schedule",
        "ranks P",
        "stages PP",
        "formula",
        "says",
        "simulated",
        "parameters",
        "activations",
    )
    yield row("---", "--:", "--:", "---", "--:", "--:", "--:", "--:")
    for method, (formula, value) in formulae.items():
        for p in RANKS:
            schedule = Schedule.generate(method, p, 4 * p)
            timeline = schedule.simulate()
            held = schedule.num_stages * schedule.num_copies // p
            yield row(
                f"`{method}`",
                p,
                schedule.num_stages,
                formula,
                f"{value(schedule.num_stages):g}",
                f"{timeline.bubble:g}",
                f"{held}x",
                timeline.peaks.activations.max(),
            )


def overview() -> Iterator[str]:
    """Every schedule on eight ranks with the same work a rank."""
    yield row(
        "schedule", "step", "bubble", "activations", "receive buffers", "send buffers", "weights"
    )
    yield row("---", "--:", "--:", "--:", "--:", "--:", "--:")
    for method in METHODS_IN_ORDER:
        schedule = Schedule.generate(method, 8, 32)
        parts = schedule.num_stages // 8
        unit = 1 / parts
        costs = Costs(forward=unit, backward_input=unit, backward_weight=unit)
        timeline = schedule.simulate(costs)
        peaks = timeline.peaks
        yield row(
            f"`{method}`",
            f"{timeline.makespan:g}",
            f"{timeline.bubble_ratio:.1%}",
            f"{peaks.activations.max() / parts:g}",
            peaks.receive_buffers.max(),
            peaks.send_buffers.max(),
            f"{schedule.num_copies}x",
        )


METHODS_IN_ORDER = (
    "gpipe",
    "looped_bfs",
    "1f1b",
    "interleaved_1f1b",
    "interleaved_zero_bubble",
    "zb_h1",
    "zb_h2",
    "zbv",
    "v_half",
    "v_min",
    "chimera",
    "dualpipe",
    "dualpipev",
)


def overlap() -> Iterator[str]:
    """Below which overlap factor DualPipeV beats ZBV on eight ranks."""
    yield row("latency", *(f"{m} micro-batches" for m in (16, 32, 64)))
    yield row("--:", "--:", "--:", "--:")
    for latency in (0.0, 0.05):
        yield row(latency, *(f"{crossing(m, latency):.3f}" for m in (16, 32, 64)))


def crossing(m: int, latency: float) -> float:
    """The overlap factor at which the two take the same time."""
    zbv = Schedule.generate("zbv", 8, m).compute_only()
    dualpipev = Schedule.generate("dualpipev", 8, m).compute_only()
    rival = zbv.simulate(Costs(latency=latency)).makespan
    low, high = 0.5, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        time = dualpipev.simulate(Costs(latency=latency, overlap_factor=middle)).makespan
        low, high = (middle, high) if time < rival else (low, middle)
    return low


def uneven() -> Iterator[str]:
    """Eight ranks, 32 micro-batches, first and last of 16 stages 30 % longer."""
    methods = ("zbv", "dualpipev", "interleaved_zero_bubble")
    times = np.ones(16)
    times[[0, -1]] = 1.3
    yield row("latency", *(f"`{method}`" for method in methods))
    yield row("--:", "--:", "--:", "--:")
    for latency in (0.0, 0.05):
        costs = Costs(forward=times, backward_input=times, backward_weight=times, latency=latency)
        steps = (
            Schedule.generate(method, 8, 32).compute_only().simulate(costs).makespan
            for method in methods
        )
        yield row(latency, *(f"{step:.2f}" for step in steps))


def cost() -> Iterator[str]:
    """The last run of schedules.py that was kept."""
    kept = json.loads(RESULTS.read_text(encoding="utf-8"))
    yield row("schedule", "instructions", "generate", "verify", "simulate", "PyTorch, generate")
    yield row("---", "--:", "--:", "--:", "--:", "--:")
    for case in kept["rows"]:
        torch = f"{case['torch_ms']:,.0f}" if "torch_ms" in case else "-"
        yield row(
            f"`{case['method']}`, {case['ranks']} ranks x {case['micro_batches']}",
            f"{case['instructions']:,}",
            *(
                f"{case[f'{name}_ms']:.3g} ({case[f'{name}_p95_ms']:.3g})"
                for name in ("generate", "verify", "simulate")
            ),
            torch,
        )
    version = next(case["torch_version"] for case in kept["rows"] if "torch_version" in case)
    yield ""
    machine = kept["machine"]
    yield f"{machine['cpu']}; {machine['python']}, PyTorch {version.partition('+')[0]}."


TABLES: dict[str, Callable[[], Iterator[str]]] = {
    "bubbles": bubbles,
    "overview": overview,
    "overlap": overlap,
    "uneven": uneven,
    "cost": cost,
}

if __name__ == "__main__":
    main()
