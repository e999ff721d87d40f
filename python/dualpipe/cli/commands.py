"""What each command does."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import dualpipe
from dualpipe import METHODS, Costs, Layers, Machine, Schedule, ScheduleError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from dualpipe import Candidate, Timeline

__all__ = ["export", "search", "show", "simulate", "verify"]


def _schedule(options: argparse.Namespace, *, check: bool = True) -> Schedule:
    path = Path(options.schedule)
    if path.suffix or path.is_file():
        for option in ("ranks", "micro_batches", "stages_per_rank"):
            if getattr(options, option) is not None:
                raise ScheduleError(
                    code="usage",
                    argument=f"--{option.replace('_', '-')}",
                    got=f"{getattr(options, option)} with a file",
                    expected="left out, since the file says it",
                )
        schedule = Schedule.load(path, check=check)
        return schedule.forward_only() if options.forward_only else schedule
    if options.ranks is None or options.micro_batches is None:
        raise ScheduleError(
            code="usage",
            argument="schedule",
            got=options.schedule,
            expected="a file, or a method with --ranks and --micro-batches",
            hint=f"methods: {', '.join(METHODS)}",
        )
    return Schedule.generate(
        options.schedule,
        options.ranks,
        options.micro_batches,
        stages_per_rank=options.stages_per_rank,
        forward_only=options.forward_only,
        check=check,
    )


def show(options: argparse.Namespace) -> None:
    """Draws a schedule, as a grid of words or into a file."""
    from dualpipe.draw import grid

    schedule = _schedule(options)
    timeline = schedule.simulate()
    if options.plot:
        timeline.plot(options.plot)
        print(options.plot)
    elif options.text:
        print(schedule.text(), end="")
    else:
        print(grid(timeline))
        print(f"\n{schedule!r}\nmakespan {timeline.makespan:g}, bubble {timeline.bubble_ratio:.1%}")


def simulate(options: argparse.Namespace) -> None:
    """Says how long a step takes, and what every rank holds."""
    schedule = _schedule(options)
    stages = schedule.num_stages
    costs = Costs(
        forward=_spread(options.forward, stages, "forward"),
        backward_input=_spread(options.input, stages, "input"),
        backward_weight=_spread(options.weight, stages, "weight"),
        overlap_factor=options.overlap,
        latency=options.latency,
    )
    timeline = schedule.simulate(costs, sends=options.sends, pairs=options.pairs)
    if options.plot:
        timeline.plot(options.plot)
    if options.perfetto:
        timeline.to_perfetto(options.perfetto)
    if options.json:
        print(json.dumps(_figures(timeline)))
        return
    peaks = timeline.peaks
    print(f"{schedule!r}")
    print(f"makespan {timeline.makespan:g}   bubble {timeline.bubble_ratio:.2%}")
    print("rank      busy      idle  activations  kept  receive buffers  send buffers")
    for rank in range(schedule.num_ranks):
        print(
            f"{rank:4} {timeline.busy[rank]:9g} {timeline.idle[rank]:9g}  "
            f"{peaks.activations[rank]:11} {peaks.kept[rank]:5} "
            f"{peaks.receive_buffers[rank]:16} {peaks.send_buffers[rank]:13}"
        )
    print(
        "not modelled: launches, reductions, the optimizer, interference of transfers with "
        "computation, shared links"
    )


def _figures(timeline: Timeline) -> dict[str, object]:
    peaks = timeline.peaks
    return {
        "schedule": timeline.schedule.name,
        "num_ranks": timeline.schedule.num_ranks,
        "num_micro_batches": timeline.schedule.num_micro_batches,
        "makespan": timeline.makespan,
        "bubble_ratio": timeline.bubble_ratio,
        "busy": timeline.busy.tolist(),
        "idle": timeline.idle.tolist(),
        "peak_activations": peaks.activations.tolist(),
        "peak_kept": peaks.kept.tolist(),
        "receive_buffers": peaks.receive_buffers.tolist(),
        "send_buffers": peaks.send_buffers.tolist(),
    }


def verify(options: argparse.Namespace) -> None:
    """Proves a schedule, or shows where it is wrong."""
    schedule = _schedule(options, check=False)
    transports = options.transport or ["eager", "rendezvous", "queue"]
    proof = schedule.verify(transports=transports, max_activations=options.max_activations)
    peaks = proof.peaks
    print(f"{schedule!r}: right")
    print(f"no deadlock with transports: {', '.join(proof.transports)}")
    print(f"messages between ranks: {proof.num_messages}")
    for name in ("activations", "kept", "receive_buffers", "send_buffers"):
        counts = getattr(peaks, name)
        print(f"most {name.replace('_', ' ')}: {counts.max()} (by rank: {counts.tolist()})")


def export(options: argparse.Namespace) -> None:
    """Writes a schedule in another form."""
    schedule = _schedule(options)
    suffix = Path(options.output).suffix.removeprefix(".") if options.output else "text"
    form = options.format or {"csv": "csv", "json": "json"}.get(suffix, "text")
    if form == "csv":
        content = schedule.to_csv(options.form, dialect=options.dialect, waits=not options.no_waits)
    else:
        content = schedule.to_json() + "\n" if form == "json" else schedule.text()
    if options.output:
        Path(options.output).write_bytes(content.encode())
    else:
        sys.stdout.write(content)


def search(options: argparse.Namespace) -> None:
    """Ranks what could be run; refuses where nothing can."""
    every = dualpipe.search(
        _layers(options),
        options.ranks,
        num_micro_batches=options.micro_batches,
        methods=options.methods,
        stages_per_rank=options.stages_per_rank,
        machine=Machine(
            latency=options.latency,
            overlap_factor=options.overlap,
            pairs=options.pairs,
            sends=options.sends,
            max_bytes=options.memory_gb,
        ),
        max_simulations=options.simulations,
        progress=_progress if sys.stderr.isatty() else None,
    )
    found = every[: options.top]
    if options.json:
        rows = [
            {
                "method": candidate.method,
                "num_micro_batches": candidate.num_micro_batches,
                "stages_per_rank": candidate.stages_per_rank,
                "bounds": candidate.partition and candidate.partition.bounds,
                "makespan": candidate.partition and candidate.partition.makespan,
                "wins_below_overlap": candidate.wins_below_overlap,
                "why": candidate.why,
            }
            for candidate in found
        ]
        print(json.dumps(rows))
    else:
        _print_candidates(found)
    if not any(candidate.partition for candidate in every):
        raise ScheduleError(
            code="infeasible",
            argument="--methods",
            got=f"{len(every)} combinations of schedule and micro-batches",
            expected="such that one of them can be run",
            hint="the list says why each cannot",
        )


def _print_candidates(found: Sequence[Candidate]) -> None:
    for place, candidate in enumerate(found, 1):
        stages = f" x{candidate.stages_per_rank}" if candidate.stages_per_rank else ""
        print(f"{place:2}. {candidate.method}{stages}, {candidate.num_micro_batches} micro-batches")
        if candidate.partition:
            sizes = [end - begin for begin, end in pairwise(candidate.partition.bounds)]
            print(
                f"    {candidate.time_per_micro_batch:.4g} a micro-batch, "
                f"{candidate.partition.makespan:.6g} a step; layers per stage {sizes}"
            )
        print(f"    {candidate.why}")


def _progress(done: int, total: int) -> None:
    end = "\n" if done == total else ""
    print(f"\rsearched {done} of {total} combinations", end=end, file=sys.stderr, flush=True)


def _layers(options: argparse.Namespace) -> Layers:
    if (options.forward is None) == (options.layers is None):
        raise ScheduleError(
            code="usage",
            argument="--forward",
            got="both it and --layers" if options.layers else "nothing",
            expected="layer times, or a file with --layers",
        )
    if options.layers is None:
        return Layers(
            forward=options.forward,
            backward_input=options.input,
            backward_weight=options.weight,
        )
    try:
        return Layers(**json.loads(Path(options.layers).read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ScheduleError(
            code="layers",
            argument="--layers",
            got=f"{options.layers}: {error}",
            expected="a JSON object with forward, backward_input, backward_weight, "
            "parameter_bytes, activation_bytes, message_bytes",
        ) from error


def _spread(times: list[float], stages: int, argument: str) -> list[float] | float:
    """One time for all stages, or one for each."""
    if len(times) == 1:
        return times[0]
    if len(times) != stages:
        raise ScheduleError(
            code="length",
            argument=f"--{argument}",
            got=f"{len(times)} times",
            expected=f"1, or {stages}, one for every stage",
        )
    return times
